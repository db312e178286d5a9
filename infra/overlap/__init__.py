"""What two data sets may have in common, from words alone. Pure: reads nothing, imports nothing of the project.

words.py    runs of 13 words, and how many texts share one with others
splits.py   whether "train[:50%]" and "train[40%:]+test" can mean the same rows
Reading the rows is for infra/sources/shared_rows.py.
"""
