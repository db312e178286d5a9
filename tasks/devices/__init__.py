"""Which device a stage computes on.

* `pool`          first come, first served: one stage per accelerator at a time; start here
* `placement`     the devices of this machine, their names, and how a model is put on them
* `leases`        the same accelerator is never given to two processes of a host, or of a Prefect server
* `model_cache`   the model that was measured last stays loaded for the next suite of the same checkpoint
* `exported`      a GGUF file of a checkpoint as a model

Nothing here knows what a stage does. Torch is imported inside functions.
"""
