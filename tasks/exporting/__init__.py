"""Adapters that take a checkpoint out of the store, in a form that other programs read. One file per form.

* hf_folder.py   a plain Hugging Face folder
* gguf.py        one file for llama.cpp
* talk.py        loaded, to be talked to
* in_run.py      the stages of a run that write such a file as an artifact, and measure size and speed of it
* publishing.py  a folder beside its place until it is whole

May import pruning, evaluation, infra and the rest of tasks.
"""
