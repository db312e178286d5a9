"""Stage: one suite on one checkpoint or exported file, so that a failed suite is run again alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from evaluation.inference.options import EvalOptions
from evaluation.suite import TextNeed
from infra.errors import SourceMissing
from infra.sources.find import Sources, TextData
from tasks.devices.model_cache import cached_replicas, load_cached
from tasks.devices.placement import device_names
from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import EvaluateRequest
from tasks.stages.pairs import SAMPLES_FILE

if TYPE_CHECKING:
    from evaluation.inference.replicas import ReplicaProcesses
    from evaluation.suite import SuiteResult

MISSING = "missing"
"""The key of a source identity that stands for a data set that could not be found."""


class SuiteSources:
    """The data interface that suites ask for, answered by the run's sources."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def texts(self, need: TextNeed) -> list[str]:
        """One text per row."""
        return self._sources.texts(TextData(**need.model_dump()))

    def folder(self, repo_id: str) -> Path | None:
        """Local folder of a data set, or None for the hub."""
        return self._sources.folder(repo_id)

    def check(self, repo_id: str, excerpt: Path, config: str | None, splits: Sequence[str]) -> None:
        """Raise SourceUnreadable, naming the file, for local data that cannot be read."""
        self._sources.check_tables(repo_id, excerpt, config, splits)


def check_local_data(request: EvaluateRequest, sources: Sources) -> None:
    """Look at the local data of lm-eval's tasks, as far as the beginnings of the files tell.

    Raises EvaluationError for a missing configuration or split, SourceUnreadable naming the file that is damaged.
    """
    if not hasattr(request.module, "definitions"):
        return
    repo_ids = {need.repo_id for need in request.module.needs(request.typed_config)}
    if all(sources.find(repo_id, "dataset").folder is None for repo_id in repo_ids):
        return  # the hub's, which is whole
    from evaluation.harness.overlays import write_overlays  # imports datasets

    config = request.typed_config
    with TemporaryDirectory(prefix="slimline-look-") as scratch:
        tasks, num_fewshot = request.module.definitions(config), getattr(config, "num_fewshot", 0)
        write_overlays(Path(scratch), tasks, SuiteSources(sources), num_fewshot=num_fewshot)


def fill(request: EvaluateRequest, context: StageContext) -> None:
    """Write report.json and samples.parquet."""
    from evaluation.samples import write_samples
    from infra.models.import_model import load_tokenizer

    _require(request, context.run_context.sources)
    refs = [ref for ref in (request.measured, request.reference) if ref is not None]
    tokenizer = load_tokenizer(context.store.path(request.checkpoint))
    model, *reference = load_cached(refs, context.store, context.place)
    settings = context.run_context.settings
    with _replicas(request, context) as replicas:
        result: SuiteResult = request.module.evaluate(
            model,
            tokenizer,
            SuiteSources(context.run_context.sources),
            request.typed_config,
            EvalOptions(
                batch_size=None if settings.eval_batch_size == "auto" else settings.eval_batch_size,
                progress=context.progress,
                replicas=replicas,
            ),
            **({"reference": reference[0]} if reference else {}),
        )
    write_samples(result.samples, context.folder / SAMPLES_FILE)
    (context.folder / "report.json").write_text(result.report.model_dump_json(indent=1), encoding="utf-8")


def _require(request: EvaluateRequest, sources: Sources) -> None:
    """Raise SourceMissing for data that was not there when the run began, before a model is loaded."""
    for identity in request.sources:
        if MISSING in identity:
            sources.find(identity[MISSING], "dataset")
            raise SourceMissing(
                f"the data set {identity[MISSING]} was missing when the run began and is there now; "
                "the same command measures with it"
            )


def _replicas(request: EvaluateRequest, context: StageContext) -> AbstractContextManager[ReplicaProcesses | None]:
    """Further processes with copies of the model, if the settings ask for them."""
    settings = context.run_context.settings
    if settings.eval_processes == 1 or request.reference is not None or request.export is not None:
        return nullcontext()
    names = device_names(settings.device)
    loads: list[dict[str, Any]] = [{"device": names[i % len(names)]} for i in range(1, settings.eval_processes)]
    return cached_replicas(request.checkpoint, context.store, context.place, loads)


def _imports(request: EvaluateRequest) -> tuple[str, ...]:
    return (
        "datasets",
        "pruning.checkpoints.save_load",
        "pruning.modeling.modeling_slimline",
        "transformers.models.auto.tokenization_auto",
        *(("gguf", "pruning.checkpoints.llama_cpp") if request.export else ()),
        *request.module.IMPORTS,
    )


evaluate = stage("evaluate", fill, devices="evaluation", imports=_imports)
