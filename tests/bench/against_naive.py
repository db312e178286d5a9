"""Part `naive`: the same pruning by the naive schedule; the same answer is demanded, and its time compared."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.methods import slimgpt
from pruning.plan import PruningPlan
from tests.bench.materials import Materials
from tests.bench.naive import Naive, Removal, prune_naive_
from tests.bench.options import Options
from tests.bench.report import Figures, Result, protocol
from tests.bench.resident import Pruning, prune
from tests.bench.timing import bar, seconds

#: sparsity in percent -> end of its keys
ENDINGS = {20: "", 50: "_50"}


def run(materials: Materials, options: Options) -> Result:
    """At 20 % and 50 %: ours, naive, ours, all with the split that ours chose by default."""
    texts, windows = materials.tokens_only, options.naive_tokens
    model, heldout = materials.model(), options.num_heldout
    calibration = materials.calibration(texts, windows, num_heldout=heldout)
    figures: Figures = {}
    for percent, ending in ENDINGS.items():
        figures |= {f"naive_{name}{ending}": value for name, value in _compare(materials, model, calibration, percent)}
    how = protocol(
        options,
        materials.model_name,
        materials.calibration_protocol(texts, windows, heldout),
        "split chosen by slimgpt with its defaults (untimed), then ours, naive, ours with that split and without the "
        "held-out windows; ours is the mean of the two; naive: three forwards per layer, full x xᵀ, one full inversion "
        "per round in float64, the same budgets and group sizes",
        materials.ppl_protocol(materials.comparison),
    )
    return Result("naive", how, figures)


def differences(plan: PruningPlan, naive: Naive) -> int:
    """Query heads and channels that one of the two keeps and the other removes (equal numbers on both sides)."""
    ours = {(layer.layer, "attention"): layer.kept_query_heads for layer in plan.layers}
    ours |= {(layer.layer, "mlp"): layer.kept_channels for layer in plan.layers}
    assert ours.keys() == naive.kept.keys()
    return sum(len(set(kept) - set(naive.kept[place])) for place, kept in ours.items())


def removals(plan: PruningPlan) -> list[Removal]:
    """The budgets that a plan spent."""
    return [
        Removal(
            kv_groups=before.num_kv_heads - after.num_kv_heads,
            query_heads=before.num_heads - after.num_heads if after.num_groups < before.num_groups else 0,
            channels=before.intermediate_size - after.intermediate_size,
        )
        for before, after in zip(plan.source, plan.shapes, strict=True)
    ]


def _compare(
    materials: Materials, model: PreTrainedModel, calibration: CalibrationSet, percent: int
) -> list[tuple[str, str | int | float]]:
    options = materials.options
    chosen = prune(
        model, calibration, slimgpt.Config(sparsity=percent / 100), options, f"choose a split at {percent} %"
    )
    by_query_head = any(removal.query_heads for removal in removals(chosen.pruned.plan))
    unit = "query_head" if by_query_head else "kv_group"
    config = slimgpt.Config(sparsity=percent / 100, split=chosen.split or "equal", head_unit=unit)
    ids_NL = calibration.input_ids_NL
    seen = replace(calibration, heldout_ids_ML=calibration.heldout_ids_ML[:0])

    def timed_ours() -> Pruning:
        return prune(model, seen, config, options, f"ours at {percent} %, split {config.split}")

    ours = [timed_ours()]
    assert ours[0].pruned.plan.shapes == chosen.pruned.plan.shapes, f"the default split is not {config.split}"
    masked = materials.model().to(options.device)
    with bar(f"naive at {percent} %") as progress:
        naive, took = seconds(
            lambda: prune_naive_(
                masked,
                ids_NL,
                removals(ours[0].pruned.plan),
                dampening_frac=config.dampening_frac,
                batch_size=options.batch_size,
                progress=progress,
            ),
            options.device,
        )
    ours.append(timed_ours())
    ours_seconds = mean(pruning.seconds for pruning in ours)
    ours_ppl = materials.ppl(ours[0].smaller(model), materials.comparison)
    naive_ppl = materials.ppl(masked, materials.comparison)
    return [
        ("over_ours", took / ours_seconds),
        ("kept_differences", differences(ours[0].pruned.plan, naive)),
        ("ppl_difference", naive_ppl / ours_ppl - 1),
        ("seconds", took),
        ("ours_seconds", ours_seconds),
        ("ppl", naive_ppl),
        ("ours_ppl", ours_ppl),
        ("split", config.split or ""),
        ("head_unit", unit),
        ("inversions", naive.inversions),
    ]
