"""`slimline figure` as users type it: lists, draws, refuses before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.results.store import ResultsStore
from tests.command_line import Answer, call
from tests.flows.records.figures.test_figures import layers
from tests.infra.result_examples import checkpoints, pruned, run_row


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("figure")
    one = pruned(0.2)
    ResultsStore(home / "results.duckdb").record(
        run_row("r1"), layers=layers("r1", one.name, [0.1, 0.2]), checkpoints=checkpoints("r1", one)
    )
    return home


def figure(home: Path, *words: str) -> Answer:
    answer = call("figure", *words, variables={"SLIMLINE_HOME": str(home)})
    assert not answer.escaped, answer.escaped
    return answer


def test_figures_are_listed_and_drawn(home: Path, tmp_path: Path) -> None:
    listed = figure(home).output
    assert listed.startswith("slimgpt-2 ")
    assert "history" in listed
    for name, start in (("a.svg", b"<?xml"), ("b.PNG", b"\x89PNG"), ("c.pdf", b"%PDF")):
        out = tmp_path / name
        answer = figure(home, "slimgpt-2", "--run", "demo", "--out", str(out))
        assert answer.code == 0, answer.errors
        assert f"slimgpt-2 is in {out}" in answer.output
        assert out.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("slimgpt-2", "--out", "figure.jpg"), "its name must end in .svg, .png or .pdf"),
        (("slimgpt-2", "--out", "figure"), "its name must end in .svg, .png or .pdf"),
        (("slimgpt-2", "--out", "nowhere/figure.svg"), "give a file in a folder that exists"),
        (("slimgpt2",), "no figure 'slimgpt2'; did you mean 'slimgpt-2'?"),
        (("slimgpt-2", "--run", "dmo"), "no run 'dmo'; did you mean 'demo'?"),
        (("kept",), "not in the artifact store any more; what makes them again: slimline retry demo"),
        (("history",), "what fills it: slimline nightly smollm2-135m"),
    ],
)
def test_what_you_can_mend_is_one_sentence(home: Path, words: tuple[str, ...], complaint: str) -> None:
    answer = figure(home, *words)
    assert answer.code == 2
    assert complaint in answer.sentence
