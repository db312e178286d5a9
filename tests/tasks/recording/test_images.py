"""The images of a checkpoint: drawn when they are asked for, and of what is there only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from infra.figures.panels import HeatMap
from infra.results.rows import CurveRow
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from tasks.recording.images import Image, checkpoint_images, drawn_once, kept_panels, loss_panel


def plan(num_layers: int = 3, heads: int = 4, channels: int = 8) -> PruningPlan:
    """Keeps all of the even layers but one channel, half of the heads of the odd ones, and drops the last."""
    shape = LayerShape(num_heads=heads, num_kv_heads=heads, intermediate_size=channels)
    layers = [LayerPlan.full(index, shape) for index in range(num_layers - 1)]
    half = {"kept_query_heads": tuple(range(0, heads, 2)), "kept_kv_heads": tuple(range(0, heads, 2))}
    layers = [kept.model_copy(update=half if kept.layer % 2 else {"kept_channels": tuple(range(1, channels))})
              for kept in layers]  # fmt: skip
    return PruningPlan(source=(shape,) * num_layers, head_dim=2, layers=tuple(layers))


def point(metric: str, step: int, value: float, key: str = "recover-lora-v2-0") -> CurveRow:
    return CurveRow(run_key="r", stage_key=key, metric=metric, step=step, value=value)


def heat_of(panels: tuple[object, ...], index: int) -> HeatMap:
    heat = panels[index].heat  # type: ignore[attr-defined]
    assert isinstance(heat, HeatMap)
    return heat


def test_a_plan_is_a_row_per_layer_of_the_dense_model() -> None:
    panels = kept_panels("p", plan())
    assert heat_of(panels, 0).values == ((1.0,) * 4, (1.0, 0.0, 1.0, 0.0), (0.0,) * 4)
    assert heat_of(panels, 0).ends == ("4/4", "2/4", "0/4")
    assert heat_of(panels, 1).values == ((0.0, *(1.0,) * 7), (1.0,) * 8, (0.0,) * 8)
    wide = heat_of(kept_panels("p", plan(channels=100)), 1)
    assert {len(row) for row in wide.values} == {50}
    assert wide.values[0][0] == 0.5


def test_layers_of_other_widths_end_earlier() -> None:
    small = LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=3)
    large = LayerShape(num_heads=4, num_kv_heads=4, intermediate_size=5)
    panels = kept_panels("p", PruningPlan.full((small, large), 2))
    assert [[math.isnan(value) for value in row] for row in heat_of(panels, 0).values] == [
        [False, False, True, True],
        [False] * 4,
    ]


def test_losses_are_told_apart_by_their_lines() -> None:
    points = [point("train_loss", 2, 1.0), point("train_loss", 1, 2.0), point("heldout_loss", 0, math.nan),
              point("watched_loss", 0, 3.0), point("grad_norm", 1, 9.0)]  # fmt: skip
    panel = loss_panel("t", points)
    assert [(series.label, series.x, series.dashes) for series in panel.series] == [
        ("training loss", (1.0, 2.0), "solid"),
        ("held-out loss", (0.0,), "dashed"),
        ("loss on the watched text", (0.0,), "dotted"),
    ]


def test_images_of_what_there_is(tmp_path: Path) -> None:
    assert checkpoint_images("dense", "key", tmp_path, [point("train_loss", 1, 2.0)]) == {}
    (tmp_path / "plan.json").write_text(plan(30, 8, 64).model_dump_json(), encoding="utf-8")
    images = checkpoint_images("a <b> $x$", "recover-lora-v2-0", tmp_path, [point("train_loss", 1, 2.0)])
    assert list(images) == ["figures/kept.png", "figures/training.png"]
    for draw in images.values():
        assert draw.drawn is None
        assert draw().startswith(b"\x89PNG")
        assert draw() is draw.drawn, "it is drawn once"
    (tmp_path / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="source"):
        checkpoint_images("a", "key", tmp_path, [])["figures/kept.png"]()


def test_one_plan_is_shown_once(tmp_path: Path) -> None:
    images = []
    for name, content in {"pruned": "a plan", "pruned+lora": "a plan", "other": "another"}.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        images += [Image(f"kept in {name}", name.encode, path), Image(f"losses of {name}", b"losses".strip)]
    assert list(drawn_once(images)) == []
    for image in images:
        image()
    assert [words for words, _ in drawn_once(images)] == [
        "kept in pruned",
        "losses of pruned",
        "losses of pruned+lora",
        "kept in other",
        "losses of other",
    ]
