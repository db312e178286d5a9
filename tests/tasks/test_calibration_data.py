"""Calibration text: presets, instruction data as text, lines of a running text; from folders of a few rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infra.artifacts.store import ArtifactRef
from infra.errors import SourceInvalid
from infra.settings import Settings
from infra.sources.find import Sources, sources_from
from pruning.calibration import CalibrationSet
from pruning.instructions import InstructionColumns, prompt_of
from tasks.calibration_data import PRESETS, CalibrationData, Template, documents, expanded
from tasks.execution.context import RunContext, StageContext
from tasks.requests import CalibrateRequest
from tasks.stages import calibrate
from tests.tiny import tiny_tokenizer

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Translate.", "input": "Haus", "output": "House."},
    {"instruction": "Say nothing.", "input": None, "output": "-"},
]
LINES = ["", " = Title = \n", "", "First line.", "Second line.", ""]
FILES: dict[str, list[dict[str, Any]]] = {
    "allenai/c4/en/c4-train.00000-of-01024.json.gz": [{"text": "one", "url": "a"}, {"text": "two", "url": "b"}],
    "allenai/c4/en/c4-train.00001-of-01024.json.gz": [{"text": "not this shard", "url": "c"}],
    "yahma/alpaca-cleaned/alpaca_data_cleaned.json": RECORDS,
    "tatsu-lab/alpaca/train.json": [record | {"text": "as the owner formats it"} for record in RECORDS],
    "vicgalle/alpaca-gpt4/train.json": [record | {"text": "as the owner formats it"} for record in RECORDS],
    "Salesforce/wikitext/wikitext-2-raw-v1/train.json": [{"text": line} for line in LINES],
    "Salesforce/wikitext/wikitext-103-raw-v1/train.json": [{"text": "another config"}],
    "owner/questions/train.json": [{"question": "Why?", "answer": "Because.", "id": 7}],
}
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files: wikitext-103-raw-v1/train.json
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train.json
---
"""


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Every data set that a preset names, in little, laid out as the owners do."""
    root = tmp_path / "mirror"
    for name, rows in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (root / "Salesforce/wikitext/README.md").write_text(WIKITEXT_CARD, encoding="utf-8")
    return root


@pytest.fixture
def sources(mirror: Path, tmp_path: Path) -> Sources:
    return sources_from(str(mirror), Settings(home=tmp_path / "home", mirror=None))


def data(value: Any) -> CalibrationData:
    return CalibrationData.model_validate(expanded(value))


ALPACA_TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:\nRed.",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nHaus\n\n### Response:\nHouse.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay nothing.\n\n### Response:\n-",
]


@pytest.mark.parametrize(
    ("preset", "texts"),
    [
        ("c4", ["one", "two"]),
        ("alpaca", ALPACA_TEXTS),
        ("stanford-alpaca", ALPACA_TEXTS),
        ("gpt4-alpaca", ALPACA_TEXTS),
        ("wikitext2", ["\n\n".join(LINES)]),
    ],
)
def test_presets_read_what_they_promise(preset: str, texts: list[str], sources: Sources) -> None:
    asked = data(preset)
    sources.check_columns(asked, asked.columns)
    assert documents(asked, sources, "\n\n") == texts


def test_every_preset_is_tested_above(mirror: Path) -> None:
    assert {asked["dataset"] for asked in PRESETS.values()} == {
        "/".join(name.split("/")[:2]) for name in FILES if not name.startswith("owner/")
    }


def test_a_preset_is_written_out_in_full() -> None:
    assert data("alpaca").model_dump(mode="json") == {
        "dataset": "yahma/alpaca-cleaned",
        "config": None,
        "split": "train",
        "text_field": "text",
        "revision": None,
        "data_files": None,
        "template": {"instruction": "instruction", "input": "input", "output": "output", "name": "alpaca"},
        "rows": "documents",
    }
    assert CalibrationData.model_validate(data("alpaca").model_dump(mode="json")) == data("alpaca")


def test_columns_of_other_instruction_data(sources: Sources) -> None:
    template = {"instruction": "question", "input": None, "output": "answer"}
    asked = data({"dataset": "owner/questions", "template": template})
    assert asked.template == Template(instruction="question", input=None, output="answer")
    assert documents(asked, sources, "\n\n") == [
        prompt_of({"instruction": "Why?"}, InstructionColumns(input=None)) + "Because."
    ]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"dataset": "owner/questions", "template": "alpaca"},
            "owner/questions has no column 'instruction'; it has question, answer, id",
        ),
        (
            {"dataset": "owner/questions", "text_field": "qestion"},
            "owner/questions has no column 'qestion'; did you mean 'question'?; it has question, answer, id",
        ),
        ({"dataset": "owner/questions", "text_field": "id"}, "column 'id' is not text (row 0 is int)"),
        ({"dataset": "owner/questions", "split": "test"}, "has no split 'test'; it has train"),
        ({"dataset": "Salesforce/wikitext", "config": "wikitext-2"}, "no config 'wikitext-2'; did you mean"),
        ({"dataset": "allenai/c4", "data_files": "en/no.json.gz"}, "has no file 'en/no.json.gz'"),
    ],
)
def test_what_is_not_there_is_known_early(value: dict[str, Any], sentence: str, sources: Sources) -> None:
    """By the first row, and in the words of the stage that would read all of them."""
    asked = data(value)
    with pytest.raises(SourceInvalid) as early:
        sources.check_columns(asked, asked.columns)
    with pytest.raises(SourceInvalid) as late:
        documents(asked, sources, "\n\n")
    assert sentence in str(early.value)
    assert str(early.value) == str(late.value)


def test_the_early_look_reads_the_beginning_alone(mirror: Path, tmp_path: Path) -> None:
    good = json.dumps({"text": "good " * 100}) + "\n"  # `datasets` reads JSON in pieces of 10 MB
    long = mirror / "owner/long/train.jsonl"
    long.parent.mkdir()
    long.write_text(good * 40_000 + "{broken", encoding="utf-8")
    sources = sources_from(str(mirror), Settings(home=tmp_path / "home", mirror=None))
    asked = data({"dataset": "owner/long", "split": "train[:10]"})
    sources.check_columns(asked, asked.columns)
    assert not (tmp_path / "home/cache/datasets/json").exists()


def test_a_text_file_has_the_column_text_alone(tmp_path: Path, sources: Sources) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    asked = data({"dataset": str(tmp_path / "a.txt")})
    sources.check_columns(asked, asked.columns)
    assert documents(asked, sources, "\n\n") == ["one\n\ntwo"]
    for said, column in (({"text_field": "anything"}, "anything"), ({"template": "alpaca"}, "instruction")):
        asked = data({"dataset": str(tmp_path / "a.txt"), **said})
        sentence = f"a.txt has no column '{column}'; it has text"
        with pytest.raises(SourceInvalid, match=sentence):
            sources.check_columns(asked, asked.columns)
        with pytest.raises(SourceInvalid, match=sentence):
            documents(asked, sources, "\n\n")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"dataset": "a/b", "template": "alpacca"}, "unknown template 'alpacca'; did you mean 'alpaca'?"),
        ({"dataset": "a/b", "template": {"name": "chatml"}}, "unknown template 'chatml'; available: alpaca"),
        ({"dataset": "a/b", "template": {"instrction": "x"}}, "template.instrction"),
        ({"dataset": "a/b", "template": "alpaca", "text_field": "body"}, "text_field 'body' and a template exclude"),
        ({"dataset": "a/b", "template": "alpaca", "rows": "lines"}, "rows 'lines' and a template exclude each other"),
        ({"dataset": "a/b", "rows": "paragraphs"}, "'documents' or 'lines'"),
    ],
)
def test_what_does_not_fit_together_is_refused(value: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        data(value)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("name", "near"), [("C4", "c4"), ("wikitext", "wikitext2"), ("gpt4_alpaca", "gpt4-alpaca")])
def test_an_unknown_preset_is_named_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown calibration set '{name}'; did you mean '{near}'") as error:
        expanded(name)
    assert all(preset in str(error.value) for preset in PRESETS)


def fill(asked: CalibrationData, sources: Sources, tmp_path: Path, **changes: Any) -> CalibrationSet:
    """The calibration stage without Prefect."""
    checkpoint = ArtifactRef(kind="checkpoint", key="import-model-v1-0")
    run_context = RunContext(Settings(home=tmp_path / "home", mirror=None), sources)
    if not run_context.store.has(checkpoint):
        with run_context.store.writing(checkpoint, request={}, versions={}) as written:
            tiny_tokenizer().save_pretrained(written)
    values = {"num_samples": 4, "seq_len": 8, "num_heldout": 1, "seed": 0, "join": "\n\n"} | changes
    request = CalibrateRequest(
        checkpoint=checkpoint,
        source=sources.find(asked.dataset, "dataset").identity,
        config=asked.config,
        split=asked.split,
        text_field=asked.text_field,
        data_files=asked.data_files,
        template=asked.template,
        rows=asked.rows,
        data=asked,
        **values,
    )
    folder = tmp_path / "windows"
    folder.mkdir(exist_ok=True)
    calibrate.fill(request, StageContext(run_context, folder, request.ref, None, lambda share, message: None))
    return CalibrationSet.load(folder)


def test_the_windows_are_of_prompts_and_responses_and_say_so(sources: Sources, tmp_path: Path) -> None:
    windows = fill(data("alpaca"), sources, tmp_path)
    text = "\n\n".join(ALPACA_TEXTS)
    tokenizer = tiny_tokenizer()
    for ids in windows.input_ids_NL:
        assert all(piece in text for piece in tokenizer.decode(ids).split("\n\n"))
    assert dict(windows.source) == {
        "dataset": "yahma/alpaca-cleaned",
        "config": "",
        "split": "train",
        "rows": "documents",
        "columns": "instruction, input, output",
        "template": "alpaca",
        "num_samples": 4,
        "num_heldout": 1,
        "seq_len": 8,
        "seed": 0,
        "join": "\n\n",
        "bos": "none",
    }


def test_lines_stay_in_their_order(sources: Sources, tmp_path: Path) -> None:
    """Every window is a piece of the text as perplexity joins it, whatever the seed; shuffled lines would not be."""
    asked = data("wikitext2")
    tokenizer = tiny_tokenizer()
    running = "\n\n".join(LINES)
    for seed in range(4):
        windows = fill(asked, sources, tmp_path, num_samples=4, seq_len=10, num_heldout=0, seed=seed)
        assert all(tokenizer.decode(ids) in running + "\n\n" for ids in windows.input_ids_NL)
    assert windows.source["rows"] == "lines"
