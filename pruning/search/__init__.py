"""Searching for levels: what a faster rule has allocated is improved by candidates that are judged as whole models.

A database holds the pruned and repaired output linear of every site at a few levels, so that a candidate costs one
forward of the held-out calibration windows; what counts is the KL of its logits to the dense ones. Start with
`searched`.

* `searched`    the whole way: start, database, candidates, a last refit, and the better of both written
* `judging`     candidates counted, remembered and reported, within a budget of forwards
* `coordinate`  moves along a few directions, then between ever fewer sites
* `evolution`   mutations of the best so far, most of them judged by a part of the windows
* `database`    levels on disk or in memory, and a decoder made of them
* `building`    the walks that fill it
* `forwards`    what all that costs, before it is done

Points and moves are integers of `allocation.moves`. Imports `layerwise`, `allocation` and `walk`; used by `methods`.
"""
