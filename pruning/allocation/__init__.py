"""How much goes from which layer, in integers: no tensors, no forward pass.

`budget` has the words: what is asked (Allocation) and what goes from a layer (LayerBudget). `schedule` gives layers the
paper's curve over depth (`curves`), shares the cut between attention and FFN, and rounds so that the parameters removed
meet the asked sparsity. `threshold` lets one threshold on scores decide instead. `grid` puts what stays on a grid:
multiples of channels, equal layers. `knapsack` spends one budget where predicted losses are least. `moves` exchanges
parameters between sites, for a search. `options` has what a spec may ask of the last two, `trace` what they report.
Other ways to share a budget belong here as files of their own.

Imports `plan` and `families` (what a head and a channel cost); used by `methods` and `layerwise`.
Read `schedule.solve_budgets` first.
"""
