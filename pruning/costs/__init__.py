"""What pruning costs, counted before it is done; `slimline plan --estimate` divides it by what a machine does a second.

* `work`  products by precision and bytes, of a forward, of second moments, of the solver; rates
* `walk`  of pruning layer by layer, and of the trials that choose a split

A method that counts its work has a function `work`. What is counted is held to what torch counts while the code runs
(tests/pruning/costs). Nothing here computes with tensors. Imports obs, layerwise, allocation and families for their
numbers; only methods import it, inside their functions. Read `work` first.
"""
