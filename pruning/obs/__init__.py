"""Optimal Brain Surgeon on the inputs of a linear (SlimGPT, arXiv 2412.18110, sections 3.1 to 3.3).

* `elimination`  the mathematics: scores, down-dates, greedy rounds, refit. Read this first
* `ridge`        what a refit adds to the diagonal, and how the held-out windows choose it
* `groups`       what may go together (heads, channels), in which rounds
* `rounds`       how many groups go in each of them
* `in_place`     matrices factored, made smaller and measured without a second one

Tensors in, tensors out: no model, no files but the captured Hessians. Imports `plan`, `distributed` (sums over
processes) and types of `allocation`.
"""
