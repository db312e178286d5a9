"""Slices that surely lie apart, and all others, checked against what `datasets` makes of them."""

from __future__ import annotations

import pytest
from datasets import ReadInstruction

from infra.overlap.splits import Part, parts_of


def part(split: str) -> Part:
    (only,) = parts_of(split)
    return only


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train[:50%]", "train[50%:]"),
        ("train[:10%]", "train[80%:90%]"),
        ("train[:50%]", "train[-50%:]"),
        ("train[:100]", "train[100:]"),
        ("train[5:10]", "train[10:20]"),
        ("train[:-100]", "train[-100:]"),
        ("train[:10%](pct1_dropremainder)", "train[10%:](pct1_dropremainder)"),
    ],
)
@pytest.mark.parametrize("num_rows", [101, 1000, 12_345])
def test_slices_that_lie_apart(one: str, other: str, num_rows: int) -> None:
    assert part(one).apart_from(part(other))
    assert part(other).apart_from(part(one))
    rows = [set(range(num_rows)[slice(i.from_, i.to)]) for i in map(absolute(num_rows), (one, other))]
    assert rows[0].isdisjoint(rows[1])


def absolute(num_rows: int):  # type: ignore[no-untyped-def]
    return lambda split: ReadInstruction.from_spec(split).to_absolute({"train": num_rows})[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train", "train"),
        ("train[:50%]", "train"),
        ("train[:51%]", "train[50%:]"),
        ("train[:101]", "train[100:]"),
        ("train[:100]", "train[-100:]"),  # of 150 rows they share 50
        ("train[:10%]", "train[100:]"),
        ("train[50%:]", "train[90%:]"),
        ("train[what:ever]", "train[90%:]"),
    ],
)
def test_slices_that_may_have_rows_in_common(one: str, other: str) -> None:
    assert not part(one).apart_from(part(other))
    assert not part(other).apart_from(part(one))


def test_joined_splits_come_apart() -> None:
    assert [each.name for each in parts_of("train[:10%] + test+validation[5:]")] == ["train", "test", "validation"]
    assert part("all") == Part("all")
    assert part("train[what:ever]") == Part("train")
