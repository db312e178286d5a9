"""Optimal Brain Surgeon on the inputs of a linear (SlimGPT, arXiv 2412.18110, sections 3.1 to 3.3).

* `hessian`      mean of x xᵀ over the calibration tokens: accumulated, and read back from a capture
* `elimination`  the mathematics: scores, down-dates, greedy rounds, refit. Read this first
* `ridge`        what a refit adds to the diagonal, and how the held-out windows choose it
* `groups`       what may go together (heads, channels), in which rounds

Tensors in, tensors out: no model, no files but the captured Hessians. Imports `plan`, `distributed` (sums over
processes) and types of `allocation`.
"""
