"""Pruning methods, one file each: the file name is the method's name in a spec, in keys and in results.

A method has VERSION (raised when its numbers change), Config and OrderConfig (what its orders depend on), ORDERS_FROM
("calibration" or "statistics", what `order` reads), and

* `check_model(config, layers, cost, family)`  raises PruningError if a model of these widths cannot be pruned so
* `needs_statistics(config)`              whether `prune` wants captured Hessians of the dense model
* `order_config(config)`                  an OrderConfig if one ranking serves several sparsities, else None
* `order(decoder, config, folder, ...)`   makes that ranking
* `between_steps(config, num_layers, ...)`  optional: what `prune` keeps meanwhile, in values of the stream and models
* `prune(decoder, calibration, config, *, statistics, orders, options, walk_state, progress) -> Pruned`

`_ranked` writes them for methods that only score heads and channels. Where `work(config, size, windows)` is there too,
it says by part what `prune` costs (`pruning.costs`), and `slimline plan --estimate` what that takes here.

One that trains while it prunes has no orders and reads data sets instead of calibration windows. In the place of
`order` and `prune` it has

* `train(model, tokenizer, inputs, config, run) -> TrainedPruning`   the model is left masked, in place
* `reads(config)`                         its data sets, as a recovery's
* `check_training(config, hidden_size, context)`, `scratch_bytes(config, ...)`   as check_model, scratch_bytes there

and `pruning.gradual.trained` writes all of them from one function that makes what decides.

One that takes nothing from the layers but makes the vocabulary smaller reads a data set too. In the place of `order`
and `prune` it has

* `rebuild(source, out, load_tokenizer, texts, config, progress) -> SmallerVocabulary`   from folder to folder
* `reads(config)`                         the data set whose tokens it counts
* `check_tokenizer(config, content, num_rows)`   as check_model, of a tokenizer.json

and checkpoints that follow from it have a tokenizer of their own.

tests/scenarios/test_methods_contract.py tests every file here. Specs are validated by Config, so a method is importable
without torch: what it computes with it imports in its functions, from `ranking`, `allocation`, `obs` and `layerwise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: options that ask for a number of what goes, in the place of a sparsity
_NUMBERS = ("layers", "experts")


def asked_number(options: Mapping[str, Any]) -> str | None:
    """As "6 layers" of the options of a pruning method that ask for a number of something; None of others."""
    return next((f"{options[name]} {name}" for name in _NUMBERS if options.get(name) is not None), None)
