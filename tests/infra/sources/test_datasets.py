"""Rows out of folders and files: no stale cache, and errors that name what exists."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from infra.errors import SourceInvalid
from infra.settings import Settings
from infra.sources.find import Sources, TextData, sources_from
from tests.infra.fake_hub import fake_hub
from tests.infra.sources.test_find import python

README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.*.json.gz
  - split: validation
    path: en/validation.json.gz
- config_name: de
  data_files:
  - split: train
    path: de/train.jsonl
---
"""


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "number": len(text), "none": None}) + "\n" for text in texts)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A data set with two configs; en/train has two shards."""
    repo = tmp_path / "mirror/owner/corpus"
    (repo / "en").mkdir(parents=True)
    (repo / "de").mkdir()
    (repo / "README.md").write_text(README)
    for name, text in {"train.0": "one", "train.1": "two", "validation": "three"}.items():
        (repo / f"en/{name}.json.gz").write_bytes(gzip.compress(lines(text).encode()))
    (repo / "de/train.jsonl").write_text(lines("eins", "zwei"))
    return tmp_path / "mirror"


@pytest.fixture
def sources(mirror: Path, settings: Settings) -> Sources:
    return sources_from(str(mirror), settings)


def corpus(**changes: str) -> TextData:
    return TextData.model_validate({"dataset": "owner/corpus", "config": "en", **changes})


def test_texts_of_config_and_split(sources: Sources) -> None:
    assert sources.texts(corpus()) == ["one", "two"]
    assert sources.texts(corpus(split="validation")) == ["three"]
    assert sources.texts(corpus(config="de")) == ["eins", "zwei"]
    assert sources.texts(corpus(config="de", split="train[:1]")) == ["eins"]


def test_data_files_pick_one_shard(sources: Sources) -> None:
    assert sources.texts(corpus(data_files="en/train.1.json.gz")) == ["two"]
    assert sources.texts(corpus(data_files="en/train.*.json.gz")) == ["one", "two"]
    with pytest.raises(
        SourceInvalid, match=r"no file 'en/train.7.json.gz'; it has README.md, de/train.jsonl, en/train.0"
    ):
        sources.texts(corpus(data_files="en/train.7.json.gz"))


def test_records_are_text_with_none_as_empty(sources: Sources) -> None:
    rows = sources.records(corpus(config="de"), ("none", "text"))
    assert rows == [{"none": "", "text": "eins"}, {"none": "", "text": "zwei"}]
    with pytest.raises(SourceInvalid, match=r"column 'number' is not text \(row 0 is int\)"):
        sources.records(corpus(config="de"), ("number",))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": "dee"}, r"no config 'dee'; did you mean 'de'\?; it has en, de"),
        ({"split": "trian"}, r"no split 'trian'; did you mean 'train'\?; it has train, validation"),
        ({"text_field": "txt"}, r"no column 'txt'; did you mean 'text'\?; it has text, number, none"),
    ],
)
def test_what_is_missing_is_named_with_what_exists(sources: Sources, changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(SourceInvalid, match=sentence):
        sources.texts(corpus(**changes))


def test_several_configs_and_none_named(sources: Sources) -> None:
    with pytest.raises(SourceInvalid, match="several configs, name one: en, de"):
        sources.texts(TextData(dataset="owner/corpus"))


def test_edited_folder_is_not_served_stale(mirror: Path, settings: Settings) -> None:
    import datasets

    def seen() -> tuple[list[str], list[str]]:
        sources = sources_from(str(mirror), settings)
        rows = datasets.load_dataset(
            str(sources.folder("owner/corpus")), "de", cache_dir=str(settings.home), split="train"
        )
        return sources.texts(corpus(config="de")), list(rows["text"])

    assert seen() == (["eins", "zwei"], ["eins", "zwei"])
    (mirror / "owner/corpus/de/train.jsonl").write_text(lines("drei", "vier"))
    assert seen() == (["drei", "vier"], ["drei", "vier"])


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz"],
)
def test_single_files(tmp_path: Path, settings: Settings, name: str) -> None:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    file = tmp_path / name
    match "".join(file.suffixes):
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), file)
        case ".arrow":
            with pyarrow.ipc.new_file(str(file), pyarrow.schema({"text": pyarrow.string()})) as writer:
                writer.write_table(pyarrow.table({"text": ["one", "two"]}))
        case ".jsonl.bz2":
            file.write_bytes(bz2.compress(lines("one", "two").encode()))
        case ".jsonl.xz":
            file.write_bytes(lzma.compress(lines("one", "two").encode()))
        case ".csv":
            file.write_text("text,number\none,1\ntwo,2\n")
        case ".json":
            file.write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
        case ".jsonl.gz":
            file.write_bytes(gzip.compress(lines("one", "two").encode()))
        case _:
            file.write_text(lines("one", "two"))
    sources = sources_from(None, settings)
    assert sources.texts(TextData(dataset=str(file))) == ["one", "two"]
    with pytest.raises(SourceInvalid, match="is a single file"):
        sources.texts(TextData(dataset=str(file), split="test"))


def test_text_file_is_one_text(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("один\n".encode()))
    for name, text in (("a.txt", "one\n\ntwo\n"), ("a.txt.gz", "один\n")):
        data = TextData(dataset=str(tmp_path / name))
        sources_from(None, settings).check_columns(data, ("text",))
        assert sources_from(None, settings).texts(data) == [text]


def test_text_files_of_a_folder_are_a_text_each(tmp_path: Path, settings: Settings) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("c", "a", "b"):
        (notes / f"{name}.txt").write_text(f"{name}\n\n{name * 3}\n")
    (notes / "d.jsonl").write_text(lines("four"))
    sources = sources_from(None, settings)
    texts = ["a\n\naaa\n", "b\n\nbbb\n", "c\n\nccc\n"]
    assert sources.texts(TextData(dataset=str(notes), data_files="*.txt")) == texts
    assert sources.texts(TextData(dataset=str(notes), data_files="b.txt")) == texts[1:2]
    assert sources.texts(TextData(dataset=str(notes), data_files="*.txt", split="test[1:]")) == texts[1:]


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("a.txt", {"split": "train[5:]"}, "is a single text: split 'train[5:]' names nothing in it; leave"),
        ("a.txt", {"split": "test"}, "is a single file: it has the split 'train' and no configs, not 'test'; leave"),
        ("a.txt", {"config": "en"}, "is a single file: it has the split 'train' and no configs, not 'en'; leave"),
        ("a.txt", {"text_field": "body"}, "has no column 'body'; it has text"),
        ("a.txt", {"data_files": "nothing"}, "is a single file: data_files 'nothing' names nothing in it; leave"),
        ("a.jsonl", {"data_files": "b.jsonl"}, "is a single file: data_files 'b.jsonl' names nothing in it; leave"),
        ("a.jsonl", {"split": "test"}, "is a single file: it has the split 'train' and no configs, not 'test'; leave"),
        ("notes", {"data_files": "a.png"}, "a.png is no text data: known are .txt, .jsonl, .json, .csv, .parquet"),
    ],
)
def test_what_says_nothing_about_the_data_is_refused(
    tmp_path: Path, settings: Settings, name: str, changes: dict[str, str], sentence: str
) -> None:
    (tmp_path / "notes").mkdir()
    for file in ("a.txt", "a.jsonl", "b.jsonl", "notes/a.png"):
        (tmp_path / file).write_text(lines("one"))
    sources, data = sources_from(None, settings), TextData(dataset=str(tmp_path / name)).model_copy(update=changes)
    for look in (sources.texts, lambda data: sources.check_columns(data, (data.text_field,))):
        with pytest.raises(SourceInvalid) as error:
            look(data)
        assert sentence in str(error.value)


def test_a_text_file_has_no_records(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.txt").write_text("one")
    sources, data = sources_from(None, settings), TextData(dataset=str(tmp_path / "a.txt"))
    for look in (sources.records, sources.check_columns):
        with pytest.raises(SourceInvalid, match="has no column 'instruction'; it has text"):
            look(data, ("instruction", "output"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"{broken"), ("a.png", b"x"), ("a.parquet", b"no parquet"), ("a.txt", b"\xff")]
)
def test_files_that_cannot_be_read(tmp_path: Path, settings: Settings, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceInvalid, match=name):
        sources_from(None, settings).texts(TextData(dataset=str(tmp_path / name)))


def test_a_readme_that_promises_more_than_there_is(tmp_path: Path, settings: Settings) -> None:
    """As of a data set of which some shards were fetched."""
    splits = "[{name: train, num_examples: 9, num_bytes: 1}, {name: test, num_examples: 2}]"
    (tmp_path / "some").mkdir()
    (tmp_path / "some/README.md").write_text(f"---\ndataset_info:\n  splits: {splits}\n---\n")
    (tmp_path / "some/train-0.jsonl").write_text(lines("one", "two"))
    sources, data = sources_from(None, settings), TextData(dataset=str(tmp_path / "some"))
    sources.check_columns(data, ("text",))
    assert sources.texts(data) == ["one", "two"]


def test_folder_without_data(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceInvalid, match="empty"):
        sources_from(None, settings).texts(TextData(dataset=str(tmp_path / "empty")))


def test_one_file_of_a_hub_data_set(mirror: Path, tmp_path: Path) -> None:
    repo = mirror / "owner/corpus"
    files = {file.relative_to(repo).as_posix(): file.read_bytes() for file in repo.rglob("*") if file.is_file()}
    files["notes.txt"] = b"a\n\nb\n"
    files |= {"clash/0.jsonl": b'{"text": "a", "n": null}\n', "clash/1.jsonl": b'{"text": "b", "n": "x"}\n'}
    files["cut.jsonl"] = b'{"text": "a"}\n{"text": '
    code = (
        "from infra.settings import load_settings; from infra.sources.find import TextData, sources_from\n"
        "sources = sources_from('hub', load_settings())\n"
        "print(sources.texts(TextData(dataset='owner/corpus', data_files='en/train.1.json.gz')))\n"
        "print(sources.texts(TextData(dataset='owner/corpus', data_files='notes.txt')))\n"
        "print(sources.texts(TextData(dataset='owner/corpus', config='de')))\n"
        "clash = TextData(dataset='owner/corpus', data_files='clash/*.jsonl')\n"
        "sources.check_columns(clash, ('text',)); print(sources.texts(clash))\n"
        "try: sources.texts(clash.model_copy(update={'data_files': 'cut.jsonl'}))\n"
        "except Exception as error: print(error)"
    )
    with fake_hub("dataset", "owner/corpus", files) as endpoint:
        done = python(code, tmp_path, endpoint)
    *rows, error = done.stdout.splitlines()
    assert rows == ["['two']", r"['a\n\nb\n']", "['eins', 'zwei']", "['a', 'b']"], done.stderr
    assert re.search(r"owner/corpus\S*/cut.jsonl cannot be read: JSON parse error", error), error
