"""Random values and broken files thrown at the command line, which may refuse them only in one sentence.

A few examples of each kind are tests (tests/scenarios/test_fuzz.py); as many as wanted are thrown by hand:
python -m tests.fuzz 2000
"""
