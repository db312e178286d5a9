"""From what a run came to, and its rows, to what the tracker takes: the run, and each checkpoint below it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from infra.artifacts.manifest import Manifest
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.provenance import git_revision, versions
from infra.results.rows import CurveRow, LayerRow, MetricRow, StageRow
from infra.tracking.records import LAYERS, TRAINING, CheckpointRecord, MetricPoint, RunContent, RunRecord
from tasks.recording.best import aliases
from tasks.recording.description import checkpoint_description, chosen_figures, run_description
from tasks.recording.images import checkpoint_images
from tasks.recording.layers import layer_figures
from tasks.recording.lineage import Lineage, inputs_of, lineage_of
from tasks.recording.outcome import Measured, RunOutcome

#: of the profile, what does not depend on where and how long it ran
_SIZES = (
    *("num_parameters", "num_decoder_parameters", "linear_macs_per_token", "macs_64_tokens"),
    *("weights_gib", "kv_cache_bytes_per_token", "checkpoint_bytes"),
)
_FILES = ("plan.json", "pruning.json", "recovery.json")


@dataclass(frozen=True)
class Rows:
    """What the results store gets of the run."""

    metrics: Sequence[MetricRow]
    layers: Sequence[LayerRow]
    curves: Sequence[CurveRow]
    pairs: str
    """Checkpoints beside each other, as JSON; "" if there are none."""


def run_record(outcome: RunOutcome, rows: Rows, store: ArtifactStore) -> RunRecord:
    """What MLflow is to hold of a run. Its metrics are those of its checkpoints, which have runs of their own."""
    model = str((outcome.spec.get("model") or {}).get("id", ""))
    refs = outcome.checkpoints | outcome.files
    lineages = {name: lineage_of(ref, store) for name, ref in refs.items()}
    params = {name: lineage.params(model) for name, lineage in lineages.items()}
    checkpoints = [
        _checkpoint(name, ref, outcome, rows, store, lineages[name], params[name]) for name, ref in refs.items()
    ]
    content = RunContent(
        name=outcome.name,
        status="failed" if outcome.failed else "completed",
        params={} if outcome.failed else _run_params(list(params.values())),
        tags={
            "slimline.kind": "run",
            **{f"stage.{stage.name}": stage.stage_key for stage in outcome.stages},
            **{f"version.{name}": version for name, version in _versions(outcome, store).items()},
        },
        artifacts=_run_texts(outcome, rows, store),
        description=run_description(str(outcome.spec.get("description") or ""), params, rows.metrics, outcome.message),
        inputs=[data for each in checkpoints for data in each.content.inputs],
        began_ms=_ms(outcome.started_at),
    )
    named = {(row.suite, row.task, row.metric): metric_name(row) for row in rows.metrics}
    columns = [named[figure] for figure in chosen_figures(rows.metrics)]
    versioned = {name: lineage for name, lineage in lineages.items() if name in outcome.checkpoints}
    best = aliases(versioned, rows.metrics, outcome.failed)
    return RunRecord(outcome.run_key, content, checkpoints, best, columns=columns)


def visit_tags(flow_run_id: str | None) -> dict[str, str]:
    """Who recorded, with which code; a record is not new because of these alone."""
    revision = git_revision()
    tags = {"prefect.flow_run_id": flow_run_id or "", "mlflow.source.name": "slimline", "mlflow.source.type": "LOCAL"}
    if revision is None:
        return tags
    dirty = revision.endswith("-dirty")
    commit = revision.removesuffix("-dirty")
    return tags | {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}


def metric_name(row: MetricRow) -> str:
    """The same in the runs of all checkpoints: `perplexity/wikitext2/ppl@2048`, `profile/decode_ms_per_token_p50`,
    `size/num_parameters`; a further point of the profile's grid is a task, `profile/b4_p128_n32/tokens_per_s`."""
    if row.suite != "profile":
        return f"{row.suite}/{row.task}/{row.metric}"
    if row.task == "profile" and row.metric in _SIZES:
        return f"size/{row.metric}"
    point = row.task.removeprefix("profile").strip().replace(" ", "_")
    return "/".join(filter(None, ("profile", point, row.metric)))


def curve_name(metric: str) -> str:
    """Of a curve in MLflow: one that names no section of its own (`search/heldout_kl`) belongs to a training."""
    return metric if "/" in metric else f"{TRAINING}/{metric}"


