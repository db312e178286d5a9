"""Structured pruning of decoder-only transformers: model and tensors in, plan and model out.

This room knows tensors and nothing of the world: no workflow engine, no tracking, no environment variables. The map:

* `plan`        what is kept, per layer (no torch)
* `families`    where a decoder keeps its parts, and what a head or a channel costs
* `surgery`     `shrink_` cuts a model to a plan, `mask_` zeroes instead
* `checkpoint`  saves and loads pruned models, uneven layers included
* `decoder`     a model whose layers come one at a time, from memory or from files
* `sequential`  the walk over them; around it `activations`, `ledger`, `team`
* `layerwise`   what the walk offers meets budgets (`schedule`) and mathematics (`hessian`, `obs`)
* `splits`      several distributions of the cut tried, the best kept; `orders` one order for every sparsity
* `streaming`   from one checkpoint folder to another, durably
* `methods`     one file per pruning method, the file name is the method's name
* `recovery`    one file per way to train a pruned model back to health
"""
