"""The one stage that is never cached: what a run found, written to DuckDB and MLflow, twice as good as once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from pydantic import BaseModel, ConfigDict

from evaluation.profile.report import ProfileReport
from evaluation.report import EvalReport, Metric
from infra.artifacts.manifest import Manifest
from infra.artifacts.store import ArtifactRef
from infra.errors import SourceInvalid, TrackingUnusable
from infra.models.card import parameters_of_folder
from infra.provenance import git_revision, versions
from infra.results.lineage import Made, checkpoint_rows
from infra.results.rows import CheckpointRow, CurveRow, LayerRow, MetricRow, PairRow, RunRow, StageRow
from infra.results.store import ResultsStore
from infra.secrets import secrets_kept
from infra.tracking.records import MetricPoint
from infra.tracking.tracker import Tracker
from tasks.execution.context import RunContext
from tasks.stages.pairs import as_json, beside_dense

#: what can change a figure; Prefect, MLflow and DuckDB only carry it
_MEASURING = frozenset({"python", "torch", "transformers", "lm-eval", "datasets", "slimline"})


class Measured(BaseModel):
    """A finished report stage: what it measured (`suite`) about which checkpoint. leaks: a sentence for each training
    of the checkpoint on what is measured."""

    model_config = ConfigDict(frozen=True)

    report: ArtifactRef
    suite: str
    label: str
    checkpoint_name: str
    checkpoint: ArtifactRef
    leaks: tuple[str, ...] = ()


class RunOutcome(BaseModel):
    """All that there is to record about a run. `checkpoints`: the finished ones; `lineage`: how they are made."""

    model_config = ConfigDict(frozen=True)

    run_key: str
    name: str
    spec: dict[str, Any]
    started_at: datetime
    stages: tuple[StageRow, ...]
    checkpoints: dict[str, ArtifactRef]
    lineage: tuple[Made, ...] = ()
    measured: tuple[Measured, ...]
    failed: bool
    message: str | None


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
    mlflow_run_id, problem = tracked(lambda: _track(outcome, run_context, metrics, layers, pairs, curves))
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
    if problem:
        raise problem
    return metrics


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
                protocol=json.dumps(protocol),
                **values,
            )


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
    profile = ProfileReport.model_validate_json(text)
    return profile.metrics(), dict(profile.conditions())


def _layer_rows(outcome: RunOutcome, run_context: RunContext) -> Iterator[LayerRow]:
    for ref in dict.fromkeys(outcome.checkpoints.values()):
        path = run_context.store.path(ref) / "pruning.json"
        for layer in json.loads(path.read_text(encoding="utf-8"))["layers"] if path.exists() else ():
            energy = layer["output_energy"] or 1.0
            yield LayerRow(
                run_key=outcome.run_key,
                stage_key=ref.key,
                layer=layer["layer"],
                sub_layer=layer["sub_layer"],
                kept=layer["kept"],
                total=layer["total"],
                sparsity=1 - layer["kept"] / layer["total"],
                predicted_error=_relative(layer["predicted_error"], energy),
                measured_error=_relative(layer["measured_error"], energy),
                heldout_error=_relative(layer["heldout_error"], energy),
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


def _relative(error: float | None, energy: float) -> float | None:
    return None if error is None else error / energy


def _track(
    outcome: RunOutcome,
    run_context: RunContext,
    metrics: tuple[MetricRow, ...],
    layers: tuple[LayerRow, ...],
    pairs: tuple[PairRow, ...],
    curves: tuple[CurveRow, ...],
) -> str:
    folders = {name: run_context.store.path(ref) for name, ref in outcome.checkpoints.items()}
    points = [MetricPoint(f"{row.checkpoint}/{row.suite}/{row.task}/{row.metric}", row.value) for row in metrics]
    for name, ref in outcome.checkpoints.items():
        for row in layers:
            if row.stage_key == ref.key and row.measured_error is not None:
                points.append(MetricPoint(f"{name}/{row.sub_layer}_error", row.measured_error, row.layer))
            if row.stage_key == ref.key and row.score is not None:
                points.append(MetricPoint(f"{name}/{row.sub_layer}_score", row.score, row.layer))
        points += [
            MetricPoint(f"{name}/{row.metric}", row.value, row.step) for row in curves if row.stage_key == ref.key
        ]
    artifacts = {"spec.json": json.dumps(outcome.spec, indent=1)}
    if pairs:
        artifacts["paired.json"] = as_json(pairs)
    if leaks := {f"{each.checkpoint_name}/{each.label}": each.leaks for each in outcome.measured if each.leaks}:
        artifacts["leaks.json"] = json.dumps(leaks, indent=1)
    for name, folder in folders.items():
        for file in ("plan.json", "pruning.json", "recovery.json"):
            if (folder / file).exists():
                artifacts[f"{name}/{file}"] = (folder / file).read_text(encoding="utf-8")
    for measured in outcome.measured:
        text = (run_context.store.path(measured.report) / "report.json").read_text(encoding="utf-8")
        artifacts[f"{measured.checkpoint_name}/{measured.label}.json"] = text
    return Tracker(run_context.settings.tracking_uri).record(
        run_key=outcome.run_key,
        name=outcome.name,
        params=flat(outcome.spec),
        metrics=points,
        tags={
            **{f"stage.{stage.name}": stage.stage_key for stage in outcome.stages},
            **{f"version.{name}": version for name, version in _versions(outcome, run_context).items()},
        },
        artifacts=artifacts,
        checkpoints=folders,
        status="failed" if outcome.failed else "completed",
        visit_tags={"prefect.flow_run_id": flow_run_id() or ""},
    )


def _versions(outcome: RunOutcome, run_context: RunContext) -> dict[str, str]:
    """Of what measured: several where cached figures are older than others; of this process if nothing was measured."""
    found = [run_context.store.manifest(measured.report).versions for measured in outcome.measured] or [versions()]
    names = dict.fromkeys(name for each in found for name in each)
    return {name: ", ".join(dict.fromkeys(each[name] for each in found if name in each)) for name in names}


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """A nested spec as MLflow params: "steps.0.sparsity" -> "0.2"."""
    if isinstance(value, dict):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), inner) for index, inner in enumerate(value)]
    else:
        return {prefix: str(value)}
    params: dict[str, str] = {}
    for key, inner in items:
        params |= flat(inner, f"{prefix}.{key}" if prefix else key)
    return params


def flow_run_id() -> str | None:
    """Of the flow run that the running task belongs to."""
    context = TaskRunContext.get()
    return str(context.task_run.flow_run_id) if context and context.task_run.flow_run_id else None
