"""Ranking: from scores to orders of what goes first. A method file says which scores; what they have in common is here.

* `job`      what a ranking is given, and how the orders of heads and channels follow from scores. Read this first
* `inputs`   scores from statistics of each output linear's inputs (one walk forwards)
* `coupled`  scores of the weights that go together, or of weights times gradients (one walk backwards)
* `experts`  whole experts, by what they add to the stream or how often they are asked: `routing` counts it
* `depth`    whole layers, or attention and MLP apart: once, or again after each removal

Imports `walk`, `statistics`, `families`, `orders` and `plan`; used by `methods`. What is chosen from the orders, and
what happens then, is decided by `allocation` and `layerwise`.
"""
