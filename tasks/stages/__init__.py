"""The stages of a run, one file each: `fill(request, context)` writes one artifact, `stage(...)` makes a task of it.

* `import_model`, `calibrate`         a clean checkpoint, and token windows
* `capture`, `order`                  Hessians of the dense model, and the greedy orders that follow from them
* `prune`, `recover`                  checkpoints
* `evaluate`, `profile`, `pairs`      reports, and checkpoints beside each other on the same items
* `record`, `record_night`            the results store (DuckDB) and MLflow
* `walk_processes`                    the layer walk in several processes, for capture and prune

Heavy libraries are imported inside `fill`: planning a run must not import torch. Start with `calibrate`.
"""
