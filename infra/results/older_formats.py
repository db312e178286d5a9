"""What files of older formats lack, made from what they have. Nothing is written: a file stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

from infra.results.lineage import Made, checkpoint_rows
from infra.results.rows import DENSE, MetricRow, Row, RunRow, StageRow

_OF_STEP = frozenset({"method", "recovery", "name", "variants"})
#: stages that make a checkpoint: "prune:<checkpoint>", "recover:<checkpoint>"
_MAKING = ("prune", "recover")


def with_checkpoints(rows: Mapping[str, tuple[Row, ...]]) -> dict[str, tuple[Row, ...]]:
    """The rows of a run of format 5 or before, whose checkpoints follow from its spec, stages and metrics."""
    run = cast(RunRow, rows["runs"][0])
    spec = json.loads(run.spec)
    if not isinstance(spec, dict):
        return dict(rows)
    keys = _keys(cast("tuple[StageRow, ...]", rows["stages"]), cast("tuple[MetricRow, ...]", rows["metrics"]))
    try:
        found = checkpoint_rows(run.run_key, spec.get("model") or {}, made_by(spec), keys)
    except (AttributeError, LookupError, TypeError, ValueError):
        return dict(rows)  # the spec of a test or of a slimline before the first release
    return {**rows, "checkpoints": found}


def made_by(spec: Mapping[str, Any]) -> list[Made]:
    """The checkpoints of a spec's full JSON, as flows/spec/branches.py names them."""
    return list(_grow(spec, list(spec.get("steps") or ()), DENSE, (), None))


def _grow(
    spec: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], source: str, branch: tuple[str, ...], last: Made | None
) -> Iterator[Made]:
    """last: the pruning that led to `source`, whose calibration windows a recovery may train on."""
    if not steps:
        return
    step, *later = steps
    for labels, made in _choices(spec, step, source, branch, last):
        yield made
        yield from _grow(spec, later, made.name, labels, made if made.action == "prune" else last)


def _choices(
    spec: Mapping[str, Any], step: Mapping[str, Any], source: str, branch: tuple[str, ...], last: Made | None
) -> Iterator[tuple[tuple[str, ...], Made]]:
    own = {key: value for key, value in step.items() if key not in _OF_STEP}
    if "recovery" in step:
        name = "-".join([step["name"], *branch]) if step.get("name") else f"{source}+{step['recovery']}"
        yield branch, Made(name, source, "recover", step["recovery"], own, variant=last.variant if last else "")
        return
    for variant, changes in (step.get("variants") or {"": {}}).items():
        options = {
            **own,
            **changes,
            "calibration": {**(spec.get("calibration") or {}), **changes.get("calibration", {})},
        }
        asked = options.get("sparsity")
        values = asked if isinstance(asked, list) else [asked]
        for value in values:
            amount = f"{100 * value:g}" if value is not None else f"{options.get('layers')}-layers"
            labels = ([variant] if variant else []) + ([amount] if len(values) > 1 else [])
            short = "-".join(labels) if variant else f"{step['method']}-{amount}"
            name = f"{source}+{short}" if branch else short
            if step.get("name"):
                name = "-".join([step["name"], *branch, *labels])
            changed = {**options, "sparsity": value}
            yield (*branch, *labels), Made(name, source, "prune", step["method"], changed, value, variant)


def _keys(stages: Sequence[StageRow], metrics: Sequence[MetricRow]) -> dict[str, str]:
    """The key of each checkpoint that is known to have been finished."""
    done = [stage for stage in stages if stage.status in ("completed", "cached")]
    made = ((stage.name.partition(":"), stage.stage_key) for stage in done)
    by_stage = {place[2]: key for place, key in made if place[0] in _MAKING and place[2]}
    imported = ((DENSE, stage.stage_key) for stage in done if stage.name == "import-model")
    measured = ((row.checkpoint, row.checkpoint_key) for row in metrics)
    return dict(chain(imported, by_stage.items(), measured))
