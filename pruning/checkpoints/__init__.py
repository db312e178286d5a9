"""Checkpoint folders and the models in them. Imports `families`, `modeling` and `plan`. Read `stored_tensors` first.

* `folder`          what a folder says of itself: its class, whether it has weights; our modelling file beside them
* `stored_tensors`  names, ties and dtype of its tensors: the one place that decides on them
* `save_load`       whole models to and from folders, uneven layers included
* `decoder`         a model whose layers come one at a time, from memory or from files
* `meta_model`      models without weights
* `surgery`         `shrink_` cuts a model to a plan, `mask_` zeroes instead
* `clean`           rewrites an imported folder so that every loader reads the same
* `load_check`      loads what was just written and compares its logits
* `plain_folder`    a checkpoint for whoever loads it without slimline
* `llama_cpp`       its layers and tensors as llama.cpp computes with them
"""
