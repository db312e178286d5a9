"""Stage: a checkpoint made smaller by a pruning method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.interrupts import something_to_save
from tasks.requests import PruneRequest
from tasks.stage import Bench, stage

if TYPE_CHECKING:
    from pruning.sequential import WalkOptions
    from tasks.progress import Progress


@dataclass(frozen=True)
class _Job:
    """What each process of a pruning does; the leader writes."""

    request: PruneRequest
    source: Path
    calibration: Path
    statistics: Path | None
    orders: Path | None
    out: Path
    work: Path

    def __call__(self, options: WalkOptions, progress: Progress) -> None:
        from pruning.calibration import CalibrationSet
        from pruning.streaming import prune_checkpoint

        pruned = prune_checkpoint(
            self.source,
            self.out,
            self.request.module,
            CalibrationSet.load(self.calibration),
            self.request.typed_config,
            statistics=self.statistics,
            orders=self.orders,
            options=options,
            work=self.work,
            progress=progress,
        )
        if options.team.leads:
            report = pruned.model_dump_json(indent=1, exclude={"plan"})
            (self.out / "pruning.json").write_text(report, encoding="utf-8")


def fill(request: PruneRequest, bench: Bench) -> None:
    """Write the smaller checkpoint, its plan and pruning.json (what each layer paid); interrupted, it goes on."""
    from infra.models import hand_on_tokenizer
    from tasks.walking import run_walk

    store = bench.store
    source = store.path(request.checkpoint)
    calibration = store.path(request.calibration)
    statistics, orders = (store.path(ref) if ref else None for ref in (request.statistics, request.orders))
    job = _Job(request, source, calibration, statistics, orders, bench.folder, store.scratch(bench.ref))
    with something_to_save():
        run_walk(bench, job)
    hand_on_tokenizer(source, bench.folder)


prune = stage(
    "prune",
    fill,
    devices="team",
    imports=("pruning.streaming", "pruning.splits", "transformers.models.auto.tokenization_auto"),
)
