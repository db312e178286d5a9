"""The adapters: each stage opens artifacts, calls a library room, and writes one artifact. No mathematics in here.

* `requests`          what identifies a stage: the fields that can change the answer, hashed into its key
* `calibration_data`  which texts a calibration set is sampled from
* `stages/`           one file per stage: what it opens, which library it calls, what it writes
* `execution/`        what all stages share: Prefect task, lock, store, progress, retries, disk forecast
* `recording/`         what a run is in MLflow: its checkpoints, their parameters, data and descriptions
* `exporting/`        a checkpoint of the store in forms that other programs read
* `devices/`          which device a stage computes on, and the models that stay loaded there

May import pruning, evaluation and infra; is imported by flows alone.
"""
