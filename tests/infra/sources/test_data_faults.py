"""Data that cannot be read, or only file by file: the user's file and the reason are named, early and late."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import SourceInvalid, SourceUnreadable
from infra.log_once import warn_once
from infra.settings import Settings
from infra.sources import data_files
from infra.sources.find import Sources, TextData, sources_from

Files = dict[str, Any]
"""Names and contents: rows, or bytes."""


@pytest.fixture(autouse=True)
def _nothing_was_said_before() -> None:
    warn_once.cache_clear()


def rows(*texts: Any, **other: Any) -> list[dict[str, Any]]:
    return [{"text": text, **other} for text in texts]


def put(folder: Path, files: Files) -> Path:
    """A folder of data; by their endings files are parquet, arrow, or text of some kind."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in content).encode()
            path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return folder


def sources(tmp_path: Path, mirror: Path | None = None) -> Sources:
    return sources_from(None if mirror is None else str(mirror), Settings(home=tmp_path / "home", mirror=None))


def said(look: Callable[[], object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        look()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "by-content" not in str(caught.value)
    return str(caught.value)


CUT = gzip.compress(json.dumps({"text": "x" * 400}).encode())[:-12]
PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": ["a"] * 1000}), PARQUET)
HALF = PARQUET.getvalue().to_pybytes()[:300]

UNREADABLE: dict[str, tuple[Files, str]] = {
    "broken line": (
        {"train-0.jsonl": rows("a"), "train-1.jsonl": b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n'},
        "{}/train-1.jsonl cannot be read: line 3 is no JSON (Expecting ',' delimiter)",
    ),
    "broken list": (
        {"train.json": b'[{"text": "a"},\n{"text": "b"'},
        "{}/train.json cannot be read: line 2 is no JSON",
    ),
    "numbers": ({"train.jsonl": b"1\n2\n"}, "{}/train.jsonl cannot be read: line 1 is no JSON object but int"),
    "latin-1": (
        {"train-0.jsonl": rows("a"), "train-1.jsonl": b'{"text": "a"}\n{"text": "\xe4"}\n'},
        "{}/train-1.jsonl cannot be read: line 2 is not UTF-8 (byte 0xe4)",
    ),
    "latin-1 csv": ({"train.csv": b"text\n\xe4\n"}, "{}/train.csv cannot be read: line 2 is not UTF-8 (byte 0xe4)"),
    "latin-1 txt": ({"train.txt": b"\xe4\n"}, "{}/train.txt cannot be read: line 1 is not UTF-8 (byte 0xe4)"),
    "utf-16": ({"train.jsonl": '{"text": "a"}'.encode("utf-16")}, "line 1 is not UTF-8 (byte 0xff)"),
    "ragged csv": (
        {"train-0.csv": b"text,n\na,1\n", "train-1.csv": b"text,n\na,1\nb,2,3\n"},
        "{}/train-1.csv cannot be read: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3",
    ),
    "cut gzip": (
        {"train-0.jsonl": rows("a"), "train-1.jsonl.gz": CUT},
        "{}/train-1.jsonl.gz cannot be read: Compressed file ended before",
    ),
    "no gzip": ({"train.jsonl.gz": b'{"text": "a"}'}, "{}/train.jsonl.gz cannot be read: Not a gzipped file"),
    "cut parquet": ({"train.parquet": HALF}, "{}/train.parquet cannot be read: Parquet magic bytes not found"),
    "empty parquet": ({"train.parquet": b""}, "{}/train.parquet cannot be read: Parquet file size is 0 bytes"),
    "empty file": ({"train.jsonl": b""}, "{}/train.jsonl has no rows"),
    "empty files": ({"a.jsonl": b"", "b.jsonl": b""}, "none of the 2 files of {} has rows"),
    "a header alone": ({"train.csv": b"text,n\n"}, "{}/train.csv has no rows"),
    "no text": ({"train.jsonl": rows("", None)}, "{}: there is no text in text; name another data set"),
    "no data": ({"train.bin": b"x"}, "{}: No (supported) data files found in {}"),
    "a promise": (
        {"README.md": b"---\nconfigs:\n- config_name: default\n  data_files: en/*.jsonl\n---\n", "a.jsonl": rows("a")},
        "{}: No (supported) data files found in {}",
    ),
}


@pytest.mark.parametrize("place", ["folder", "mirror"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_the_users_file_and_the_reason_are_named(case: str, place: str, tmp_path: Path) -> None:
    files, sentence = UNREADABLE[case]
    folder = put(tmp_path / "mirror/owner/name", files)
    asked = TextData(dataset=str(folder) if place == "folder" else "owner/name")
    found = sources(tmp_path, None if place == "folder" else tmp_path / "mirror")
    early = said(lambda: found.check_columns(asked, ("text",)), SourceUnreadable)
    late = said(lambda: found.texts(asked), SourceUnreadable)
    assert early == late
    named = str(folder) if place == "folder" or "cannot" in sentence or "/train" in sentence else "owner/name"
    assert sentence.replace("{}", named, 1).replace("{}", str(folder)) in early


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv", "train.txt"])
def test_a_single_file_is_named(name: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "data", {name: b'\xff{"text'})
    found, asked = sources(tmp_path), TextData(dataset=str(folder / name))
    early = said(lambda: found.check_columns(asked, ("text",)), SourceUnreadable)
    assert f"{folder / name} cannot be read: " in early
    assert said(lambda: found.texts(asked), SourceUnreadable) == early


NOT_TEXT: dict[str, tuple[Files, str]] = {
    "numbers first": (
        {"a.jsonl": rows(1), "b.jsonl": rows("b")},
        "column 'text' is not text (row 0 of {}/a.jsonl is int)",
    ),
    "numbers within": (
        {"a.jsonl": rows("a"), "b.jsonl": rows("b", 3)},
        "column 'text' is not text (row 1 of {}/b.jsonl is int)",
    ),
    "one file": ({"a.jsonl": rows("b", 3)}, "column 'text' is not text (row 1 is int)"),
    "lists": (
        {"a.jsonl": rows("a"), "b.jsonl": rows(["b"])},
        "column 'text' is not text (row 0 of {}/b.jsonl is list)",
    ),
    "csv of numbers": ({"a.csv": b"text\n1\n"}, "column 'text' is not text (row 0 is int)"),
    "a shard of other columns": (
        {"a.parquet": rows("a"), "b.parquet": [{"texts": "b"}]},
        "{}/b.parquet has no column 'text'; did you mean 'texts'?; it has texts",
    ),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_a_column_that_is_not_text_is_named_with_file_and_row(case: str, tmp_path: Path) -> None:
    files, sentence = NOT_TEXT[case]
    folder = put(tmp_path / "data", files)
    found, asked = sources(tmp_path), TextData(dataset=str(folder))
    assert sentence.replace("{}", str(folder)) in said(lambda: found.check_columns(asked, ("text",)), SourceInvalid)
    if case not in ("a shard of other columns",):  # `datasets` fills it with nulls
        assert sentence.replace("{}", str(folder)) in said(lambda: found.texts(asked), SourceInvalid)


READABLE: dict[str, tuple[Files, list[str]]] = {
    "null first": ({"a.jsonl": rows("a", n=None), "b.jsonl": rows("b", n="x")}, ["a", "b"]),
    "null first in parquet": (
        {"a.parquet": [{"text": "a", "n": None}], "b.parquet": [{"text": "b", "n": "x"}]},
        ["a", "b"],
    ),
    "no text first": ({"a.jsonl": rows(None), "b.jsonl": rows("b")}, ["", "b"]),
    "another type": ({"a.jsonl": rows("a", n=1), "b.jsonl": rows("b", n="x")}, ["a", "b"]),
    "another type in parquet": ({"a.parquet": rows("a", n=1), "b.parquet": rows("b", n="x")}, ["a", "b"]),
    "one column more": ({"a.jsonl": rows("a"), "b.jsonl": rows("b", n=1)}, ["a", "b"]),
    "other structs": ({"a.jsonl": rows("a", n={"u": 1}), "b.jsonl": rows("b", n={"v": "x"})}, ["a", "b"]),
    "two types in a file": ({"a.jsonl": [{"text": "a", "n": 1}, {"text": "b", "n": "x"}]}, ["a", "b"]),
    "an empty file first": ({"a.csv": b"", "b.csv": b"text\nb\n"}, ["b"]),
    "a file without rows": ({"a.csv": b"text\n", "b.csv": b"text\nb\n"}, ["b"]),
    "save_to_disk": ({"state.json": b"{}", "dataset_info.json": b"{}", "data-00000-of-00001.arrow": b""}, ["a"]),
}


@pytest.mark.parametrize("case", READABLE)
def test_what_differs_in_columns_that_nobody_asked_for_is_read(case: str, tmp_path: Path) -> None:
    files, texts = READABLE[case]
    folder = put(tmp_path / "data", files)
    for arrow in folder.glob("*.arrow"):
        with pa.ipc.new_stream(str(arrow), pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": ["a"]}))
    found, asked = sources(tmp_path), TextData(dataset=str(folder))
    found.check_columns(asked, ("text",))
    assert found.texts(asked) == texts
    assert found.texts(asked.model_copy(update={"split": "train[-1:]"})) == texts[-1:]


def test_slices_of_what_is_read_file_by_file(tmp_path: Path) -> None:
    files = {"train-0.jsonl": rows(*"abcd", n=1), "train-1.jsonl": rows(*"efgh", n="x"), "test.jsonl": rows(*"xy", n=1)}
    found, asked = (
        sources(tmp_path),
        TextData(dataset=str(put(tmp_path / "data", files)), split="train[:50%]+test[-1:]"),
    )
    assert found.texts(asked) == [*"abcd", "y"]
    assert found.texts(asked.model_copy(update={"split": "train[6:]"})) == ["g", "h"]


def test_rows_without_text_are_read_as_empty_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"a.jsonl": rows("a", "b"), "b.jsonl": rows("c", None, None)}
    folder = put(tmp_path / "data", files)
    found, asked = sources(tmp_path), TextData(dataset=str(folder))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert found.texts(asked) == ["a", "b", "c", "", ""]
    words = f"{folder}: 2 of 5 rows of train have no text in 'text', the first is row 1 of {folder}/b.jsonl"
    assert [record.message for record in caplog.records] == [f"{words}; they are read as empty"]


def test_files_of_another_format_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = put(
        tmp_path / "data", {"a.jsonl": rows("a"), "b.jsonl": rows("b"), "c.csv": b"text\nc\n", "LICENSE.txt": b"x"}
    )
    found, asked = sources(tmp_path), TextData(dataset=str(folder))
    with caplog.at_level(logging.WARNING):
        found.check_columns(asked, ("text",))
    assert found.texts(asked) == ["a", "b"]
    (record,) = caplog.records
    assert f"{folder}: its .jsonl files are read, c.csv not; name files of one format by data_files" in record.message


def test_the_early_look_opens_the_beginnings_of_so_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MOST_FILES", 3)
    files = {f"train-{number}.jsonl": rows("a") for number in range(4)} | {"train-3.jsonl": b"{broken"}
    found, asked = sources(tmp_path), TextData(dataset=str(put(tmp_path / "data", files)))
    found.check_columns(asked, ("text",))
    assert "train-3.jsonl cannot be read: line 1 is no JSON" in said(lambda: found.texts(asked), SourceUnreadable)


TABLES: dict[str, tuple[Files, str]] = {
    "null first": (
        {"test-0.jsonl": rows("a", n=None), "test-1.jsonl": rows("b", n="x")},
        "{}/test-1.jsonl does not fit to {}/test-0.jsonl: column 'n' is string in the one and empty in the other",
    ),
    "another type": (
        {"test-0.parquet": rows("a", n=1), "test-1.parquet": rows("b", n="x")},
        "{}/test-1.parquet does not fit to {}/test-0.parquet: column 'n' is string in the one and int64 in the other",
    ),
    "one column more": (
        {"test-0.jsonl": rows("a"), "test-1.jsonl": rows("b", n=1)},
        "{}/test-1.jsonl does not fit to {}/test-0.jsonl: only the one has column 'n'",
    ),
    "damaged": ({"test.parquet": HALF}, "{}/test.parquet cannot be read: Parquet magic bytes not found"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_split_that_is_read_with_all_its_columns(case: str, tmp_path: Path) -> None:
    """As lm-eval does, through a README elsewhere that names the files."""
    files, sentence = TABLES[case]
    folder = put(tmp_path / "mirror/owner/name", files)
    paths = ", ".join(str(folder / name) for name in files)
    readme = f"---\nconfigs:\n- config_name: c\n  data_files:\n  - split: test\n    path: [{paths}]\n---\n"
    excerpt = put(tmp_path / "excerpt", {"README.md": readme.encode()})
    found = sources(tmp_path, tmp_path / "mirror")
    words = said(lambda: found.check_tables("owner/name", excerpt, "c", ["test"]), SourceUnreadable)
    assert sentence.replace("{}", str(folder)) in words
