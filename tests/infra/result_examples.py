"""Rows for the tests of the results store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from infra.results.lineage import Made, checkpoint_rows
from infra.results.rows import (
    CheckpointRow,
    CurveRow,
    LayerRow,
    MetricRow,
    NightCellRow,
    NightFigureRow,
    NightRow,
    PairRow,
    RunRow,
    StageRow,
)

NOON = datetime(2025, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)


def run_row(key: str = "r1", **changes: object) -> RunRow:
    fields: dict[str, object] = {
        "run_key": key,
        "name": "demo",
        "spec": '{"model":  {"id": "x"}}',
        "status": "completed",
        "started_at": NOON,
        "finished_at": NOON + timedelta(minutes=1),
        "slimline_version": "0.1",
    }
    return RunRow.model_validate(fields | changes)


def stage_row(key: str = "r1", name: str = "prune") -> StageRow:
    return StageRow(run_key=key, name=name, stage_key=f"{name}-v1-0", kind="prune", status="cached")


def metric_row(key: str = "r1", task: str = "piqa", value: float = 0.5) -> MetricRow:
    return MetricRow(run_key=key, checkpoint="dense", checkpoint_key="c", stage_key="s", suite="zero_shot", task=task,
                     metric="acc", value=value, stderr=0.01, num_fewshot=0, protocol='{"limit": null}')  # fmt: skip


def pruned(sparsity: float = 0.2, **options: object) -> Made:
    """A pruning of the dense checkpoint by slimgpt."""
    name = str(options.pop("name", f"slimgpt-{100 * sparsity:g}"))
    return Made(name, "dense", "prune", "slimgpt", {"sparsity": sparsity, **options}, sparsity)


def repaired(source: Made) -> Made:
    return Made(f"{source.name}+lora", source.name, "recover", "lora", {"epochs": 1.0})


def checkpoints(key: str, *made: Made, model: str = "tiny") -> tuple[CheckpointRow, ...]:
    """The rows of a run; keys follow from the names alone."""
    keys = {name: f"key-{name}" for name in ("dense", *(each.name for each in made))}
    return checkpoint_rows(key, {"id": model, "dtype": "float32"}, made, keys)


def measured(key: str, checkpoint: str, name: str, value: float, **changes: object) -> MetricRow:
    """name: "suite/task/metric"."""
    suite, task, metric = name.split("/")
    fields: dict[str, object] = {
        "run_key": key, "checkpoint": checkpoint, "checkpoint_key": f"key-{checkpoint}", "stage_key": "s",
        "suite": suite, "task": task, "metric": metric, "value": value, "protocol": "{}",
        "higher_is_better": not metric.startswith("ppl"),
    }  # fmt: skip
    return MetricRow.model_validate(fields | changes)


def layer_row(key: str = "r1", layer: int = 0) -> LayerRow:
    return LayerRow(run_key=key, stage_key="s", layer=layer, sub_layer="mlp", kept=3, total=4, sparsity=0.25)


def curve_row(key: str = "r1", step: int = 1, value: float = 2.5) -> CurveRow:
    return CurveRow(run_key=key, stage_key="s", metric="train_loss", step=step, value=value)


def pair_row(key: str = "r1", task: str = "piqa") -> PairRow:
    return PairRow(run_key=key, checkpoint="slimgpt-20", reference="dense", suite="zero_shot", task=task, metric="acc",
                   value=0.4, reference_value=0.5, difference=-0.1, low=-0.2, high=0.0, p_value=0.05, test="mcnemar",
                   num_items=100, flips_lost=20, flips_gained=10, higher_is_better=True, stage_key="s",
                   reference_stage_key="d")  # fmt: skip


def night_row(night_id: str = "n1", **changes: object) -> NightRow:
    fields: dict[str, object] = {
        "night_id": night_id,
        "name": "small",
        "spec": "{}",
        "status": "completed",
        "gates_passed": True,
        "started_at": NOON,
        "finished_at": NOON + timedelta(hours=1),
        "slimline_version": "0.1",
        "num_stages": 3,
        "num_run": 1,
        "num_cached": 2,
        "num_failed": 0,
    }
    return NightRow.model_validate(fields | changes)


def cell_row(night_id: str = "n1", cell: str = "tiny/slimgpt-20") -> NightCellRow:
    return NightCellRow(night_id=night_id, cell=cell, run_key="r1", status="completed", seconds=1.5, num_run=1,
                        num_cached=2, num_failed=0, num_skipped=0)  # fmt: skip


def figure_row(night_id: str = "n1", task: str = "piqa") -> NightFigureRow:
    return NightFigureRow(night_id=night_id, cell="tiny/slimgpt-20", checkpoint="dense", suite="zero_shot", task=task,
                          metric="acc", value=0.5, stage_key="s", before_value=0.4, p_value=0.3, verdict="noise",
                          gate="passed", higher_is_better=True)  # fmt: skip
