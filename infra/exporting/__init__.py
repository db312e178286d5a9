"""Formats that other programs read, as files. May import infra.errors, infra.models and infra.filesystem.

* gguf_file.py        a GGUF file: the one place that imports gguf
* gguf_vocabulary.py  a tokenizer in the words of GGUF
"""
