"""Pruning one layer after another: the walk, the budgets and OBS together. Read `prune` first.

* `prune`         what happens to each linear that the walk yields: choose, refit, report
* `split_search`  one allocation carried out, or several compared and the best kept
* `kl`            the measure they are compared by, without ever holding all logits
* `capture`       Hessians of the dense model, written once for every sparsity
* `orders`        from these, one order of removal for every sparsity
* `streaming`     from one checkpoint folder to another, durably; the whole of a pruning stage

Imports `allocation`, `checkpoints`, `obs` and `walk`; used by `methods` and by the tasks.
"""
