"""Gradients of the loss, one layer on the device at a time. Read `backward` first.

* `backward`  from stored layer inputs, the last layer first; they equal those of `loss.backward()` on the whole model

The loss itself is in `walk/loss.py`. Imports `walk` and what it imports; `ranking` and `layerwise` score by what comes
out.
"""
