"""The walk over decoder layers, the only such loop in the project. Read `sequential` first.

* `sequential`     computes each sub-layer once, yields its output linear with the Hessian of its inputs
* `activations`    values of all samples between sub-layers, in memory up to a budget and then in files
* `state`          what the walk has done so far, layer by layer, and what a method returns
* `durable_state`  the same in files, so that a killed walk goes on at its last layer

Imports `checkpoints.decoder`, `families`, `obs.hessian` and `distributed`; what to remove is decided by `layerwise`.
"""
