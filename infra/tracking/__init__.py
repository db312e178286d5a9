"""MLflow. May import infra.filesystem and infra.secrets.

Read tracker.py first.
tracker.py       Tracker: one MLflow run per run key, a run per checkpoint below it; LiveRun: while one is trained
mlflow_store.py  one experiment: finding runs again, bringing them what they lack; the only importer of mlflow
images.py        images drawn and logged
live.py          LiveCurves: points of a training gathered, and handed to MLflow by a thread
records.py       what is logged: MetricPoint, RunContent, CheckpointRecord, RunRecord
experiment.py    the experiment, made as its users expect it
saved_view.py    the table of all checkpoints that MLflow's page of the experiment offers
database.py      what is at a tracking URI, looked at before any work and without mlflow
pages.py         where a browser finds a run
mlflow_rules.py  which keys, lengths and numbers MLflow accepts
"""
