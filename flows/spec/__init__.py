"""What a user asks for, typed: YAML to frozen pydantic models and back. Read run.py first.

* run.py: RunSpec, a run. steps.py: its prune and recover steps. branches.py: the checkpoints that steps stand for.
  measures.py: what is measured of them, and which files are made.
* night.py: NightSpec, a matrix of runs with gates.
* load.py: names and paths, YAML, `--set` overrides.
* parts.py: base classes; options of plug-ins, which stand flat in YAML.
* start_folder.py: where relative paths start.
* validation.py: secrets and unsafe names are refused; errors as one sentence.

May import infra, and of pruning, evaluation and tasks their config types. Imports no torch and no prefect.
"""
