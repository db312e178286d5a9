"""One run: from a spec to recorded results. Read compress.py first, then stages.py.

* compress.py: the Prefect flow `compress`, which plans, checks, submits, records.
* locate.py: finds the model and the data sets, once; what they are called in cache keys.
* stages.py: from a spec and these identities to stages with their keys; pure. graph.py: what a stage is.
* preflight.py: what would fail after hours is refused in seconds.
* lineage.py: how checkpoints are made, for the record.
* leaks.py: training on what is measured: a warning in a run, refused in a night.
* names.py: what Prefect's pages call a run and its stages.
* follow.py: who runs says so, for `slimline watch`.
* outcome.py: what a run returns, and StagesFailed.

May import flows.spec, flows.records, flows.runtime, and tasks, pruning, evaluation and infra.
"""
