"""What the walk adds up about the inputs of a linear, batch by batch: one file per statistic.

* `hessian`      second moments (mean of x xᵀ), which Optimal Brain Surgeon needs; and read back from a capture
* `moments`      mean, variance and mean square of each input, which FLAP and Wanda score by
* `cross`        second moments between inputs and wanted outputs, for least-squares fits
* `accumulator`  what the first two have in common, so that the walk takes either

Tensors in, tensors out; sums over several processes are exact. Imports `distributed` and `errors` alone.
"""
