"""What a run is in MLflow: a run of its own with a run per checkpoint below it, all with the same names of metrics.

Read run_record.py first.
outcome.py      RunOutcome: all that there is to record about a run
run_record.py   from an outcome and its rows to what the tracker takes
lineage.py      how a checkpoint was made, from the manifests in the store; the data sets that were read
images.py       what its images show: what the plan keeps, losses by step
layers.py       what pruning did to the layers, live and in the record
best.py         which checkpoints get an alias in the model registry
description.py  the descriptions that MLflow shows: markdown with the result table
"""
