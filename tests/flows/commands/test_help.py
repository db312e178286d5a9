"""`slimline help`: every topic in a line, keys and variables from the code, and a way out of a misspelt name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field
from typer.main import get_command

from flows.__main__ import app
from flows.commands.help import keys_of, page, topics
from flows.errors import SpecError

ROOT = Path(__file__).parents[3]
TOPICS = ROOT / "flows/commands/topics"


class Base(BaseModel):
    first: int = Field(gt=0)
    """How many,
    on two lines."""


class Part(Base):
    mode: Literal["a", "b"] | None = None
    """The mode."""
    sizes: tuple[Annotated[int, Field(gt=0)] | Literal["max"], ...] = (1, 2)
    ends: tuple[float, float] = (0.5, 1.0)
    join: str = "\n"
    inner: Base = Base(first=1)
    mirror: str | tuple[str, ...] = "hub"


def shown(*words: str) -> None:
    get_command(app).main(["help", *words], standalone_mode=False)


def test_every_topic_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown()
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines[: lines.index("")]]
    assert named == list(topics())
    assert {path.stem for path in TOPICS.glob("*.md")} | {"slimgpt", "lora", "perplexity"} <= set(named)
    assert len(named) == len(set(named))


def test_a_topic_has_its_keys_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    shown("spec")
    text = capsys.readouterr().out
    assert "[keys: " not in text
    assert "  trust_remote_code: true | false = false\n      Run the code" in text
    assert "  sparsities" not in text  # of a step: no key in YAML


def test_every_page_can_be_made() -> None:
    for name in topics():
        text = page(name)
        assert text.startswith("# ")
        assert "[keys: " not in text
        assert max(map(len, text.splitlines())) < 150


def test_a_plugin_is_a_topic() -> None:
    assert "  curve: log_increase | linear_increase" in page("slimgpt")
    assert "arXiv 2412.18110" in page("slimgpt")


def test_a_command_is_one_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        shown("plan")
    assert left.value.code == 0
    assert "slimline plan" in capsys.readouterr().out


def test_a_misspelt_topic_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"no topic 'securty'; did you mean 'security'\?; there are: ablations, "):
        shown("securty")


def test_keys_in_the_words_of_yaml() -> None:
    assert keys_of(Part).splitlines() == [
        "  first: int (required)",
        "      How many, on two lines.",
        "  mode: a | b (optional)",
        "      The mode.",
        "  sizes: list of int | max = [1, 2]",
        "  ends: list of 2 number = [0.5, 1.0]",
        '  join: text = "\\n"',
        "  inner: mapping (optional)",
        "  mirror: text | list of text = hub",
    ]


def test_the_topics_are_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["flows"]
    assert set(TOPICS.iterdir()) == {path for pattern in patterns for path in (ROOT / "flows").glob(pattern)} & set(
        TOPICS.iterdir()
    )
