"""Evaluation texts by one word, as the papers' code takes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from evaluation.errors import EvaluationError

_PTB_FILES = {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")}

_C4_FILES = {  # of many shards the first, as in SparseGPT
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}

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
    "ptb": _PTB | {"split": "validation", "data_files": _PTB_FILES["validation"], "join": "\n\n"},
    # SparseGPT's PTB (GPTQ's "ptb-new") is the test split, joined by spaces
    "ptb-test": _PTB | {"split": "test", "data_files": _PTB_FILES["test"], "join": " "},
    # SparseGPT's C4: the first 256 windows of the first 1100 documents of the first validation shard
    "c4": {
        "dataset": "allenai/c4",
        "config": None,
        "split": "validation[:1100]",
        "data_files": _C4_FILES["validation"],
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

_FILES: Mapping[str, Mapping[str, str]] = {"ptb": _PTB_FILES, "ptb-test": _PTB_FILES, "c4": _C4_FILES}
"""Where a preset that reads `data_files` has each split: the loader calls any file by the split that is asked for."""

_ONE_FILE = (".txt", ".jsonl", ".json", ".ndjson", ".csv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst")


def expanded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with a preset's values for what they leave out.

    A preset's split is read from its own file, whichever of the two is set. Another data set than the default one has
    no configuration unless one is named, and a file has the split "train", by its name alone: the disk is not looked
    at. Raises EvaluationError, naming the value, for a split or configuration of a preset whose file is not known.
    """
    dataset = options.get("dataset")
    if not isinstance(dataset, str):
        return dict(options)
    if dataset in PRESETS:
        return _preset(dataset, {name: value for name, value in options.items() if name != "dataset"})
    implied: dict[str, Any] = {} if dataset == PRESETS["wikitext2"]["dataset"] else {"config": None}
    if dataset.endswith(_ONE_FILE):
        implied["split"] = "train"
    return implied | dict(options)


def _preset(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values beside the user's own, split and file fitting each other."""
    preset, files = PRESETS[name], _FILES.get(name)
    file = own.get("data_files")
    implied: dict[str, Any] = {}
    if files is not None and "data_files" not in own:
        implied["data_files"] = _file_of(name, own.get("split", preset["split"]))
        _check_config(name, own.get("config"), implied["data_files"])
    elif files is not None and isinstance(file, str) and file != preset["data_files"]:
        implied["split"] = _split_of(file, files)
    return {**preset, **implied, **own}


def _file_of(name: str, split: Any) -> str:
    """The file of a split, or of slices of one split."""
    files = _FILES[name]
    asked = {part.partition("[")[0].strip() for part in str(split).split("+")}
    if len(asked) > 1 or not asked <= files.keys():
        raise EvaluationError(
            f"split {split!r}: the preset {name} knows files of {', '.join(files)}; name one of these splits, or give "
            "`data_files` too"
        )
    return files[asked.pop()]


def _split_of(data_files: str, files: Mapping[str, str]) -> str:
    """The one split that a path names; else "train", as the loader calls all files that belong to no split."""
    words = re.findall("[a-z]+", data_files.lower())
    named = [split for split in files if split in words]
    return named[0] if len(named) == 1 else "train"


def _check_config(name: str, config: Any, file: str) -> None:
    """Raise EvaluationError for a configuration that the preset's file is not of."""
    if config is not None and config != file.partition("/")[0]:
        raise EvaluationError(
            f"config {config!r}: the preset {name} reads {file}, which is not of it; leave config out, or give "
            "`data_files` too"
        )
