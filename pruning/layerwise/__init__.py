"""Pruning one layer after another: the walk, the budgets and OBS together. Read `prune` first.

* `prune`         what happens to each linear that the walk yields: choose, refit, report
* `split_search`  one allocation carried out, or several compared and the best kept
* `knapsack`      one budget for all sites, spent in steps; `levels` says what each site's levels cost in loss
* `kl`            the measure they are compared by, without ever holding all logits
* `capture`       Hessians of the dense model, written once for every sparsity
* `orders`        from these, one order of removal for every sparsity
* `apply`         orders of heads and channels carried out: what the allocation takes goes, the rest is repaired
* `drop`          whole layers left out; `stand_ins` lets the layer before them do their work as well
* `streaming`     from one checkpoint folder to another, durably; the whole of a pruning stage

Imports `allocation`, `checkpoints`, `obs` and `walk`; used by `search`, `methods` and the tasks.
"""
