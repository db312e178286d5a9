"""Commands that take a checkpoint out of a recorded run.

* export.py: export, in every format.

May import flows.checkpoints, flows.commands.app and flows.commands.store, and what these may.
"""
