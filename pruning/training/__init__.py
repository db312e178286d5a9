"""The trainer under every recovery and every method that trains: what a run reads, learns from, keeps and reports.

It may import families, checkpoints and distributed, never a recovery or a method. Start with `trainer`.

* `data`         which data sets are trained on, as options of a spec; no torch
* `options`      options that all trainings share, and what the machine decides
* `records`, `packing`, `batches`, `example_sets`   what is learnt from, as token ids and labels
* `adapters`     LoRA on the model's linears
* `objectives`   what is minimised: cross entropy, or the divergence from a dense model
* `trainer`      the Hugging Face Trainer, made resumable, watched by held-out loss, and quiet
* `watching`, `durable`      when checkpoints are written, held-out loss, divergence; which are whole, the best weights
* `memory`       what a training takes, before it starts
"""
