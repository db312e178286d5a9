"""How the checkpoints of a run were made, as rows: from the steps that led to each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from infra.results.rows import DENSE, CheckpointRow


@dataclass(frozen=True)
class Made:
    """One checkpoint, made from `source` by the method or recovery `plugin`.

    `options`: of the plug-in, as they stand in YAML; a step that reads calibration windows has theirs under
    "calibration". `sparsity`: the share of the decoder that it was asked to remove, None if it was not asked for one.
    `of_layers`: whether a pruning removes anything of the decoder; one of the vocabulary does not.
    """

    name: str
    source: str
    action: Literal["prune", "recover"]
    plugin: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    variant: str = ""
    of_layers: bool = True


def checkpoint_rows(
    run_key: str, model: Mapping[str, Any], made: Sequence[Made], keys: Mapping[str, str]
) -> tuple[CheckpointRow, ...]:
    """A row for each checkpoint that has a key, each after its source. `made` is in that order and without the dense
    one, `model` is the spec's."""
    ways: dict[str, tuple[Made, ...]] = {DENSE: ()}
    for each in made:
        ways[each.name] = (*ways[each.source], each)
    return tuple(_row(run_key, model, ways[name], keys) for name in ways if name in keys)


def _row(run_key: str, model: Mapping[str, Any], way: Sequence[Made], keys: Mapping[str, str]) -> CheckpointRow:
    last = way[-1] if way else None
    name, source = (last.name, last.source) if last else (DENSE, None)
    return CheckpointRow(
        run_key=run_key,
        checkpoint=name,
        checkpoint_key=keys[name],
        source=source,
        source_key=keys.get(source) if source else None,
        action=last.action if last else "import",
        plugin=last.plugin if last else None,
        variant=(last.variant or None) if last else None,
        sparsity=last.sparsity if last else None,
        total_sparsity=_total([each.sparsity for each in way if each.action == "prune" and each.of_layers]),
        model=str(model.get("id", "")),
        method=_names(way, "prune"),
        recovery=_names(way, "recover"),
        config=json.dumps(_flat(model, way)),
    )


def _names(way: Sequence[Made], action: str) -> str | None:
    return "+".join(each.plugin for each in way if each.action == action) or None


def _total(sparsities: Sequence[float | None]) -> float | None:
    """Each step counts by what the steps before it left."""
    given = [sparsity for sparsity in sparsities if sparsity is not None]
    if not given or len(given) < len(sparsities):
        return None
    return round(1 - prod(1 - sparsity for sparsity in given), 12)


def _flat(model: Mapping[str, Any], way: Sequence[Made]) -> dict[str, Any]:
    """Every option by its path; a data set is one value, though it has parts."""
    flat = {f"model.{key}": value for key, value in model.items()}
    for index, each in enumerate(way):
        place = f"steps.{index}"
        flat[f"{place}.{'method' if each.action == 'prune' else 'recovery'}"] = each.plugin
        for key, value in each.options.items():
            inner = value if key == "calibration" and isinstance(value, Mapping) else None
            parts = {f"{key}.{name}": part for name, part in inner.items()} if inner is not None else {key: value}
            flat |= {f"{place}.{path}": part for path, part in parts.items()}
    return flat
