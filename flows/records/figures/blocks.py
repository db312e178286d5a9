"""In which order depth pruning lets layers go, and what each was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.errors import SpecError
from flows.records.figures.inputs import Recorded, amount_of, counted, protocol_of
from flows.records.report.entries import Entry
from infra.artifacts.store import ArtifactRef
from infra.errors import ArtifactMissing
from infra.figures.panels import Drawing, Panel, Series, in_rows
from infra.results.rows import LayerRow
from pruning.orders import Order

_METHOD = "shortened"
#: by criterion: what its score is
_SCORES = {
    "ppl": "loss without the block (nats per token)",
    "taylor": "sum of |weight x gradient| of the block",
    "magnitude": "sum of |weight| of the block",
    "influence": "block influence (1 - cosine of input and output)",
}


def importance(recorded: Recorded) -> Drawing | None:
    """A panel per ranking: the score of each block that may go, its place in the order, and which checkpoints lost it.

    Raises SpecError if the rankings are gone from the artifact store.
    """
    entries = recorded.entries(lambda entry: entry.row.plugin == _METHOD)
    layers = recorded.layers(entries)
    rankings: dict[str, tuple[Any, Order, list[Entry]]] = {}
    gone = []
    for entry in entries:
        ref = ArtifactRef(kind="checkpoint", key=entry.row.checkpoint_key)
        try:
            request = recorded.artifacts.manifest(ref).request
            orders = ArtifactRef.model_validate(request["orders"])
            known = rankings.get(orders.key) or (request["config"], _order(recorded, orders), [])
        except ArtifactMissing:
            gone.append(entry)
            continue
        known[2].append(entry)
        rankings[orders.key] = known
    if gone and not rankings:
        raise SpecError(
            f"the rankings of {', '.join(dict.fromkeys(entry.row.checkpoint for entry in gone))} are not in the "
            f"artifact store any more; what makes them again: slimline retry {next(iter(gone[0].runs.values()))}"
        )
    if not rankings:
        return None
    panels = [_panel(config, order, group, layers) for config, order, group in rankings.values()]
    notes = (
        "numbers: the place in the order in which blocks go, 1 first; a block without is protected or goes never; "
        "scores that are measured anew hold at the time when the block went",
        *counted(len(gone), "left out: {} checkpoints whose folders are not in the artifact store any more"),
        *protocol_of([entry for _, _, group in rankings.values() for entry in group]),
    )
    return Drawing("Importance of blocks for depth pruning", in_rows(panels, 2), notes)


def _order(recorded: Recorded, ref: ArtifactRef) -> Order:
    (file,) = recorded.artifacts.path(ref).glob("*layer.json")  # of whole layers or of sub-layers
    return Order.model_validate_json(file.read_bytes())


def _panel(config: dict[str, Any], order: Order, group: Sequence[Entry], layers: dict[str, list[LayerRow]]) -> Panel:
    apart = config["unit"] == "sub_layer"
    amounts: dict[int, str] = {}
    for entry in group:
        count = _dropped(layers.get(entry.row.checkpoint_key, ()), apart)
        amounts.setdefault(count, amount_of(entry))
    places = [
        (block / 2 if apart else float(block), score) for block, score in zip(order.order, order.scores, strict=True)
    ]
    series, done = [], 0
    for style, count in enumerate(sorted(amounts)):
        series.append(_series(f"removed at {amounts[count]}", places, done, count, style))
        done = max(done, count)
    series.append(_series("not removed", places, done, len(places), None))
    when = "measured anew after each removal" if config["iterative"] else "measured once"
    title = config["criterion"] if config["criterion"] == "magnitude" else f"{config['criterion']}, {when}"
    protected = [f"{word} {config[key]}" for word, key in (("first", "protect_first"), ("last", "protect_last"))
                 if config[key]]  # fmt: skip
    title += f", {' and '.join(protected)} protected" if protected else ""
    x_label = "layer (its MLP a half further)" if apart else "layer"
    return Panel(title, x_label, _SCORES[config["criterion"]], tuple(each for each in series if each.x), whole_x=True)


def _series(label: str, places: Sequence[tuple[float, float]], start: int, end: int, style: int | None) -> Series:
    x, y = tuple(place for place, _ in places[start:end]), tuple(score for _, score in places[start:end])
    names = tuple(str(place + 1) for place in range(start, end))
    return Series(label, x, y, style, "none", hollow=style is None, names=names)


def _dropped(rows: Sequence[LayerRow], apart: bool) -> int:
    """How many blocks a checkpoint lost: sub-layers, or layers."""
    empty = [row.layer for row in rows if row.kept == 0 and row.total]
    return len(empty) if apart else sum(empty.count(layer) == 2 for layer in set(empty))
