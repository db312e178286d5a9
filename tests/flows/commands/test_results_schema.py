"""The page on the results store says what is there: every table and view, every column."""

from __future__ import annotations

import re

import pytest

from flows.commands.help import page
from infra.results.store import ResultsStore
from tests.infra.result_examples import run_row

_HEADING = re.compile(r"^## (\w+): (view, )?")


def documented() -> dict[str, tuple[bool, list[str]]]:
    """By name: whether it is a view, and its columns."""
    found: dict[str, tuple[bool, list[str]]] = {}
    columns: list[str] = []
    for line in page("results-schema").splitlines():
        if heading := _HEADING.match(line):
            columns = []
            found[heading[1]] = heading[2] is not None, columns
        elif line.startswith("- "):
            columns += re.findall(r"`(\w+)`", line.partition(":")[0])
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultsStore:
    store = ResultsStore(tmp_path_factory.mktemp("schema") / "results.duckdb")
    store.record(run_row())
    return store


def test_every_table_and_view_is_documented_and_there(store: ResultsStore) -> None:
    tables = "SELECT table_name, false FROM duckdb_tables()"
    views = "SELECT view_name, true FROM duckdb_views() WHERE NOT internal"
    rows = store.select(f"{tables} UNION ALL {views}").rows
    assert {name: is_view for name, (is_view, _) in documented().items()} == dict(rows)


@pytest.mark.parametrize("name", documented())
def test_every_column_is_documented_and_there(name: str, store: ResultsStore) -> None:
    found = store.select("SELECT column_name FROM duckdb_columns() WHERE table_name = ? ORDER BY column_index", (name,))
    assert sorted(documented()[name][1]) == sorted(column for (column,) in found.rows)
    assert len(set(documented()[name][1])) == len(documented()[name][1])
