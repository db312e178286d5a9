"""How far the ratio pruned / dense differs between runs of the profile on a machine that does other things too."""

from __future__ import annotations

import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from evaluation.profile.config import ProfileConfig
from evaluation.profile.profiler import profile
from evaluation.profile.report import Comparison
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from pruning.plan import LayerPlan, PruningPlan
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol

log = logging.getLogger("slimline.bench")


_KEPT = 0.75
"""Share of the FFN's channels that the smaller model has: which ones does not change its speed."""


def run(materials: Materials, options: Options) -> Result:
    """Runs in processes of their own, each of which loads both models anew."""
    folders = materials.model_folder, options.scratch / "smaller"
    _write_smaller(materials, folders[1])
    config = ProfileConfig.model_validate(vars(options.profile))
    figures: Figures = {}
    found = [_in_a_process(*folders, config, options.device) for _ in range(options.profile_processes)]
    for name in ("prefill", "decode"):
        ratios = [getattr(comparison, f"{name}_ratio") for comparison in found]
        values = [ratio.value for ratio in ratios]
        figures |= {f"profile_{name}_ratio_{index + 1}": value for index, value in enumerate(values)}
        figures[f"profile_{name}_stderr"] = max(ratio.stderr or 0.0 for ratio in ratios)
        figures[f"profile_{name}_ratio_spread"] = max(values) / min(values) - 1
    figures["profile_load"] = os.getloadavg()[0]
    details = (
        f"{materials.model_name} with {_KEPT:.0%} of its FFN channels over itself, {options.profile_processes} runs, "
        "each in a new process",
        f"prompt {config.prompt_len[0]}, {config.new_tokens[0]} new tokens, turns until the standard error is "
        f"{config.ratio_precision:.1%} or {config.ratio_seconds:g} s are over",
        "spread = largest ratio / smallest - 1; load = the machine's load average at the end",
    )
    return Result("profile", protocol(options, *details, batches=f"batches of {config.batch_size[0]}"), figures)


def _write_smaller(materials: Materials, folder: Path) -> None:
    model = materials.model()
    source = shapes(model)
    layers = tuple(
        LayerPlan(
            layer=index,
            kept_query_heads=tuple(range(shape.num_heads)),
            kept_kv_heads=tuple(range(shape.num_kv_heads)),
            kept_channels=tuple(range(int(_KEPT * shape.intermediate_size))),
        )
        for index, shape in enumerate(source)
    )
    shrink_(model, PruningPlan(source=source, head_dim=family_of(model).head_dim(model), layers=layers))
    save_checkpoint(model, None, folder)


def _in_a_process(dense: Path, smaller: Path, config: ProfileConfig, device: str) -> Comparison:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        comparison = pool.submit(_measure, dense, smaller, config, device, torch.get_num_threads()).result()
    log.info("ratios: prefill %s, decode %s", comparison.prefill_ratio, comparison.decode_ratio)
    return comparison


def _measure(dense: Path, smaller: Path, config: ProfileConfig, device: str, threads: int) -> Comparison:
    torch.set_num_threads(threads)
    model, reference = (load_checkpoint(folder, dtype=torch.float32) for folder in (smaller, dense))
    comparison = profile(model, config, reference=reference, device=device).points[0].comparison
    assert comparison is not None, "two models of this size fit into memory"
    return comparison
