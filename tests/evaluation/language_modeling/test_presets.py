"""Presets and what is set beside them: the rows that are measured are those that the recorded config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from evaluation.language_modeling.presets import PRESETS
from evaluation.suites import agreement, perplexity
from infra.errors import SourceInvalid
from infra.settings import Settings
from infra.sources.find import TextData, sources_from

USUAL = {
    "join": "\n\n",
    "documents": "joined",
    "detokenizer": None,
    "bos": "tokenizer",
    "rolling": False,
    "stride": None,
    "max_windows": None,
    "window_seed": 0,
    "keep_last_partial": False,
    "normalise": [],
    "config": None,
    "text_field": "text",
    "data_files": None,
}
PTB = {
    "dataset": "ptb-text-only/ptb_text_only",
    "text_field": "sentence",
    "revision": "refs/convert/parquet",
}
BARE: dict[str, dict[str, Any]] = {
    "wikitext2": {"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"},
    "ptb": PTB | {"split": "validation", "data_files": "penn_treebank/validation/0000.parquet"},
    "ptb-test": PTB | {"split": "test", "data_files": "penn_treebank/test/0000.parquet", "join": " "},
    "c4": {
        "dataset": "allenai/c4",
        "split": "validation[:1100]",
        "data_files": "en/c4-validation.00000-of-00008.json.gz",
        "join": " ",
        "max_windows": 256,
        "window_seed": None,
    },
    "lm-eval-wikitext": {
        "dataset": "EleutherAI/wikitext_document_level",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "text_field": "page",
        "documents": "separate",
        "detokenizer": "wikitext",
        "rolling": True,
        "keep_last_partial": True,
        "normalise": ["lm_eval_word", "byte"],
    },
}
C4_VALIDATION, C4_TRAIN = "en/c4-validation.00000-of-00008.json.gz", "en/c4-train.00000-of-01024.json.gz"


def read(**options: Any) -> tuple[str, str | None]:
    """Split and files of a config, which must be the same when it is read back from the record."""
    config = perplexity.Config.model_validate(options)
    assert perplexity.Config.model_validate(config.model_dump(mode="json")) == config
    assert agreement.Config.model_validate(options).texts == config.texts
    return config.split, config.data_files


@pytest.mark.parametrize("name", PRESETS)
def test_a_bare_preset_is_what_it_always_was(name: str) -> None:
    """Cache keys are made of this: a change here measures again what was measured."""
    for suite, windows in ((perplexity, [128, 2048]), (agreement, [2048])):
        lengths = ["max"] if name == "lm-eval-wikitext" else windows
        assert suite.Config(dataset=name).model_dump(mode="json") == USUAL | BARE[name] | {"windows": lengths}


@pytest.mark.parametrize(
    ("preset", "split", "file"),
    [
        ("ptb", "test", "penn_treebank/test/0000.parquet"),
        ("ptb", "train[5%:10%]", "penn_treebank/train/0000.parquet"),
        ("ptb", "validation", "penn_treebank/validation/0000.parquet"),
        ("ptb", "validation[:100]", "penn_treebank/validation/0000.parquet"),
        ("ptb-test", "validation", "penn_treebank/validation/0000.parquet"),
        ("ptb-test", "test[:9] + test[20:]", "penn_treebank/test/0000.parquet"),
        ("c4", "train[:1100]", C4_TRAIN),
        ("c4", "train", C4_TRAIN),
        ("c4", "validation", C4_VALIDATION),
        ("c4", "validation[:100]", C4_VALIDATION),
        ("wikitext2", "train[:10]", None),
        ("lm-eval-wikitext", "validation", None),
    ],
)
def test_another_split_is_read_from_its_own_file(preset: str, split: str, file: str | None) -> None:
    assert read(dataset=preset, split=split) == (split, file)
    config = perplexity.Config(dataset=preset, split=split)
    changes = {"split": split, "data_files": file}
    assert config == perplexity.Config(dataset=preset).model_copy(update=changes)


@pytest.mark.parametrize(
    ("preset", "file", "split"),
    [
        ("ptb", "penn_treebank/test/0000.parquet", "test"),
        ("ptb-test", "penn_treebank/train/*.parquet", "train"),
        ("c4", C4_TRAIN, "train"),
        ("c4", C4_VALIDATION, "validation[:1100]"),
        ("c4", "en/c4-validation.00001-of-00008.json.gz", "validation"),
        ("c4", "realnewslike/c4-train.00000-of-00512.json.gz", "train"),
        ("c4", "latest.jsonl", "train"),
    ],
)
def test_other_files_are_called_by_their_own_split(preset: str, file: str, split: str) -> None:
    """Files whose name tells nothing are "train", as all files that nobody gave a split; no slice of others' rows."""
    assert read(dataset=preset, data_files=file) == (split, file)


