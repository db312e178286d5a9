"""Structured pruning of decoder-only transformers: model and tensors in, plan and model out.

This room knows tensors and nothing of the world: no workflow engine, no tracking, no environment variables. The map:

* `plan`        what is kept, per layer (no torch)
* `families`    where a decoder keeps its parts, and what a head or a channel costs
* `surgery`     `shrink_` cuts a model to a plan, `mask_` zeroes instead
* `checkpoint`  saves and loads pruned models, uneven layers included
* `methods`     one file per pruning method, the file name is the method's name
* `recovery`    one file per way to train a pruned model back to health
"""
