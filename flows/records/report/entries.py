"""The recorded checkpoints with their figures, each once, however many runs have it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flows.records.lookup import find_run
from infra.results.rows import CheckpointRow, MetricRow
from infra.results.store import ResultsStore

R = TypeVar("R", MetricRow, CheckpointRow)


@dataclass(frozen=True)
class Entry:
    """One checkpoint. options: its whole configuration by path, as in CheckpointRow. reached: the share of the dense
    decoder's parameters that is gone, None if the sizes are not known. runs: names of those that have it, by
    key, newest first."""

    row: CheckpointRow
    options: Mapping[str, Any]
    reached: float | None
    metrics: tuple[MetricRow, ...]
    runs: Mapping[str, str]

    @property
    def steps(self) -> str:
        """E.g. "slimgpt lora"."""
        return " ".join(self.plugins().values())

    def plugins(self) -> dict[int, str]:
        """The method or recovery of each step."""
        named = {
            name: path.split(".") for path, name in self.options.items() if path.endswith((".method", ".recovery"))
        }
        return {int(place[1]): name for name, place in named.items() if place[0] == "steps" and len(place) == 3}


def read_entries(store: ResultsStore, condition: str, names: Sequence[str] = ()) -> tuple[Entry, ...]:
    """The checkpoints of the newest run of every spec, or of these runs (names or keys), with those of their metrics
    for which the SQL `condition` holds. Raises SpecError for a run that is not there."""
    if names:
        keys = [find_run(store, name).run_key for name in names]
    else:
        answer = store.select("SELECT run_key FROM newest_runs ORDER BY finished_at DESC, run_key")
        keys = [key for (key,) in answer.rows]
    figures: dict[tuple[str, str], list[MetricRow]] = {}
    for row in _rows(store, MetricRow, f"SELECT {{}} FROM metrics WHERE list_contains(?, run_key) AND ({condition}) "
                     "ORDER BY rowid", keys):  # fmt: skip
        figures.setdefault((row.run_key, row.checkpoint), []).append(row)
    checkpoints = _rows(
        store, CheckpointRow, "SELECT {} FROM checkpoints WHERE list_contains(?, run_key) ORDER BY "
        "list_position(?, run_key), rowid", keys, keys,
    )  # fmt: skip
    reached = _reached(store, keys)
    runs = dict(store.select("SELECT run_key, name FROM runs").rows)
    alike: dict[str, list[CheckpointRow]] = {}
    for checkpoint in checkpoints:
        alike.setdefault(checkpoint.checkpoint_key, []).append(checkpoint)
    return tuple(
        Entry(
            row=rows[0],
            options=json.loads(rows[0].config),
            reached=next(
                (share for row in rows if (share := reached.get((row.run_key, row.checkpoint))) is not None), None
            ),
            metrics=tuple(metric for row in rows for metric in figures.get((row.run_key, row.checkpoint), ())),
            runs={row.run_key: runs[row.run_key] for row in rows},
        )
        for rows in alike.values()
    )


def _rows(store: ResultsStore, row: type[R], question: str, *values: object) -> Iterable[R]:
    names = list(row.model_fields)
    for found in store.select(question.format(", ".join(names)), values).rows:
        yield row.model_validate(dict(zip(names, found, strict=True)))


def _reached(store: ResultsStore, keys: Sequence[str]) -> dict[tuple[str, str], float]:
    found = store.select(
        "SELECT run_key, checkpoint, 1 - num_decoder_parameters / max(num_decoder_parameters) FILTER "
        "(checkpoint = 'dense') OVER (PARTITION BY run_key) FROM sizes WHERE list_contains(?, run_key)",
        (list(keys),),
    )
    return {(key, checkpoint): share for key, checkpoint, share in found.rows if share is not None}
