"""Taking groups from a model while it trains: what is masked, by which rule, and what is left in the end.

It stands between the trainer (`pruning.training`) and the methods that train while they prune. Start with `session`.

* `session`     one training that prunes, from its data to a masked model and its plan
* `options`     what a spec may ask of such a method; no torch
* `prunable`    which groups may go, and which of them do for a sparsity, by their scores
* `masks`       factors on the inputs of output linears, while the model trains and in its weights afterwards
* `importance`  LoRAPrune: scores from the adapters' gradients, a ratio that rises step by step
* `gates`       Compresso: hard-concrete gates that are trained towards a sparsity
* `prompt`      its text in front of every example
* `trained`     all that the project asks of such a method, from one function
"""
