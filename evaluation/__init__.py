"""What a model is worth: perplexity, divergence, stock lm-eval tasks, speed. Model, tokenizer and texts in, report out.

Imports nothing of the other rooms, nor prefect, mlflow or duckdb. Read suite.py first: the contract of suites.

* report.py, samples.py: what leaves the room, figures and the items that they are averages of
* suites/: one file per suite that a spec can name
* language_modeling/, harness/: how suites measure, on texts and by lm-eval's tasks
* inference/: rows through a model, in batches, on one device or several
* profile/: speed, memory and size; significance/: whether a difference is more than noise
* bounds.py, naming.py, errors.py: how configs are refused
"""
