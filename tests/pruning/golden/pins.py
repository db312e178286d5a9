"""What each method does to tiny models, in numbers few and coarse enough to outlive another CPU's last digits."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from infra import registry
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.layerwise.capture import capture_statistics
from tests.pruning.captured import CPU, ON_THREE_LAYERS, logits, prune_copy, windows
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

FOLDER = Path(__file__).parent
FAMILIES = ("llama", "qwen3")
#: of methods that take others, or leave layers as they are
FAMILIES_OF = {"experts": ("mixtral", "qwen3_moe"), "vocabulary": ("llama",)}
#: further configs by method; the default config is always pinned
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "slimgpt": (
        {"split": "equal", "curve": "linear_increase", "head_unit": "query_head"},
        {"split": "half", "propagate_error": False, "group_size": 5},
        {"split": "attention", "sparsity": 0.2, "grouped_cholesky": False, "dampening_frac": 0.1},
    ),
    "shortened": (
        {"criterion": "taylor", "iterative": False, "layers": 1, "sparsity": None},
        {"criterion": "influence", "unit": "sub_layer"},
        {"merge": "linear"},
    ),
    "llm_pruner": ({"level": "vector", "aggregation": "max", "allocation": "global"},),
    "flap": ({"structure": "UL-UM", "metric": "IFV", "repair": "none", "head_unit": "query_head"},),
    "loraprune": ({"allocation": "global", "head_unit": "query_head", "split": "third"},),
    "compresso": ({"head_unit": "query_head", "prompt": True, "num_heldout": 2},),
    "experts": ({"score": "contribution", "allocation": "global"},),
    "wanda_sp": ({"repair": "least_squares", "allocation": "standardised"},),
    "vocabulary": ({"sparsity": 0.15, "multiple": 1, "num_tokens": 60},),
}
#: whose tokens a vocabulary is made smaller by
CORPUS = ("Pruning removes what matters least.", "Write a response that answers the question of the task.") * 2


def path(method: str) -> Path:
    return FOLDER / f"{method}.json"


def write(method: str) -> Path:
    cases = {name: outcome(method, *case) for name, case in cases_of(method).items()}
    pinned = {"version": registry.load("pruning.methods", method, "method").VERSION, "cases": cases}
    path(method).write_text(json.dumps(pinned, indent=1) + "\n", encoding="utf-8")
    return path(method)


def cases_of(method: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        f"{family} {json.dumps(config)}": (family, config)
        for family in FAMILIES_OF.get(method, FAMILIES)
        for config in ({}, *CONFIGS.get(method, ()))
    }


def outcome(method: str, family: str, config: dict[str, Any]) -> dict[str, Any]:
    module = registry.load("pruning.methods", method, "method")
    model = tiny_model(family)
    if hasattr(module, "rebuild"):
        return _of_vocabulary(module, model, {"sparsity": 0.1, "multiple": 8, "num_tokens": None} | config)
    calibration = windows(model, num_samples=32, seq_len=32)  # enough for splits to compete on a part of them
    typed = module.Config(**({"sparsity": 0.3} | ON_THREE_LAYERS.get(method, {}) | config))
    with tempfile.TemporaryDirectory() as folder:
        statistics = None
        if module.needs_statistics(typed):
            statistics = Path(folder)
            capture_statistics(ResidentDecoder(model), calibration, statistics, CPU)
        masked, pruned = prune_copy(model, typed, calibration, method=module, statistics=statistics)
    some_logits = logits(masked, random_ids(model))[0, -1, :4]
    return {
        # one line per layer, so that a diff shows which layer changed
        "kept": [
            f"{kept.layer}: q {kept.kept_query_heads} kv {kept.kept_kv_heads} ffn {kept.kept_channels}"
            for kept in pruned.plan.layers
        ],
        "numbers": [
            _rounded(value)
            for value in (
                pruned.achieved_sparsity,
                *(report.measured_error for report in pruned.layers if report.measured_error is not None),
                *(report.predicted_error for report in pruned.layers if report.predicted_error is not None),
                *(report.score for report in pruned.layers if report.score is not None),
                *pruned.split_kl.values(),
                *some_logits.tolist(),
            )
        ],
    }


def _of_vocabulary(module: Any, model: Any, config: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        save_checkpoint(model, tiny_tokenizer(), source)
        tiny_tokenizer().save_pretrained(out)
        load = AutoTokenizer.from_pretrained
        report = module.rebuild(source, out, load, lambda: iter(CORPUS), module.Config(**config))
        tokens, found = load(out).get_vocab(), load_checkpoint(out)
    some_logits = logits(found, random_ids(found))[0, -1, :4]
    numbers = (report.achieved_sparsity, report.counted_tokens, report.removed_tokens, report.added_tokens)
    return {
        "kept": sorted(token for token in tokens if len(token) > 1),
        "numbers": [_rounded(value) for value in (*numbers, *some_logits.tolist())],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
