"""Part `ordering`: whether the paper's findings (arXiv 2412.18110, section 4.3) order themselves the same way here."""

from __future__ import annotations

import logging
from typing import get_args

from transformers import PreTrainedModel

from pruning.allocation.curves import Curve
from pruning.errors import PruningError
from pruning.methods import slimgpt
from tests.bench.materials import Materials
from tests.bench.options import Options, Windows
from tests.bench.report import Figures, Result, Value, protocol
from tests.bench.resident import prune

log = logging.getLogger("slimline.bench")

Row = tuple[slimgpt.Config, Windows]


def rows(options: Options) -> dict[str, Row]:
    """What is tried, by name. Everything but `split_default` takes the paper's equal split."""
    calibration, paper = options.p1_calibration, {"sparsity": options.ordering_percent / 100, "split": "equal"}
    paper["head_unit"] = options.head_unit
    base = slimgpt.Config(**paper)
    return {
        **{curve: (slimgpt.Config(**paper, curve=curve), calibration) for curve in get_args(Curve)},
        "no_gcd": (slimgpt.Config(**paper, grouped_cholesky=False), calibration),
        "no_dgs": (slimgpt.Config(**paper, group_size=options.group_size), calibration),
        "split_equal": (base, calibration),
        "split_default": (slimgpt.Config(**paper | {"split": None}), calibration),
        **{f"samples_{n}": (base, Windows(n, calibration.length)) for n in options.ordering_samples},
        **{f"length_{n}": (base, Windows(calibration.count, n)) for n in options.ordering_lengths},
    }


def run(materials: Materials, options: Options) -> Result:
    """P1 perplexity of every row; equal rows are pruned once."""
    section = f"ordering_{options.head_unit}" if options.head_unit else "ordering"
    c4, wikitext = materials.c4, materials.wikitext  # says at once that they are missing
    model, figures = materials.model(), Figures()
    found: dict[Row, dict[str, Value]] = {}
    for name, row in rows(options).items():
        if row not in found:
            found[row] = _ppl(materials, model, row, name)
        figures |= {f"{section}_{name}{ending}": value for ending, value in found[row].items()}
    how = protocol(
        options,
        f"{materials.model_name} at {options.ordering_percent} %, head_unit {options.head_unit or 'by default'}",
        "split equal but in split_default, curve log_increase but in the rows named after curves",
        materials.calibration_protocol(c4, options.p1_calibration, options.num_heldout),
        f"-GCD: no_gcd; -DGS: no_dgs, {options.group_size} channels a round",
        materials.ppl_protocol(wikitext),
    )
    return Result(section, how, figures)


def _ppl(materials: Materials, model: PreTrainedModel, row: Row, name: str) -> dict[str, Value]:
    config, windows = row
    options = materials.options
    calibration = materials.calibration(materials.c4, windows, num_heldout=options.num_heldout)
    try:
        pruning = prune(model, calibration, config, options, f"{name} ({windows})")
    except PruningError as error:
        return {"": f"cannot be pruned: {error}"}
    ppl = materials.ppl(pruning.smaller(model), materials.wikitext)
    log.info("%s: ppl %.2f", name, ppl)
    return {"": ppl} | ({"_chosen": pruning.split} if pruning.split else {})
