"""Part `speed`: what pruning costs, in plain forward passes over the same tokens."""

from __future__ import annotations

import copy
from statistics import median

from pruning.methods import slimgpt
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol
from tests.bench.resident import prune
from tests.bench.timing import bar, forward_seconds

PERCENTS = (20, 50)


def run(materials: Materials, options: Options) -> Result:
    """Forward, prune 20 %, forward, prune 50 %, forward, in one process."""
    texts, model = materials.tokens_only, materials.model()
    calibration = materials.calibration(texts, options.tokens, num_heldout=options.num_heldout)
    on_device = model if options.device == "cpu" else copy.deepcopy(model).to(options.device)

    def forward(count: int = options.tokens.count) -> float:
        ids_NL = calibration.input_ids_NL[:count]
        with bar(f"forward of {count} windows"):
            return forward_seconds(on_device, ids_NL, batch_size=options.batch_size, device=options.device)

    forward(options.batch_size)  # first calls pay for what later ones find ready
    figures: Figures = {}
    forwards = [forward()]
    for percent in PERCENTS:
        pruning = prune(model, calibration, slimgpt.Config(sparsity=percent / 100), options, f"prune {percent} %")
        forwards.append(forward())
        figures[f"speed_prune_{percent}_seconds"] = pruning.seconds
        figures[f"speed_split_{percent}"] = pruning.split or "not chosen"
    plain = median(forwards)
    ratios = {
        f"prune_over_forward_{percent}": float(figures[f"speed_prune_{percent}_seconds"]) / plain
        for percent in PERCENTS
    }
    timed: Figures = {
        "speed_forward_seconds": plain,
        "speed_forward_seconds_min": min(forwards),
        "speed_forward_seconds_max": max(forwards),
    }
    how = protocol(
        options,
        materials.model_name,
        materials.calibration_protocol(texts, options.tokens, options.num_heldout),
        f"slimgpt with its defaults, the choice of the split included; forward: decoder layers without head or cache "
        f"over the {options.tokens} calibration tokens, median of {len(forwards)} taken between the prunings",
    )
    return Result("speed", how, ratios | timed | figures)
