"""The walks over decoder layers, the only such loops in the project. Read `sequential` first.

* `sequential`     computes each sub-layer once, yields its output linear with the Hessian of its inputs
* `activations`    values of all samples between sub-layers, in memory up to a budget and then in files
* `state`          what the walk has done so far, layer by layer, and what a method returns
* `durable_state`  the same in files, so that a killed walk goes on at its last layer

* `embedding`      the way into the layers: the stream before the first one, and what the model hands to each
* `backward`       gradients of the loss, one layer at a time, last to first
* `sensitivity`    squared gradients and Hessians of every sub-layer's output, on such a walk; no gradients of weights
* `finished`       the model that a walk left, for the next one to begin with
* `streams`        residual streams taken through layers at will; `skipping` reads from them the loss without a layer,
                   and how much a layer changes its input

Imports `checkpoints.decoder`, `families`, `statistics` and `distributed`; what to remove is decided by `layerwise`.
"""
