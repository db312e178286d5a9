"""The one stage that is never cached: what a run found, written to DuckDB and MLflow, twice as good as once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from evaluation.profile.report import read_profile
from evaluation.report import EvalReport, Metric
from infra.artifacts.manifest import Manifest
from infra.errors import SourceInvalid, TrackingUnusable
from infra.keys import slug
from infra.models.card import parameters_of_folder
from infra.provenance import git_revision, versions
from infra.results.lineage import checkpoint_rows
from infra.results.rows import CheckpointRow, CurveRow, LayerRow, MetricRow, RunRow
from infra.results.store import ResultsStore
from infra.secrets import secrets_kept
from infra.tracking.pages import address_of_run
from infra.tracking.tracker import Tracker
from tasks.execution.context import RunContext
from tasks.recording.description import run_page
from tasks.recording.images import Image, drawn_once
from tasks.recording.layers import relative
from tasks.recording.outcome import Measured, RunOutcome
from tasks.recording.run_record import Rows, run_record, visit_tags
from tasks.stages.pairs import as_json, beside_dense

#: what can change a figure; Prefect, MLflow and DuckDB only carry it
_MEASURING = frozenset({"python", "torch", "transformers", "lm-eval", "datasets", "slimline"})

log = logging.getLogger("slimline")


@task(name="record", task_run_name="record", cache_policy=NO_CACHE, persist_result=False)
def record(outcome: RunOutcome, run_context: RunContext) -> tuple[MetricRow, ...]:
    """Write the run; returns its metric rows. A run recorded again replaces its rows and continues its MLflow run.

    Raises ResultsUnusable, and TrackingUnusable after the rows are written.
    """
    with secrets_kept():
        return _record(outcome, run_context)


def _record(outcome: RunOutcome, run_context: RunContext) -> tuple[MetricRow, ...]:
    metrics = tuple(_metric_rows(outcome, run_context))
    layers = tuple(_layer_rows(outcome, run_context))
    curves = tuple(_curve_rows(outcome, run_context))
    checkpoints = tuple(_checkpoint_rows(outcome, run_context))
    pairs = beside_dense(metrics, run_context.store)
    rows = Rows(metrics, layers, curves, as_json(pairs) if pairs else "")
    told = run_record(outcome, rows, run_context.store)
    tracker = Tracker(run_context.settings.tracking_uri)
    mlflow_run_id, problem = tracked(lambda: tracker.record(told, visit_tags(flow_run_id())))
    run = RunRow(
        run_key=outcome.run_key,
        name=outcome.name,
        spec=json.dumps(outcome.spec),
        status="failed" if outcome.failed else "completed",
        started_at=outcome.started_at,
        finished_at=datetime.now(UTC),
        prefect_run_id=flow_run_id(),
        mlflow_run_id=mlflow_run_id,
        slimline_version=versions().get("slimline", "unknown"),
        git_revision=git_revision(),
        message=outcome.message,
    )
    ResultsStore.of(run_context.settings).record(run, outcome.stages, metrics, layers, pairs, curves, checkpoints)
    folders = {name: run_context.store.path(ref) for name, ref in outcome.checkpoints.items()}
    address = address_of_run(run_context.settings.tracking_uri, mlflow_run_id) if mlflow_run_id else None
    file = ResultsStore.of(run_context.settings).export_file(outcome.run_key)
    images = [each for made in told.checkpoints for each in made.content.images.values() if isinstance(each, Image)]
    # those that this recording drew: of a run recorded again MLflow has them, and drawing takes longer than the rest
    page = run_page(told.content.description, outcome.run_key, folders, file, address, drawn_once(images))
    _show(outcome, page)
    if problem:
        raise problem
    return metrics


def _show(outcome: RunOutcome, page: str) -> None:
    """Show the page in Prefect. Everything is recorded by then: a server that is gone must not take that back."""
    if TaskRunContext.get() is None:
        return
    try:
        key = f"slimline-run-{slug(outcome.name)}"
        create_markdown_artifact(page, key=key, description=f"{outcome.name}: {outcome.run_key}")
    except Exception as error:  # of its client, of its answer
        log.debug("%s: its page could not be given to Prefect's server: %s", outcome.name, error)


def tracked(write: Callable[[], str]) -> tuple[str | None, TrackingUnusable | None]:
    """The id of the MLflow run that `write` made, or why there is none: what was measured is recorded all the same."""
    try:
        return write(), None
    except TrackingUnusable as error:
        return None, error


def _metric_rows(outcome: RunOutcome, run_context: RunContext) -> Iterator[MetricRow]:
    for measured in outcome.measured:
        metrics, protocol = _read_report(run_context.store.path(measured.report), measured.suite)
        protocol |= _made_with(run_context.store.manifest(measured.report))
        protocol |= {"leaks": measured.leaks} if measured.leaks else {}
        for metric in metrics:
            values = metric.model_dump(include=set(MetricRow.model_fields) & set(Metric.model_fields))
            yield MetricRow(
                run_key=outcome.run_key,
                checkpoint=measured.checkpoint_name,
                checkpoint_key=measured.checkpoint.key,
                stage_key=measured.report.key,
                suite=measured.label,
                protocol=json.dumps(protocol | _of_vocabulary(measured, metric)),
                **values,
            )


def _of_vocabulary(measured: Measured, metric: Metric) -> dict[str, str]:
    """For the protocol of a figure per token: whose tokens, if not the dense model's. Nothing but figures of the same
    vocabulary may be compared with it."""
    return {"vocabulary": measured.vocabulary} if measured.vocabulary and metric.metric.startswith("ppl@") else {}


def _made_with(manifest: Manifest) -> dict[str, Any]:
    """For the protocol: the versions when it was measured, which may be long ago, and what the data sets held."""
    versions = {name: version for name, version in manifest.versions.items() if name in _MEASURING}
    identities = manifest.request.get("sources")
    return {"versions": versions} | ({"data_identity": identities} if identities else {})


def _read_report(folder: Path, suite: str) -> tuple[tuple[Metric, ...], dict[str, Any]]:
    text = (folder / "report.json").read_text(encoding="utf-8")
    if suite != "profile":
        report = EvalReport.model_validate_json(text)
        return report.metrics, dict(report.protocol)
    profile = read_profile(text)
    return profile.metrics(), dict(profile.conditions())


def _layer_rows(outcome: RunOutcome, run_context: RunContext) -> Iterator[LayerRow]:
    for ref in dict.fromkeys(outcome.checkpoints.values()):
        path = run_context.store.path(ref) / "pruning.json"
        for layer in json.loads(path.read_text(encoding="utf-8"))["layers"] if path.exists() else ():
            energy = layer["output_energy"]
            yield LayerRow(
                run_key=outcome.run_key,
                stage_key=ref.key,
                layer=layer["layer"],
                sub_layer=layer["sub_layer"],
                kept=layer["kept"],
                total=layer["total"],
                sparsity=1 - layer["kept"] / layer["total"] if layer["total"] else 0.0,  # it had gone before
                predicted_error=relative(layer["predicted_error"], energy),
                measured_error=relative(layer["measured_error"], energy),
                heldout_error=relative(layer["heldout_error"], energy),
                score=layer.get("score"),
                condition=layer["condition"],
                seconds=layer["seconds"],
                num_tokens=layer["num_tokens"],
            )


def _curve_rows(outcome: RunOutcome, run_context: RunContext) -> Iterator[CurveRow]:
    for ref in dict.fromkeys(outcome.checkpoints.values()):
        folder = run_context.store.path(ref)
        for path in filter(Path.exists, (folder / "pruning.json", folder / "recovery.json")):
            curves = json.loads(path.read_text(encoding="utf-8")).get("curves") or {}
            for metric, points in curves.items():
                for step, value in points:
                    # NaN and infinity are words in JSON, or null
                    number = math.nan if value is None else float(value)
                    yield CurveRow(run_key=outcome.run_key, stage_key=ref.key, metric=metric, step=step, value=number)


def _checkpoint_rows(outcome: RunOutcome, run_context: RunContext) -> Iterator[CheckpointRow]:
    keys = {name: ref.key for name, ref in outcome.checkpoints.items()}
    for row in checkpoint_rows(outcome.run_key, outcome.spec.get("model") or {}, outcome.lineage, keys):
        total = decoder = None
        with suppress(SourceInvalid):
            total, decoder = parameters_of_folder(run_context.store.path(outcome.checkpoints[row.checkpoint]))
        yield row.model_copy(update={"num_parameters": total, "num_decoder_parameters": decoder})


def flow_run_id() -> str | None:
    """Of the flow run that the running task belongs to."""
    context = TaskRunContext.get()
    return str(context.task_run.flow_run_id) if context and context.task_run.flow_run_id else None