def test_split_and_files_together_are_taken_as_said() -> None:
    assert read(dataset="c4", split="test[:7]", data_files="my.jsonl") == ("test[:7]", "my.jsonl")
    assert read(dataset="c4", split="validation", data_files=None, config="en") == ("validation", None)
    assert read(dataset="c4", config="en") == ("validation[:1100]", C4_VALIDATION)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"dataset": "ptb", "split": "valid"},
            "split 'valid': the preset ptb knows files of train, validation, test; name one of these splits, or give "
            "`data_files` too",
        ),
        ({"dataset": "c4", "split": "test[:5]"}, "split 'test[:5]': the preset c4 knows files of train, validation;"),
        ({"dataset": "ptb", "split": "train+test"}, "split 'train+test': the preset ptb knows"),
        ({"dataset": "ptb", "split": "train[:5]+test[:5]"}, "split 'train[:5]+test[:5]': the preset ptb knows"),
        (
            {"dataset": "c4", "config": "realnewslike"},
            f"config 'realnewslike': the preset c4 reads {C4_VALIDATION}, which is not of it; leave config out, or "
            "give `data_files` too",
        ),
        ({"dataset": "ptb", "split": 5}, "split 5: the preset ptb knows"),
        ({"dataset": "ptb", "data_files": ["a"]}, "valid string"),
    ],
)
@pytest.mark.parametrize("suite", [perplexity, agreement])
def test_what_a_preset_does_not_know_is_refused(options: dict[str, Any], sentence: str, suite: Any) -> None:
    with pytest.raises(ValidationError) as error:
        suite.Config.model_validate(options)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dataset": "ptb"}, "of validation"),
        ({"dataset": "ptb", "split": "test"}, "of test"),
        ({"dataset": "ptb-test", "split": "validation"}, "of validation"),
        ({"dataset": "ptb-test", "data_files": "penn_treebank/train/0000.parquet"}, "of train"),
    ],
)
def test_the_rows_are_those_of_the_split(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        file = tmp_path / "mirror/ptb-text-only/ptb_text_only/penn_treebank" / split / "0000.parquet"
        file.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"sentence": [f"of {split}"]}), file)
    sources = sources_from(str(tmp_path / "mirror"), Settings(home=tmp_path / "home", mirror=None))
    need = perplexity.Config.model_validate(options).texts
    assert sources.texts(TextData.model_validate(need.model_dump())) == [text]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("a.txt", {"split": "train[5:]"}, "a.txt is a single text: split 'train[5:]' names nothing in it; leave split"),
        ("a.txt", {"text_field": "body"}, "a.txt has no column 'body'; it has text"),
        ("a.jsonl", {"data_files": "b.jsonl"}, "a.jsonl is a single file: data_files 'b.jsonl' names nothing in it;"),
        ("a.jsonl", {"split": "test"}, "a.jsonl is a single file: it has the split 'train' and no configs, not 'test'"),
        ("a.jsonl", {"config": "en"}, "a.jsonl is a single file: it has the split 'train' and no configs, not 'en';"),
    ],
)
def test_what_says_nothing_about_a_file_is_refused_by_the_preflight_and_not_by_the_config(
    name: str, options: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    """A spec is as valid where the file is as where it is not: a scheduler may read it on another machine."""
    elsewhere = perplexity.Config.model_validate({"dataset": str(tmp_path / name), **options})
    (tmp_path / name).write_text('{"text": "one"}\n')
    config = perplexity.Config.model_validate({"dataset": str(tmp_path / name), **options})
    assert config == elsewhere
    sources = sources_from(None, Settings(home=tmp_path / "home", mirror=None))
    with pytest.raises(SourceInvalid) as error:
        sources.check_columns(TextData.model_validate(config.texts.model_dump()), (config.text_field,))
    assert sentence in str(error.value)


def test_what_a_file_has_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.jsonl").write_text("")
    usual = {"config": None, "split": "train", "text_field": "text", "data_files": None}
    assert read(dataset=str(tmp_path / "a.txt"), **usual) == ("train", None)
    assert read(dataset=str(tmp_path / "a.jsonl"), split="train[:5]", text_field="body") == ("train[:5]", None)
    assert read(dataset=str(tmp_path), split="test", data_files="a.txt") == ("test", "a.txt")
