"""Commands that take a checkpoint out of a recorded run.

* export.py: export, in every format. push.py: push, to the hub. chat.py: chat.

May import flows.checkpoints, flows.commands.app and flows.commands.store, and what these may.
"""
