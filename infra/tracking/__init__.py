"""MLflow. May import infra.filesystem and infra.secrets.

Read tracker.py first: the only importer of mlflow, inside functions, since that takes seconds.
tracker.py       Tracker: one MLflow run per run key, continued and never repeated; LiveRun: while it is under way
live.py          LiveCurves: points of a training gathered, and handed to MLflow by a thread
records.py       what is logged about a run: MetricPoint, RunRecord
database.py      what is at a tracking URI, looked at before any work and without mlflow
mlflow_rules.py  which keys, lengths and numbers MLflow accepts
"""
