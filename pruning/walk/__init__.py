"""The walks over decoder layers, the only such loops in the project. Read `sequential` first.

* `sequential`     computes each sub-layer once, yields its output linear with the Hessian of its inputs
* `step`           a sub-layer from one pass to the next; `sub_layer` is what is yielded of it;
                   `experts` adds up what it knows of the experts of a layer
* `options`        how to run a walk, and how much memory its activations may take
* `state`          what the walk has done so far, layer by layer, and what a method returns
* `durable_state`  the same in files, so that a killed walk goes on at its last layer

* `embedding`      the way into the layers: the stream before the first one, and what the model hands to each
* `loss`           of the tokens, from the stream after the last layer
* `finished`       the model that a walk left, for the next one to begin with
* `streams`        residual streams taken through layers at will; `skipping` reads from them the loss without a layer,
                   and how much a layer changes its input

Imports `activations`, `checkpoints.decoder`, `families`, `statistics` and `distributed`; what to remove is decided by
`layerwise`. The way back, for gradients, is in `gradients`.
"""
