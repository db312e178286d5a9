"""Answers in SQL as text: nothing lost, nothing obeyed by what shows it."""

from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime

import pytest

from flows.records.answers import render_answer
from infra.results.index import Answer

ODD = "Größe|<script>alert(1)</script>\n\x1b[31m"
ANSWER = Answer(
    ("name", "value", "value", "at", "map"),
    (
        (ODD, math.nan, 1, datetime(2025, 6, 1), {"a": math.inf, "b": [1, None]}),
        (None, -math.inf, 2, None, None),
        ("x" * 100, 0.1, None, None, True),
    ),
)


def test_json_has_every_value_and_words_for_what_json_cannot_say() -> None:
    first, second, third = json.loads(render_answer(ANSWER, "json"))
    assert first == {
        **{"name": ODD, "value": "NaN", "value_3": 1},
        **{"at": "2025-06-01T00:00:00", "map": {"a": "Infinity", "b": [1, None]}},
    }
    assert (second["name"], second["value"], third["map"]) == (None, "-Infinity", True)


def test_csv_is_read_back() -> None:
    head, first, second, third = csv.reader(io.StringIO(render_answer(ANSWER, "csv")))
    assert head == ["name", "value", "value_3", "at", "map"]
    assert first == [ODD, "NaN", "1", "2025-06-01T00:00:00", '{"a": "Infinity", "b": [1, null]}']
    assert second == ["", "-Infinity", "2", "", ""]
    assert third == ["x" * 100, "0.1", "", "", "true"]


def test_markdown_shows_names_as_text() -> None:
    line = render_answer(ANSWER, "markdown").splitlines()[2]
    assert line.startswith("| Größe\\|&lt;script>alert(1)&lt;/script>  [31m | NaN | 1 |")


def test_the_table_cuts_what_is_long_and_obeys_nothing() -> None:
    text = render_answer(ANSWER, "table")
    assert "\x1b" not in text
    assert f"{'x' * 59}…" in text
    assert text.endswith("\n(3 rows)")
    assert len({line.index("value") for line in text.splitlines()[:1]}) == 1


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json"])
def test_no_rows_are_an_answer(form: str) -> None:
    assert render_answer(Answer(("a", "b"), ()), form)
