"""Whether two readings have rows in common, on small data sets: by source, by words, and what is sampled of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import SourceUnreadable
from infra.settings import Settings
from infra.sources import excerpts
from infra.sources.find import Sources, TextData, sources_from
from infra.sources.shared_rows import Overlap, Reading, SharedRows
from tests.infra.fake_hub import fake_hub
from tests.infra.sources.test_find import python

README = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.*}, {split: test, path: main/test.*}]
- config_name: all
  data_files: [{split: train, path: all/train.*}, {split: test, path: all/test.*}]
---
"""
SHORT = ["Is it?", "It is.", "A few words more than that, but not thirteen."]


def long(word: str) -> str:
    """A text of twenty words, which no other word begins."""
    return " ".join(f"{word}{number}" for number in range(20))


def lines(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A data set whose splits have only short texts, with a configuration "all" of the same rows."""
    folder = tmp_path / "mirror/owner/corpus"
    for config in ("main", "all"):
        (folder / config).mkdir(parents=True)
        (folder / config / "train.0.jsonl").write_text(lines(SHORT))
        (folder / config / "train.1.jsonl").write_text(lines([f"{text} Again." for text in SHORT]))
        (folder / config / "test.jsonl").write_text(lines(["No.", "It is not."]))
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture
def sources(corpus: Path, settings: Settings) -> Sources:
    return sources_from(str(corpus.parents[1]), settings)


def reading(dataset: str | Path = "owner/corpus", config: str | None = "main", **changes: str) -> Reading:
    data = {"dataset": str(dataset), "config": config} | changes
    return Reading(data=TextData.model_validate(data), columns=("text",))


def compare(sources: Sources, trained: Reading, *measured: Reading) -> Overlap:
    found = SharedRows(sources, lambda _, data: sources.files(data)).between(trained, measured)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("trained", "measured"),
    [
        ({}, {}),
        ({"split": "all"}, {"split": "test"}),
        ({"split": "train+test"}, {"split": "test"}),
        ({"split": "train[:50%]"}, {"split": "train"}),
        ({"split": "train[:60%]"}, {"split": "train[50%:]"}),
        ({"split": "train[:2]"}, {"split": "train[-2:]"}),
        ({"data_files": "main/test.jsonl"}, {"split": "test"}),
        ({"data_files": "main/train.1.jsonl"}, {}),
        ({"data_files": "main/*.jsonl"}, {"data_files": "main/train.0.jsonl", "split": "train[:1]"}),
        ({"config": "all"}, {}),
    ],
)
def test_the_same_rows_are_found_by_their_source(
    sources: Sources, trained: dict[str, str], measured: dict[str, str]
) -> None:
    overlap = compare(sources, reading(**trained), reading(**measured))
    assert overlap == Overlap(same_rows=True, measured=reading(**measured).words)


@pytest.mark.parametrize(
    ("trained", "measured"),
    [
        ({}, {"split": "test"}),
        ({"split": "train[:50%]"}, {"split": "train[50%:]"}),
        ({"split": "test+train[:2]"}, {"split": "train[2:4]"}),
        ({"data_files": "main/train.1.jsonl"}, {"split": "test"}),
        ({"data_files": "main/train.1.jsonl"}, {"data_files": "main/train.0.jsonl"}),
        ({"config": "all"}, {"split": "test"}),
    ],
)
def test_other_rows_of_a_data_set_are_no_overlap(
    sources: Sources, trained: dict[str, str], measured: dict[str, str]
) -> None:
    assert not compare(sources, reading(**trained), reading(**measured))


def test_the_same_files_are_found_by_another_name(sources: Sources, corpus: Path, tmp_path: Path) -> None:
    inside = reading(corpus / "main/test.jsonl", None)
    assert compare(sources, inside, reading(split="test")).same_rows
    assert not compare(sources, inside, reading())
    copy = shutil.copytree(corpus, tmp_path / "a copy")
    assert compare(sources, reading(copy, split="test"), reading(split="test")).same_rows
    assert not compare(sources, reading(copy), reading(split="test"))


def put(folder: Path, *texts: str) -> Reading:
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(texts))
    return reading(folder, None)


def test_the_same_words_are_counted(tmp_path: Path, sources: Sources) -> None:
    trained = put(tmp_path / "trained", long("a"), *SHORT, f"Something before it. {long('b')}", long("c"))
    measured = put(tmp_path / "measured", long("a").upper(), long("d"), long("b").replace(" ", ", "), *SHORT)
    overlap = compare(sources, trained, measured)
    assert (overlap.same_rows, overlap.num_shared, overlap.num_measured, overlap.num_trained) == (False, 2, 6, 6)
    assert overlap.example == " ".join(f"a{number}" for number in range(13))


def test_short_texts_share_nothing_whatever_they_say(tmp_path: Path, sources: Sources) -> None:
    overlap = compare(sources, put(tmp_path / "a", *SHORT, long("a")), put(tmp_path / "b", *SHORT, long("b")))
    assert not overlap
    assert overlap.num_measured == 4


def test_slices_are_read_as_slices(tmp_path: Path, sources: Sources) -> None:
    """Of these four texts the last repeats the first, and the two between them say something else."""
    texts = put(tmp_path / "texts", long("a"), long("b"), long("b"), long("a")).data
    first, last, middle = (
        Reading(data=texts.model_copy(update={"split": split}), columns=("text",))
        for split in ("train[:25%]", "train[75%:]", "train[25%:75%]")
    )
    assert compare(sources, first, last).num_shared == 1
    assert compare(sources, first, middle) == Overlap(num_measured=2, num_trained=1, measured=middle.words)


def test_a_slice_of_what_is_not_read_to_its_end_is_not_compared_with_the_rest(
    tmp_path: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the files are read, and it is not known which rows of the whole they hold."""
    monkeypatch.setattr(excerpts, "_MOST_FILES", 2)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(4):
        (folder / f"train-{number}.jsonl").write_text(lines([long("a")]))
    first, last = (reading(folder, None, split=split) for split in ("train[:50%]", "train[50%:]"))
    assert compare(sources, first, last) == Overlap(num_trained=2, measured=last.words)
    other = put(tmp_path / "other", long("a"))
    assert compare(sources, first, other).num_shared == 1


def test_all_text_of_a_question_is_compared(tmp_path: Path, sources: Sources) -> None:
    """Choices are a list, or a mapping of lists; numbers and bytes are no words."""
    rows = [
        {"number": 1, "choices": {"text": ["no", long("a")], "label": ["A", "B"]}, "picture": b"x"},
        {"number": 2, "choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "picture": b"x"},
    ]
    folder = tmp_path / "questions"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    questions = Reading(data=TextData(dataset=str(folder)))
    overlap = compare(sources, put(tmp_path / "trained", long("a")), questions)
    assert (overlap.num_shared, overlap.num_measured) == (1, 2)


def test_a_long_text_counts_as_several(tmp_path: Path, sources: Sources) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n".join(long(f"word{number}x") for number in range(1000)))
    overlap = compare(sources, put(tmp_path / "trained", long("word500x")), reading(book, None))
    assert overlap.num_measured == -(-book.stat().st_size // excerpts.LONGEST)
    assert 1 <= overlap.num_shared <= 2


def test_a_sample_is_bounded_and_the_same_each_time(tmp_path: Path, sources: Sources) -> None:
    texts = put(tmp_path / "texts", *(long(f"x{number}x") for number in range(5000)))
    one, two = (
        excerpts.excerpts("train", lambda _: sources.files(texts.data), ("text",), first_only=False) for _ in range(2)
    )
    assert one == two
    assert len(set(one.texts)) == excerpts.MOST
    parts = [texts.model_copy(update={"columns": ("text",), "data": texts.data}) for _ in range(4)]
    assert compare(sources, put(tmp_path / "other", long("y")), *parts).num_measured == excerpts.MOST


def test_what_was_compared_is_not_read_again(tmp_path: Path, sources: Sources, settings: Settings) -> None:
    trained, measured = put(tmp_path / "a", long("a")), put(tmp_path / "b", long("a"))

    def refuse(*_: object) -> None:
        raise AssertionError("it was read again")

    unread = SharedRows(sources, refuse)  # type: ignore[arg-type]
    assert unread.between(trained, [measured], look=False) is None
    known = compare(sources, trained, measured)
    assert unread.between(trained, [measured]) == unread.between(trained, [measured], look=False) == known
    (tmp_path / "b/train.jsonl").write_text(lines([long("b")]))
    later = sources_from(str(tmp_path / "mirror"), settings)
    assert not compare(later, trained, measured), "other content, another comparison"


def test_damaged_data_is_named(tmp_path: Path, sources: Sources) -> None:
    trained, measured = put(tmp_path / "a", long("a")), put(tmp_path / "b", long("a"))
    (tmp_path / "b/train.jsonl").write_text('{"text": "a"}\n{"text\n')
    with pytest.raises(SourceUnreadable, match=r"b/train.jsonl cannot be read"):
        compare(sources, trained, measured)


def test_of_the_hub_only_the_first_file_is_read(tmp_path: Path) -> None:
    """The second is no JSON, and nobody finds out."""
    files = {"train-0.jsonl": lines([long("a"), long("b")]).encode(), "train-1.jsonl": b"no JSON"}
    files["test.jsonl"] = lines([long("b"), long("c")]).encode()
    code = (
        "from infra.settings import load_settings; from infra.sources.find import TextData, sources_from\n"
        "from infra.sources.shared_rows import Reading, SharedRows\n"
        "sources = sources_from('hub', load_settings())\n"
        "train, test = (Reading(data=TextData(dataset='owner/name', split=split)) for split in ('train', 'test'))\n"
        "shared = SharedRows(sources, lambda _, data: sources.files(data))\n"
        "print(shared.between(train, [test]).num_shared, shared.between(train, [train]).same_rows)"
    )
    with fake_hub("dataset", "owner/name", files) as endpoint:
        done = python(code, tmp_path, endpoint)
    assert done.stdout.split() == ["1", "True"], done.stderr
