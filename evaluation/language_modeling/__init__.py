"""Texts as windows of tokens, and what a model predicts in them.

Imports `evaluation.inference`, the Figure of `evaluation.significance` and the root of the room. Read protocol.py
first: it says what must be said of a perplexity.

* protocol.py, presets.py: how windows are cut, and the papers' choices by one word; both without torch
* token_streams.py, windows.py: texts to tokens with their words and bytes, tokens to windows
* perplexity.py: log-likelihood of windows, per token, word and byte
* divergence.py: KL divergence and agreement with a reference model, token by token
"""
