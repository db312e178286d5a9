"""The processes around a flow: environment, Prefect's server, task runners, signals. Knows nothing of stages' content.

environment.py       variables, Prefect's defaults and logging of each of our processes; read it first
prefect_access.py    can Prefect be used? asked before any flow starts; prefect_database.py: its database
servers.py           Prefect's and MLflow's servers, the temporary one included, each run by exit_with_parent.py
task_runners.py      stages in threads or on a cluster (dask_runner.py, ray_runner.py, worker_process.py)
interrupts.py        the first signal finishes stages, the second drops them
flow_processes.py    the flow runs of `slimline serve`, which end with it
user_errors.py       an exception as one sentence for the user, if they can mend its cause

May import tasks, infra, flows.errors and flows.spec.validation; flows.run, flows.night and flows.serve stand above it.
"""
