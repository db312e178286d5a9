"""MLflow. May import infra.filesystem and infra.secrets.

Read tracker.py first: the only importer of mlflow, inside functions, since that takes seconds.
tracker.py       Tracker: one MLflow run per run key, continued and never repeated
database.py      what is at a tracking URI, looked at before any work and without mlflow
mlflow_rules.py  which keys, lengths and numbers MLflow accepts
"""
