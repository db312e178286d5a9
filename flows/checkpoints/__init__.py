"""A checkpoint taken out of a recorded run: for other programs, for the hub, for a talk in the terminal.

* find.py          which checkpoint is meant, and where it lies
* export.py        one function per format
* model_card.py    README.md of what is exported; loading.py is its part on who loads it how
* eval_results.py  its figures as the hub reads them
* chat.py          the talk in the terminal
* public.py        nothing of this machine in what goes elsewhere

May import flows.records, tasks.exporting, infra and what flows.records may. Read find.py first.
"""
