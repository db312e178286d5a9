from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import InfraError, UnknownName
from infra.registry import available, did_you_mean, load


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of plug-ins, one of which must not be imported by chance."""
    folder = tmp_path / "plugins_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "slimgpt.py").write_text("VERSION = 2\n")
    (folder / "llm_pruner.py").write_text("VERSION = 1\n")
    (folder / "explodes.py").write_text("raise RuntimeError('imported')\n")
    (folder / "_layer_walk.py").write_text("")
    (folder / "not-a-name.py").write_text("")
    (folder / "notes.md").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder.name
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def test_the_file_name_is_the_registry_and_nothing_is_imported(package: str) -> None:
    assert available(package) == ("explodes", "llm_pruner", "slimgpt")
    assert f"{package}.explodes" not in sys.modules


def test_a_new_file_is_there_at_once(package: str, tmp_path: Path) -> None:
    assert "flap" not in available(package)
    (tmp_path / package / "flap.py").write_text("VERSION = 7\n")
    assert "flap" in available(package)
    assert load(package, "flap", "method").VERSION == 7


def test_load(package: str) -> None:
    assert load(package, "slimgpt", "method").VERSION == 2


def test_unknown_names_get_a_suggestion(package: str) -> None:
    with pytest.raises(UnknownName) as caught:
        load(package, "slimgtp", "method")
    assert str(caught.value) == (
        "unknown method 'slimgtp'; did you mean 'slimgpt'? available: explodes, llm_pruner, slimgpt"
    )
    assert isinstance(caught.value, InfraError)


@pytest.mark.parametrize("name", ["_layer_walk", "../slimgpt", "slimgpt.x", "", "os", "not-a-name"])
def test_only_public_modules_are_names(package: str, name: str) -> None:
    with pytest.raises(UnknownName, match="available: explodes, llm_pruner, slimgpt"):
        load(package, name, "method")


def test_an_error_inside_a_plug_in_is_not_hidden(package: str) -> None:
    with pytest.raises(RuntimeError, match="imported"):
        load(package, "explodes", "method")


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("LLM-Pruner", "; did you mean 'llm_pruner'?"),
        ("SlimGPT", "; did you mean 'slimgpt'?"),
        ("slim_gpt", "; did you mean 'slimgpt'?"),
        ("magnitude", ""),
        ("", ""),
    ],
)
def test_near(name: str, clause: str) -> None:
    assert did_you_mean(name, ["slimgpt", "llm_pruner"]) == clause


def test_the_packages_of_this_project_are_readable() -> None:
    for package in ("pruning.methods", "pruning.recovery", "evaluation.suites"):
        assert isinstance(available(package), tuple)
