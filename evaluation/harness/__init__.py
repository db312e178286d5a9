"""lm-eval's stock tasks on a model in memory; prompts, metrics and aggregation stay lm-eval's own.

Imports `evaluation.inference` and the root of the room; run_tasks.py alone imports lm_eval, local_dataset.py and
overlays.py import datasets. Read run_tasks.py first.

* stock_tasks.py: the tasks' YAML files, read without importing lm-eval
* local_dataset.py, overlays.py: local folders in place of the hub's data sets
* run_tasks.py: loads the tasks and answers their requests by `evaluation.inference`
* results.py: lm-eval's results as metrics and samples
"""
