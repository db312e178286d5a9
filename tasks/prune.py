"""Stage: a checkpoint made smaller by a pruning method."""

from __future__ import annotations

from tasks.requests import PruneRequest
from tasks.stage import Bench, stage


def fill(request: PruneRequest, bench: Bench) -> None:
    """Write the smaller checkpoint, its plan and pruning.json (what each layer paid)."""
    from infra.models import load_tokenizer
    from pruning.calibration import CalibrationSet
    from pruning.checkpoint import load_checkpoint, load_plan, save_checkpoint
    from pruning.surgery import shrink_
    from tasks.walking import walk_options

    source = bench.store.path(request.checkpoint)
    model = load_checkpoint(source)
    pruned = request.module.prune(
        model,
        CalibrationSet.load(bench.store.path(request.calibration)),
        request.typed_config,
        statistics=bench.store.path(request.statistics) if request.statistics else None,
        options=walk_options(bench),
        progress=bench.progress,
    )
    shrink_(model, pruned.plan)
    before = load_plan(source)
    plan = pruned.plan if before is None else before.compose(pruned.plan)
    save_checkpoint(model, load_tokenizer(source), bench.folder, plan)
    (bench.folder / "pruning.json").write_text(pruned.model_dump_json(indent=1, exclude={"plan"}), encoding="utf-8")


prune = stage(
    "prune",
    fill,
    devices="one",
    imports=("pruning.checkpoint", "pruning.splits", "transformers.models.auto.tokenization_auto"),
)
