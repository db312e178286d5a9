"""Values of all calibration samples between sub-layers, wherever there is room for them. Read `activations` first.

* `activations`  put and got batch by batch, in memory or in files
* `pinned`       in page-locked host memory, copied on streams of their own while the device computes
* `tiers`        on the device, on the host, in files: as far as the budgets go, in this order

Nothing here knows of layers; `walk/options.py` says what the budgets are.
"""
