"""SlimGPT's figures 2 and 4: what pruning did to every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flows.records.figures.inputs import Recorded, amount_of, counted, labels_of, protocol_of
from flows.records.report.entries import Entry
from infra.figures.panels import Drawing, Panel, Series
from infra.results.rows import LayerRow

_SUB_LAYERS = {"attention": "attention heads", "mlp": "FFN channels"}


def output_errors(recorded: Recorded) -> Drawing | None:
    """Error of the FFN's output by layer, a line per checkpoint, on calibration and on held-out tokens."""
    entries = recorded.entries(_pruned)
    layers = recorded.layers(entries)
    measured = [entry for entry in entries if any(map(_has_error, layers.get(entry.row.checkpoint_key, ())))]
    labels = labels_of(measured)
    series = []
    for style, (key, label) in enumerate(labels.items()):
        for told, dashes, name in (
            (label, "solid", "measured_error"),
            (f"{label}, held out", "dashed", "heldout_error"),
        ):
            points = [(row.layer, getattr(row, name)) for row in layers[key] if _has_error(row)]
            points = [(layer, error) for layer, error in points if error is not None]
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(told, x, y, style, dashes, hollow=dashes == "dashed"))  # type: ignore[arg-type]
    if not series:
        return None
    notes = (
        "error: mean squared difference of down_proj's output from that of the weight as it was, on the same inputs "
        "(those that the layers before it, already pruned, give), divided by the mean squared output; over the "
        "calibration tokens, and dashed over calibration windows that are held out; what errors of earlier layers add "
        "up to is not in it",
        *counted(
            len(entries) - len(measured),
            "without a measured error: {} more checkpoints (of methods that do not look at outputs)",
        ),
        *protocol_of(measured),
    )
    panel = Panel("", "layer", "lost share of the mean squared FFN output", tuple(series), y_log=True, whole_x=True,
                  height=3.0)  # fmt: skip
    return Drawing("Error of the FFN output, layer by layer", ((panel,),), notes)


def sparsities(recorded: Recorded) -> Drawing | None:
    """Share of heads and channels that is gone by layer, a line per checkpoint, a row of panels per sparsity."""
    entries = recorded.entries(_pruned)
    layers = recorded.layers(entries)
    uneven = [entry for entry in entries if not _is_depth(layers.get(entry.row.checkpoint_key, ()))]
    stems = _stems(uneven, labels_of(uneven))
    styles = {stem: style for style, stem in enumerate(dict.fromkeys(stems.values()))}
    groups: dict[str, list[Entry]] = {}
    for entry in sorted(uneven, key=lambda entry: entry.row.total_sparsity or math.inf):
        groups.setdefault(amount_of(entry), []).append(entry)
    rows = tuple(
        tuple(_sparsity_panel(group, sub_layer, layers, stems, styles, amount) for sub_layer in _SUB_LAYERS)
        for amount, group in groups.items()
    )
    if not rows:
        return None
    notes = (
        "removed: by the step that made the checkpoint, of what the layer had before it",
        *counted(
            len(entries) - len(uneven),
            "left out: {} more checkpoints that lost whole layers, or of which no layers are recorded",
        ),
        *protocol_of(uneven),
    )
    return Drawing("How much of every layer is removed", rows, notes)


def _sparsity_panel(
    group: Sequence[Entry],
    sub_layer: str,
    layers: Mapping[str, Sequence[LayerRow]],
    stems: Mapping[str, str],
    styles: Mapping[str, int],
    amount: str,
) -> Panel:
    series = []
    for entry in group:
        key = entry.row.checkpoint_key
        rows = [row for row in layers[key] if row.sub_layer == sub_layer]
        x, y = tuple(float(row.layer) for row in rows), tuple(100 * row.sparsity for row in rows)
        series.append(Series(stems[key], x, y, styles[stems[key]]))
    title = f"{_SUB_LAYERS[sub_layer]}, {amount} asked" if amount else _SUB_LAYERS[sub_layer]
    return Panel(title, "layer", f"removed {_SUB_LAYERS[sub_layer].split()[1]} (%)", tuple(series), whole_x=True)


def _stems(entries: Sequence[Entry], labels: Mapping[str, str]) -> dict[str, str]:
    """By checkpoint key its name without the sparsity, which the panel has; no two of a panel are called the same."""
    stems, taken = {}, set()
    for entry in entries:
        key = entry.row.checkpoint_key
        stem = labels[key].replace(f"-{100 * (entry.row.total_sparsity or 0):g}", "") or labels[key]
        stems[key] = labels[key] if (stem, amount_of(entry)) in taken else stem
        taken.add((stem, amount_of(entry)))
    return stems


def _pruned(entry: Entry) -> bool:
    return entry.row.action == "prune"


def _has_error(row: LayerRow) -> bool:
    return row.sub_layer == "mlp" and row.kept < row.total and row.measured_error is not None


def _is_depth(rows: Sequence[LayerRow]) -> bool:
    return all(row.kept in (0, row.total) for row in rows)
