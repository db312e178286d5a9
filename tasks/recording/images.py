"""What the images of a checkpoint show: what its plan keeps, and how its training went. flows draws the same panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from infra.figures.panels import Dashes, Drawing, HeatMap, Panel, Series
from infra.results.rows import CurveRow
from pruning.plan import LayerPlan, PruningPlan

#: by the metric of a curve that is a loss: its words, its style and its line
LOSSES: Mapping[str, tuple[str, int, Dashes]] = {
    "train_loss": ("training loss", 0, "solid"),
    "heldout_loss": ("held-out loss", 1, "dashed"),
    "watched_loss": ("loss on the watched text", 2, "dotted"),
}
#: cells of a row of channels
_BINS = 64
#: of longer curves only the line is drawn
_MARKED = 40


class Image:
    """A PNG that is drawn once, when somebody first asks for it. words: what it shows. drawn: the bytes, if it was.
    source: the file that says all of what it shows, if one does."""

    def __init__(self, words: str, draw: Callable[[], bytes], source: Path | None = None) -> None:
        self.words = words
        self.source = source
        self.drawn: bytes | None = None
        self._draw = draw

    def __call__(self) -> bytes:
        """The bytes; raises what drawing raises."""
        if self.drawn is None:
            self.drawn = self._draw()
        return self.drawn


def checkpoint_images(name: str, key: str, folder: Path, curves: Iterable[CurveRow]) -> dict[str, Image]:
    """Images by their paths in the run of a checkpoint; nothing is read before one is drawn but which files there are.
    folder: of the checkpoint, with its plan if anything was pruned."""
    images: dict[str, Image] = {}
    if (plan := folder / "plan.json").exists():
        words = f"heads and channels kept in {name}"
        images["figures/kept.png"] = Image(words, partial(_kept, name, key, folder), plan)
    mine = [point for point in curves if point.stage_key == key and point.metric in LOSSES]
    if mine:
        images["figures/training.png"] = Image(f"losses of {name}", partial(_training, name, key, mine))
    return images


def drawn_once(images: Iterable[Image]) -> Iterator[tuple[str, bytes]]:
    """Words and bytes of those that were drawn, without a second one of the same: a recovered checkpoint keeps the
    plan of the one before it."""
    seen: set[str | bytes] = set()
    for image in images:
        shows = image.words if image.source is None else image.source.read_bytes()
        if image.drawn is not None and shows not in seen:
            seen.add(shows)
            yield image.words, image.drawn


def kept_panels(name: str, plan: PruningPlan) -> tuple[Panel, Panel]:
    """Every query head, and the FFN channels in cells of neighbours: the darker, the more of them are kept."""
    by_layer = {kept.layer: kept for kept in plan.layers}
    layers = [(index, shape, by_layer.get(index)) for index, shape in enumerate(plan.source)]
    num_heads = max(shape.num_heads for shape in plan.source)
    num_channels = max(shape.num_channels for shape in plan.source)
    width = max(1, math.ceil(num_channels / _BINS))
    heads = [_shares(_heads(kept), shape.num_heads, 1, num_heads) for _, shape, kept in layers]
    channels = [_shares(_channels(kept), shape.num_channels, width, num_channels) for _, shape, kept in layers]
    rows = tuple(str(index) for index, _, _ in layers)
    height = 1.0 + max(1.0, 0.075 * len(rows))
    head_ends = tuple(f"{len(_heads(kept))}/{shape.num_heads}" for _, shape, kept in layers)
    channel_ends = tuple(f"{len(_channels(kept))}/{shape.num_channels}" for _, shape, kept in layers)
    unit = "share that is kept"
    return (
        Panel(f"{name}: attention heads", "query head", "layer", heat=HeatMap(tuple(heads), rows, unit, head_ends),
              x_ticks=_ticks(num_heads, 1), height=height),
        Panel(f"{name}: FFN channels", f"channel (a cell is {width} neighbours)" if width > 1 else "channel", "layer",
              heat=HeatMap(tuple(channels), rows, unit, channel_ends), x_ticks=_ticks(num_channels, width),
              height=height),
    )  # fmt: skip


def loss_panel(title: str, points: Iterable[CurveRow]) -> Panel:
    """The losses of one training by optimizer step; other curves are left out."""
    curves: dict[str, list[CurveRow]] = {}
    for point in points:
        curves.setdefault(point.metric, []).append(point)
    series = []
    for metric, (label, style, dashes) in LOSSES.items():
        found = sorted(curves.get(metric, ()), key=lambda point: point.step)
        if found:
            x, y = tuple(float(point.step) for point in found), tuple(point.value for point in found)
            marked = len(found) <= _MARKED
            series.append(Series(label, x, y, style, dashes, hollow=dashes != "solid", markers=marked))
    return Panel(title, "optimizer step", "loss (nats per token)", tuple(series), whole_x=True)


def read_plan(folder: Path) -> PruningPlan:
    """What the checkpoint in a folder keeps of the dense model."""
    return PruningPlan.model_validate_json((folder / "plan.json").read_bytes())


def _kept(name: str, key: str, folder: Path) -> bytes:
    from infra.figures.draw import draw

    title = "Kept heads and channels, counted in the dense model"
    return draw(Drawing(title, (kept_panels(name, read_plan(folder)),), (f"checkpoint: {key}",)), "png")


def _training(name: str, key: str, points: Sequence[CurveRow]) -> bytes:
    from infra.figures.draw import draw

    return draw(Drawing("Loss while tuning", ((loss_panel(name, points),),), (f"checkpoint: {key}",)), "png")


def _heads(kept: LayerPlan | None) -> tuple[int, ...]:
    return kept.kept_query_heads if kept else ()


def _channels(kept: LayerPlan | None) -> tuple[int, ...]:
    return kept.kept_channels if kept else ()


def _shares(kept: Sequence[int], total: int, width: int, widest: int) -> tuple[float, ...]:
    """Of each cell of so many neighbours the share that is kept, NaN beyond the last one that the layer has."""
    present, here = [0] * math.ceil(widest / width), set(kept)
    for index in here:
        present[index // width] += 1
    sizes = [min(width, total - cell * width) for cell in range(len(present))]
    return tuple(count / size if size > 0 else math.nan for count, size in zip(present, sizes, strict=True))


def _ticks(count: int, width: int) -> tuple[tuple[float, str], ...]:
    """At most about eight, at numbers that are round."""
    step = next(step for step in (1, 2, 4, 8, 16, *(2**power for power in range(5, 40))) if count / step <= 9)
    return tuple((index / width - (0.5 if width > 1 else 0), str(index)) for index in range(0, count, step))
