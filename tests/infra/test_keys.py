from __future__ import annotations

import json
import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from infra.errors import NotCanonical
from infra.keys import canonical_json, stage_key
from tests.infra.processes import finish, start


class Inner(BaseModel):
    words: tuple[str, ...] = ("b", "a")
    share: float = 1


class Outer(BaseModel):
    method: Literal["slimgpt"] = "slimgpt"
    inner: Inner = Inner()
    limit: int | None = None


INPUTS: dict[str, object] = {"seed": 1, "spec": Outer(), "ratio": 0.1, "flag": True, "none": None, "unicode": "naïve ☃"}


def test_form() -> None:
    assert canonical_json({"b": [1, 2.0, None], "a": (True, "x")}) == '{"a":[true,"x"],"b":[1,2.0,null]}'
    assert canonical_json(Outer()) == '{"inner":{"share":1.0,"words":["b","a"]},"limit":null,"method":"slimgpt"}'
    assert canonical_json({"x": "☃"}) == '{"x":"\\u2603"}'
    assert json.loads(canonical_json(INPUTS))["unicode"] == "naïve ☃"


def test_key_form() -> None:
    assert re.fullmatch(r"prune-slimgpt-v2-[0-9a-f]{16}", stage_key("prune-slimgpt", 2, INPUTS))
    assert stage_key("prune-llm_pruner", 1, {}).startswith("prune-llm-pruner-v1-")


def test_the_key_of_these_inputs_never_changes() -> None:
    # A change here throws away every artifact of every user.
    assert stage_key("x", 1, {"a": 1, "b": [0.1, "c"]}) == "x-v1-bf5a5fae1762a2b6"


@pytest.mark.parametrize("label", ["", "Prune", "a--b", "-a", "a/b", "a b"])
def test_labels_of_ours_are_checked(label: str) -> None:
    with pytest.raises(AssertionError):
        stage_key(label, 1, {})


def test_equal_in_processes_with_different_hash_seeds() -> None:
    code = (
        "from tests.infra.test_keys import INPUTS\n"
        "from infra.keys import stage_key\n"
        "print(stage_key('prune-slimgpt', 2, INPUTS), hash('slimgpt'))"
    )
    children = [start(code, PYTHONHASHSEED=seed) for seed in ("1", "2")]
    (first, hash_1), (second, hash_2) = (finish(child).split() for child in children)
    assert hash_1 != hash_2
    assert first == second == stage_key("prune-slimgpt", 2, INPUTS)


def test_order_of_fields_and_kind_of_sequence_do_not_count() -> None:
    assert stage_key("a", 1, {"x": [1, 2], "y": 2}) == stage_key("a", 1, {"y": 2, "x": (1, 2)})


def test_minus_zero_is_zero() -> None:
    assert canonical_json(-0.0) == canonical_json(0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (0, None), ("1", 1), (0.1, 0.10000000000000002), ([1, 2], [2, 1]), ({}, [])],
)
def test_values_that_differ_have_different_texts(one: object, other: object) -> None:
    assert canonical_json(one) != canonical_json(other)


def test_a_float_field_makes_one_and_one_point_nought_the_same() -> None:
    assert canonical_json(Inner(share=1)) == canonical_json(Inner(share=1.0))


@pytest.mark.parametrize("field", ["seed", "ratio", "flag", "none", "unicode"])
def test_every_field_changes_the_key(field: str) -> None:
    assert stage_key("a", 1, INPUTS) != stage_key("a", 1, INPUTS | {field: "changed"})


def test_every_nested_field_changes_the_key() -> None:
    for changed in (Outer(limit=1), Outer(inner=Inner(share=0.5)), Outer(inner=Inner(words=("a", "b")))):
        assert stage_key("a", 1, INPUTS) != stage_key("a", 1, INPUTS | {"spec": changed})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_only_finite_numbers(number: float) -> None:
    class Config(BaseModel):
        share: float

    with pytest.raises(NotCanonical, match=r"value\.spec\.share is (nan|-?inf)"):
        canonical_json({"spec": Config(share=number)})
    with pytest.raises(NotCanonical, match=r"value\[1\]"):
        canonical_json([0.0, number])


def test_sets_and_paths_are_refused_also_inside_models() -> None:
    class Config(BaseModel):
        words: frozenset[str] | None = None
        folder: Path | None = None

    with pytest.raises(NotCanonical, match=r"value\.words is a set.*sorted list"):
        canonical_json(Config(words=frozenset({"a"})))
    with pytest.raises(NotCanonical, match=r"value\[0\]\.folder is the path '/models/x'.*fingerprint"):
        canonical_json([Config(folder=Path("/models/x"))])
    with pytest.raises(NotCanonical, match="is a set"):
        canonical_json({"a": {1, 2}})
    with pytest.raises(NotCanonical, match="is the path"):
        canonical_json(Path("x"))


def test_what_has_no_json_form_is_named() -> None:
    with pytest.raises(NotCanonical, match=r"value\.a is a object"):
        canonical_json({"a": object()})
    with pytest.raises(NotCanonical, match="has the key 1"):
        canonical_json({1: "a"})
    with pytest.raises(NotCanonical, match="is a bytes"):
        canonical_json(b"a")


def test_enumerations_and_numpy_numbers_are_their_values() -> None:
    numpy = pytest.importorskip("numpy")

    class Colour(StrEnum):
        RED = "red"

    assert canonical_json([Colour.RED, numpy.float64(0.25)]) == '["red",0.25]'
