"""Pruning methods, one file each: the file name is the method's name in a spec, in keys and in results.

A method has VERSION (raised when its numbers change), Config, `needs_statistics(config)`, `order_config(config)` with
`order(...)` if one order of removal serves several sparsities, and `prune(decoder, calibration, config, *, statistics,
orders, options, walk_state, progress) -> Pruned`. tests/scenarios/test_methods_contract.py tests every file here.

Specs are validated by Config, so a method is importable without torch: what it computes with it imports in its
functions, from `allocation`, `obs` and `layerwise`.
"""
