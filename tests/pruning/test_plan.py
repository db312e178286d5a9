"""Plans: validation, shapes, composition, JSON. No model needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pruning.errors import PruningError
from pruning.plan import LayerPlan, LayerShape, PruningPlan, describe_shapes

SHAPE = LayerShape(num_heads=8, num_kv_heads=4, intermediate_size=6)
ROOT = Path(__file__).parents[2]


def layer(
    index: int = 0,
    query: tuple[int, ...] = (0, 1, 4, 5),
    kv: tuple[int, ...] = (0, 2),
    channels: tuple[int, ...] = (1, 3, 5),
) -> LayerPlan:
    return LayerPlan(layer=index, kept_query_heads=query, kept_kv_heads=kv, kept_channels=channels)


def plan(*layers: LayerPlan, source: tuple[LayerShape, ...] = (SHAPE, SHAPE, SHAPE)) -> PruningPlan:
    return PruningPlan(source=source, head_dim=4, layers=layers)


def test_full_plan_keeps_everything() -> None:
    full = PruningPlan.full((SHAPE, SHAPE), 4)
    assert full.shapes == (SHAPE, SHAPE)
    assert len(set(full.shapes)) == 1
    assert not full.dropped_layers


def test_shapes_and_dropped_layers() -> None:
    some = plan(layer(0), layer(2, query=(1, 3, 5, 7), kv=(0, 1, 2, 3), channels=()))
    assert some.dropped_layers == (1,)
    assert some.shapes == (
        LayerShape(num_heads=4, num_kv_heads=2, intermediate_size=3),
        LayerShape(num_heads=4, num_kv_heads=4, intermediate_size=0),
    )
    assert len(set(some.shapes)) > 1
    assert some.shapes[0].num_groups == 2
    assert SHAPE.kv_head_of(5) == 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"query": (0, 1, 4)}, "same number"),
        ({"kv": (0, 1, 2)}, "same number"),
        ({"query": (0, 1, 6, 7)}, r"removed kv heads \[3\]"),
        ({"query": (1, 0, 4, 5)}, "sorted and unique"),
        ({"query": (0, 0, 4, 5)}, "sorted and unique"),
        ({"query": (0, 1, 4, 9)}, "outside 0..7"),
        ({"channels": (1, 6)}, "outside 0..5"),
        ({"channels": (-1, 2)}, "outside"),
        ({"query": (), "kv": ()}, "no attention head"),
    ],
)
def test_impossible_layers_are_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        plan(layer(**bad))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValidationError, match="at least one layer"):
        plan()
    with pytest.raises(ValidationError, match="sorted and unique"):
        plan(layer(1), layer(0))
    with pytest.raises(ValidationError, match=r"outside 0\.\.2"):
        plan(layer(3))
    with pytest.raises(ValidationError, match="3 query heads cannot share 2"):
        LayerShape(num_heads=3, num_kv_heads=2, intermediate_size=1)
    with pytest.raises(ValidationError, match="Extra inputs"):
        PruningPlan.model_validate({**plan(layer()).model_dump(), "colour": "red"})


def test_compose_maps_back_to_the_source() -> None:
    first = plan(layer(0), layer(2))
    then = PruningPlan(
        source=first.shapes,
        head_dim=4,
        layers=(LayerPlan(layer=1, kept_query_heads=(1, 3), kept_kv_heads=(0, 1), kept_channels=(0, 2)),),
    )
    both = first.compose(then)
    assert both == plan(layer(2, query=(1, 5), kv=(0, 2), channels=(1, 5)))
    assert both.shapes == then.shapes
    assert first.compose(PruningPlan.full(first.shapes, 4)) == first
    assert PruningPlan.full(first.source, 4).compose(first) == first


def test_compose_refuses_a_plan_for_another_model() -> None:
    with pytest.raises(PruningError, match="the second plan is for 3 layers of 8/4 heads x 6"):
        plan(layer()).compose(plan(layer()))


def test_json_round_trip() -> None:
    some = plan(layer(0), layer(1, channels=()))
    assert PruningPlan.model_validate_json(some.model_dump_json()) == some
    assert PruningPlan.model_validate(some.model_dump()) == some


def test_describe_shapes_tells_runs_once() -> None:
    narrow = LayerShape(num_heads=1, num_kv_heads=1, intermediate_size=2)
    assert describe_shapes((SHAPE, SHAPE, narrow)) == "2 layers of 8/4 heads x 6, 1 layer of 1/1 heads x 2"


def test_plans_and_families_need_no_torch() -> None:
    code = "import sys, pruning.plan, pruning.families, pruning.recovery; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
