"""Evaluation texts by one word, as the papers' code takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PTB = {
    # The hub has PTB as a loading script, which is never run; this is the hub's own conversion of it.
    "dataset": "ptb-text-only/ptb_text_only",
    "revision": "refs/convert/parquet",
    "config": None,
    "text_field": "sentence",
    "bos": "tokenizer",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # LLM-Pruner (arXiv 2305.11627), Shortened LLaMA (arXiv 2402.02834), SlimGPT (arXiv 2412.18110): windows of 128;
    # SparseGPT (arXiv 2301.00774), Wanda and SliceGPT: of the model's maximum or 2048
    "wikitext2": {
        "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "join": "\n\n",
        "bos": "tokenizer",
    },
    # LLM-Pruner's and Shortened LLaMA's PTB is the validation split, joined by blank lines: windows of 128
    "ptb": _PTB | {"split": "validation", "data_files": "penn_treebank/validation/0000.parquet", "join": "\n\n"},
    # SparseGPT's PTB (GPTQ's "ptb-new") is the test split, joined by spaces
    "ptb-test": _PTB | {"split": "test", "data_files": "penn_treebank/test/0000.parquet", "join": " "},
    # SparseGPT's C4: the first 256 windows of the first 1100 documents of the first validation shard
    "c4": {
        "dataset": "allenai/c4",
        "config": None,
        "split": "validation[:1100]",
        "data_files": "en/c4-validation.00000-of-00008.json.gz",
        "join": " ",
        "bos": "tokenizer",
        "max_windows": 256,
        "window_seed": None,
    },
    # lm-eval's task wikitext (version 2.0): word_perplexity, byte_perplexity and bits_per_byte
    "lm-eval-wikitext": {
        "dataset": "EleutherAI/wikitext_document_level",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "text_field": "page",
        "documents": "separate",
        "detokenizer": "wikitext",
        "bos": "tokenizer",
        "rolling": True,
        "keep_last_partial": True,
        "normalise": ("lm_eval_word", "byte"),
        "windows": ("max",),
    },
}
"""What a short name stands for; written out in full in a dumped spec, in cache keys and in every protocol."""

_ONE_FILE = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".gz")


def expanded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a preset's values for what they do not say themselves.

    Another data set than the default one has no configuration unless one is named, and a file has the split "train".
    """
    dataset = options.get("dataset")
    if not isinstance(dataset, str):
        return dict(options)
    if dataset in PRESETS:
        return {**PRESETS[dataset], **{name: value for name, value in options.items() if name != "dataset"}}
    implied: dict[str, Any] = {} if dataset == PRESETS["wikitext2"]["dataset"] else {"config": None}
    if dataset.endswith(_ONE_FILE):
        implied["split"] = "train"
    return implied | dict(options)
