"""Structured pruning of decoder-only transformers: model and tensors in, plan and model out.

Nothing here knows of workflows, tracking or environment variables, and nothing is imported from another room. The map:

* `plan`         what is kept, per layer (no torch); `calibration` token windows; `instructions` records as text
* `families`     where a decoder keeps its parts, and what a head or a channel costs; `modeling` uneven layers
* `checkpoints`  saves, loads and checks model folders, whole or one layer at a time; `surgery` cuts to a plan
* `walk`         the loop over decoder layers, and how an interrupted one goes on; `activations` between sub-layers,
                 in memory or files; `gradients` the way back
* `obs`          Optimal Brain Surgeon: second moments, greedy elimination, refit
* `allocation`   from one sparsity to heads and channels per layer
* `layerwise`    all of these together: prune, capture, compare splits, checkpoint to checkpoint
* `costs`        what pruning costs, counted before it is done
* `methods`      one file per pruning method, the file name is the method's name
* `recovery`     one file per way to train a pruned model back to health
* `training`     the trainer under them; `gradual` takes groups from a model while it trains
* `vocabulary`   fewer tokens: tokenizer, embeddings and head
* `distributed`  several processes that prune one model together; `host_memory` memory kept while the CPU trains

Read `methods/slimgpt` first, then `layerwise/prune` and `walk/sequential`.
"""
