"""Part `p1`: the protocol that others can check: C4 32 x 512, WikiText-2 test in 8 windows of 1024, no BOS."""

from __future__ import annotations

import logging

from pruning.errors import PruningError
from pruning.methods import slimgpt
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol
from tests.bench.resident import prune

log = logging.getLogger("slimline.bench")

PERCENTS = (20, 50)


def run(materials: Materials, options: Options) -> Result:
    """Dense, then 20 % and 50 % with the default split and with the paper's equal one."""
    c4, wikitext, model = materials.c4, materials.wikitext, materials.model()
    calibration = materials.calibration(c4, options.p1_calibration, num_heldout=options.num_heldout)
    figures: Figures = {"p1_dense": materials.ppl(model, wikitext)}
    for percent in PERCENTS:
        for ending, split in (("", None), ("_equal", "equal")):
            key = f"p1_{percent}{ending}"
            config = slimgpt.Config(sparsity=percent / 100, split=split)
            try:
                pruning = prune(model, calibration, config, options, key)
            except PruningError as error:
                figures[key] = f"cannot be pruned: {error}"
                continue
            ppl = figures[key] = materials.ppl(pruning.smaller(model), wikitext)
            log.info("%s: ppl %.2f", key, ppl)
            if pruning.split:
                figures[f"{key}_split"] = pruning.split
    how = protocol(
        options,
        materials.model_name,
        materials.calibration_protocol(c4, options.p1_calibration, options.num_heldout),
        "share of all decoder-layer parameters, no recovery; *_equal: the split of the paper",
        materials.ppl_protocol(wikitext),
    )
    return Result("p1", how, figures)
