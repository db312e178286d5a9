"""Stage: one suite on one checkpoint, so that a failed suite is run again alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from infra.sources import Sources, TextData
from tasks.requests import EvaluateRequest
from tasks.stage import Bench, stage

if TYPE_CHECKING:
    from evaluation.report import EvalReport


class SuiteSources:
    """The data interface that suites ask for, answered by the run's sources."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def texts(self, dataset: str, *, config: str | None, split: str, text_field: str) -> list[str]:
        """One text per row."""
        return self._sources.texts(TextData(dataset=dataset, config=config, split=split, text_field=text_field))

    def folder(self, repo_id: str) -> Path | None:
        """Local folder of a data set, or None for the hub."""
        return self._sources.folder(repo_id)


def fill(request: EvaluateRequest, bench: Bench) -> None:
    """Write report.json."""
    from infra.models import load_tokenizer
    from pruning.checkpoint import load_checkpoint

    folder = bench.store.path(request.checkpoint)
    report: EvalReport = request.module.evaluate(
        load_checkpoint(folder, **bench.place.load),
        load_tokenizer(folder),
        SuiteSources(bench.workplace.sources),
        request.typed_config,
        batch_size=bench.workplace.settings.eval_batch_size,
        progress=bench.progress,
    )
    (bench.folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


evaluate = stage(
    "evaluate",
    fill,
    devices="one",
    imports=(
        "datasets",
        "evaluation.perplexity",
        "evaluation.harness",
        "pruning.checkpoint",
        "transformers.models.auto.tokenization_auto",
    ),
)
