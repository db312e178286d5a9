"""The checkpoints of a page, each once, however many runs have it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.results.store import ResultsStore

#: of layer halves; a page with more leaves the plans out
MOST_LAYERS = 200_000


@dataclass(frozen=True)
class Checkpoint:
    """A row of the view `leaderboard`, of the newest run that has the checkpoint. runs: the keys of all, newest first.

    sparsity: the share of the dense decoder that the steps were asked to remove; removed: what is gone.
    """

    key: str
    name: str
    spec: str
    run_key: str
    model: str
    method: str | None
    recovery: str | None
    variant: str | None
    sparsity: float | None
    removed: float | None
    num_parameters: int | None
    zero_shot_mean: float | None
    zero_shot_tasks: int
    finished_at: datetime
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """How a checkpoint was made. seconds: of its step, total_seconds: of all steps on the way; None if not known."""

    source_key: str | None
    action: str
    plugin: str | None
    seconds: float | None
    total_seconds: float | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is kept of the layers: (kept, total) heads and channels of each, None where nothing was recorded."""

    heads: tuple[tuple[int, int] | None, ...]
    channels: tuple[tuple[int, int] | None, ...]


def read_checkpoints(results: ResultsStore, keys: Sequence[str]) -> tuple[Checkpoint, ...]:
    """All checkpoints of these runs, which are named newest first."""
    found = _select(
        results,
        "SELECT checkpoint_key AS key, checkpoint AS name, spec, run_key, model, method, recovery, variant, "
        "sparsity_asked, sparsity, num_parameters, zero_shot_avg, zero_shot_tasks, finished_at "
        "FROM leaderboard_of(?) ORDER BY model, list_position(?, run_key)",
        list(keys),
        list(keys),
    )
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        alike.setdefault(row["key"], []).append(row)
    return tuple(_checkpoint(rows) for rows in alike.values())


def _checkpoint(rows: Sequence[Mapping[str, Any]]) -> Checkpoint:
    newest = rows[0]

    def first(name: str) -> Any:
        return next((row[name] for row in rows if row[name] is not None), None)

    return Checkpoint(
        **{name: newest[name] for name in ("key", "name", "spec", "run_key", "model", "method", "recovery", "variant")},
        sparsity=newest["sparsity_asked"],
        removed=first("sparsity"),
        num_parameters=first("num_parameters"),
        zero_shot_mean=first("zero_shot_avg"),
        zero_shot_tasks=max(row["zero_shot_tasks"] or 0 for row in rows),
        finished_at=newest["finished_at"],
        runs=tuple(dict.fromkeys(row["run_key"] for row in rows)),
    )


def read_ways(results: ResultsStore, keys: Sequence[str]) -> dict[str, Way]:
    """How the checkpoints of these runs were made, by key; from the view `lineage`."""
    found = _select(
        results,
        "SELECT checkpoint_key, source_key, action, plugin, seconds, total_seconds, config FROM lineage "
        "WHERE list_contains(?, run_key) ORDER BY list_position(?, run_key)",
        list(keys),
        list(keys),
    )
    ways: dict[str, Way] = {}
    for row in found:
        key = row.pop("checkpoint_key")
        known = ways.get(key)
        if known is None or (known.total_seconds is None and row["total_seconds"] is not None):
            options = {path: value for path, value in json.loads(row.pop("config")).items() if value is not None}
            ways[key] = Way(**row, options=options)
    return ways


def read_plans(results: ResultsStore, keys: Sequence[str], ways: Mapping[str, Way]) -> dict[str, Plan] | None:
    """What is kept of each pruned checkpoint, and of what was recovered from it; None if the page would be too large.

    Heads are counted as the method prunes them: kv heads where whole groups go.
    """
    ((count,),) = results.select("SELECT count(*) FROM layers WHERE list_contains(?, run_key)", (list(keys),)).rows
    if count > MOST_LAYERS:
        return None
    halves: dict[str, dict[str, dict[int, tuple[int, int]]]] = {}
    for row in _select(
        results,
        "SELECT DISTINCT stage_key, sub_layer, layer, kept, total FROM layers WHERE list_contains(?, run_key)",
        list(keys),
    ):
        half = halves.setdefault(row["stage_key"], {}).setdefault(row["sub_layer"], {})
        half[row["layer"]] = (row["kept"], row["total"])
    recorded = {key: Plan(_in_order(each, "attention"), _in_order(each, "mlp")) for key, each in halves.items()}
    return {key: plan for key in ways if (plan := recorded.get(_pruned(key, ways))) is not None}


def _pruned(key: str, ways: Mapping[str, Way]) -> str:
    """The checkpoint that has the same layers: recoveries leave them as they are."""
    while (way := ways.get(key)) is not None and way.action == "recover" and way.source_key is not None:
        key = way.source_key
    return key


def _in_order(
    halves: Mapping[str, Mapping[int, tuple[int, int]]], sub_layer: str
) -> tuple[tuple[int, int] | None, ...]:
    half = halves.get(sub_layer, {})
    return tuple(half.get(layer) for layer in range(1 + max(half, default=-1)))


def _select(results: ResultsStore, question: str, *values: object) -> Iterable[dict[str, Any]]:
    answer = results.select(question, values)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