def _checkpoint(
    name: str,
    ref: ArtifactRef,
    outcome: RunOutcome,
    rows: Rows,
    store: ArtifactStore,
    lineage: Lineage,
    params: dict[str, str],
) -> CheckpointRecord:
    """Of a checkpoint, or of a file that was exported from one, which is no version of the registered model."""
    measured = [each for each in outcome.measured if each.checkpoint_name == name]
    metrics = [row for row in rows.metrics if row.checkpoint == name]
    began, ended = _span(ref, measured, outcome, store)
    content = RunContent(
        name=name,
        status="failed" if _unmeasured(name, outcome.stages) else "completed",
        params=params,
        metrics=list(_points(ref, metrics, rows)),
        tags={f"stage.{each.label}": each.report.key for each in measured},
        artifacts=_checkpoint_texts(ref, measured, lineage, store),
        images=checkpoint_images(name, ref.key, store.path(ref), rows.curves),
        description=checkpoint_description(name, params, metrics, ref.key),
        inputs=[
            *lineage.inputs(),
            *(data for each in measured for data in inputs_of(store.manifest(each.report), "evaluation")),
        ],
        began_ms=_ms(began),
        ended_ms=_ms(ended),
    )
    return CheckpointRecord(name, ref.key, content, store.path(ref) if ref.kind == "checkpoint" else None)


def _points(ref: ArtifactRef, metrics: Iterable[MetricRow], rows: Rows) -> Iterator[MetricPoint]:
    for row in metrics:
        yield MetricPoint(metric_name(row), row.value)
    for layer in rows.layers:
        if layer.stage_key == ref.key:
            for name, value in layer_figures(layer.sub_layer, layer.measured_error, layer.score).items():
                yield MetricPoint(f"{LAYERS}/{name}", value, layer.layer)
    for point in rows.curves:
        if point.stage_key == ref.key:
            yield MetricPoint(curve_name(point.metric), point.value, point.step)


def _run_texts(outcome: RunOutcome, rows: Rows, store: ArtifactStore) -> dict[str, str]:
    texts = {
        "spec.json": json.dumps(outcome.spec, indent=1),
        "stages.json": json.dumps([_moments(stage, store) for stage in outcome.stages], indent=1),
    }
    if rows.pairs:
        texts["paired.json"] = rows.pairs
    if leaks := {f"{each.checkpoint_name}/{each.label}": each.leaks for each in outcome.measured if each.leaks}:
        texts["leaks.json"] = json.dumps(leaks, indent=1)
    return texts


def _checkpoint_texts(
    ref: ArtifactRef, measured: Iterable[Measured], lineage: Lineage, store: ArtifactStore
) -> dict[str, str]:
    folder = store.path(ref)
    texts = {"steps.json": json.dumps(lineage.steps(), indent=1)}
    texts |= {file: (folder / file).read_text(encoding="utf-8") for file in _FILES if (folder / file).exists()}
    for each in measured:
        texts[f"reports/{each.label}.json"] = (store.path(each.report) / "report.json").read_text(encoding="utf-8")
    return texts


def _moments(stage: StageRow, store: ArtifactStore) -> dict[str, str | float | None]:
    """When the artifact of a stage was made, in this run or an earlier one."""
    known: dict[str, str | float | None] = {"name": stage.name, "key": stage.stage_key}
    ref = ArtifactRef.model_validate({"kind": stage.kind, "key": stage.stage_key})
    if not store.has(ref):
        return known | {"began_at": None, "ended_at": None, "seconds": None}
    manifest = store.manifest(ref)
    began = _began(manifest)
    return known | {
        "began_at": began.isoformat(),
        "ended_at": manifest.created_at.isoformat(),
        "seconds": manifest.seconds,
    }


def _began(manifest: Manifest) -> datetime:
    return manifest.created_at - timedelta(seconds=manifest.seconds)


def _span(
    ref: ArtifactRef, measured: Iterable[Measured], outcome: RunOutcome, store: ArtifactStore
) -> tuple[datetime, datetime]:
    """From the beginning of the first to the end of the last stage that made or measured a checkpoint: of those that
    this run ran if it ran one, else of all."""
    ran = {stage.stage_key for stage in outcome.stages if stage.status == "completed"}
    keys = [ref, *(each.report for each in measured)]
    manifests = [store.manifest(key) for key in keys if key.key in ran] or [store.manifest(key) for key in keys]
    return min(map(_began, manifests)), max(each.created_at for each in manifests)


def _unmeasured(name: str, stages: Iterable[StageRow]) -> bool:
    """Whether something that was to be measured about a checkpoint could not be."""
    return any(
        stage.kind == "report" and stage.status in ("failed", "skipped") and stage.name.endswith(f":{name}")
        for stage in stages
    )


def _run_params(params: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What the checkpoints' params say together. MLflow keeps first values: a run that failed gets them when it is
    mended, and all its checkpoints are there."""
    return {word: ", ".join(dict.fromkeys(each[word] for each in params)) for word in (params[0] if params else {})}


def _versions(outcome: RunOutcome, store: ArtifactStore) -> dict[str, str]:
    """Of what measured: several where cached figures are older than others; of this process if nothing was measured."""
    found = [store.manifest(measured.report).versions for measured in outcome.measured] or [versions()]
    names = dict.fromkeys(name for each in found for name in each)
    return {name: ", ".join(dict.fromkeys(each[name] for each in found if name in each)) for name in names}


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
