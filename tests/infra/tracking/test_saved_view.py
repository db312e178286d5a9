"""The view of all checkpoints: columns are added, never taken away, and what a user saved is theirs."""

from __future__ import annotations

import json
from typing import Any

from infra.tracking.saved_view import FILTER, widened

PPL, ACC = "perplexity/wikitext2/ppl@128", "zero_shot/average/acc"


def state(view: str | None) -> dict[str, Any]:
    assert view is not None
    found: dict[str, Any] = json.loads(json.loads(view)["state"])
    return found


def metrics(view: str | None) -> list[str]:
    return [column for column in state(view)["selectedColumns"] if column.startswith("metrics.")]


def test_columns_are_added_to_those_that_are_there() -> None:
    first = widened(None, [PPL], 7)
    second = widened(first, [ACC, PPL], 9)
    assert metrics(first) == ["metrics.`perplexity/wikitext2/ppl_128`"]
    assert metrics(second) == [*metrics(first), "metrics.`zero_shot/average/acc`"]
    assert state(second)["selectedColumns"][0] == "params.`method`"
    assert state(second)["searchFilter"] == FILTER
    assert json.loads(second or "")["createdAt"] == json.loads(second or "")["updatedAt"] == 7
    assert widened(second, [PPL, ACC], 11) is None


def test_the_best_stand_first_whichever_way_is_up() -> None:
    assert [state(widened(None, [name], 0))["orderByAsc"] for name in (PPL, ACC)] == [True, False]
    assert state(widened(None, [ACC], 0))["orderByKey"] == "metrics.`zero_shot/average/acc`"
    assert widened(None, [], 0) is None, "without a figure there is nothing to compare"


def test_there_are_no_more_columns_than_a_screen_has_room_for() -> None:
    view = widened(None, [f"suite/task-{number}/acc" for number in range(100)], 0)
    assert len(metrics(view)) == 12
    assert len(view or "") <= 5000
    assert widened(view, [PPL], 1) is None


def test_what_a_user_saved_stays() -> None:
    saved = json.loads(widened(None, [PPL], 7) or "")
    for known in (
        json.dumps(saved | {"updatedAt": 8}),
        "deflate;abc",
        "[]",
        "null",
        json.dumps(saved | {"state": "x"}),
    ):
        assert widened(known, [ACC], 9) is None
