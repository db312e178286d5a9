"""Tables as text of other programs."""

from __future__ import annotations

import csv
import io

from flows.records.render import csv_table, markdown_table


def test_a_bar_in_a_cell_is_no_column() -> None:
    assert markdown_table(["a", "b|c"], [["x|y", "1"], ["", "2"]]).splitlines() == [
        "| a | b\\|c |",
        "| --- | --- |",
        "| x\\|y | 1 |",
        "|  | 2 |",
    ]


def test_csv_can_be_read_back() -> None:
    rows = [{"a": "x,y", "b": "1"}, {"a": 'a "quoted" word', "b": ""}]
    text = csv_table(["a", "b"], rows)
    assert not text.endswith("\n")
    assert list(csv.DictReader(io.StringIO(text))) == rows
    assert csv_table(["a", "b"], []) == "a,b"
