from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from infra import provenance
from tests.infra.processes import finish, start


def test_versions_are_those_of_the_installed_distributions() -> None:
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    for name in ("torch", "transformers", "lm-eval", "datasets", "peft", "prefect", "mlflow", "duckdb"):
        assert versions[name] == metadata.version(name)


def test_nobody_can_change_the_versions_for_others() -> None:
    provenance.versions()["torch"] = "0"
    assert provenance.versions()["torch"] != "0"


def test_nothing_is_imported_for_a_version() -> None:
    code = "import sys; from infra.provenance import versions; versions(); print('torch' in sys.modules)"
    assert finish(start(code)) == "False"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository, without commits, that has this module in it."""
    module = tmp_path / "infra" / "provenance.py"
    module.parent.mkdir()
    module.write_text(Path(provenance.__file__).read_text())
    monkeypatch.setattr(provenance, "__file__", str(module))
    _git(tmp_path, "init", "-q")
    return tmp_path


def _git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_revision_of_a_checkout(checkout: Path) -> None:
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-q", "-m", "first")
    revision = provenance.git_revision()
    assert re.fullmatch(r"[0-9a-f]{40}", revision or "")
    (checkout / "untracked.txt").write_text("x")
    assert provenance.git_revision() == revision
    (checkout / "infra" / "provenance.py").write_text("# changed")
    assert provenance.git_revision() == f"{revision}-dirty"


def test_somebody_elses_repository_is_not_ours(checkout: Path) -> None:
    (checkout / "their.txt").write_text("x")
    _git(checkout, "add", "their.txt")
    _git(checkout, "commit", "-q", "-m", "first")
    assert provenance.git_revision() is None


def test_no_repository_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_revision() is None


def test_no_git_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance.git_revision() is None
