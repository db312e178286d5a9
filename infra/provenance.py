"""What made a result: versions of the libraries and the revision of the code, without importing any of them."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = ("torch", "transformers", "lm-eval", "datasets", "peft", "prefect", "mlflow", "duckdb", "slimline")


def versions() -> dict[str, str]:
    """Version of Python and of every installed distribution that can influence a result; absent ones are left out."""
    return dict(_versions())


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in DISTRIBUTIONS:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def git_revision() -> str | None:
    """Commit of the checkout this code runs from, with "-dirty" if tracked files differ; None outside a checkout."""
    # An installed wheel may lie inside somebody else's repository: only a repository that tracks this file is ours.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", "--untracked-files=no", ":/")
    return revision and (f"{revision}-dirty" if dirty else revision)


def _git(*arguments: str) -> str | None:
    """Output of a git command in this file's folder, or None when it fails or git is not there."""
    # Inside a git hook GIT_DIR points at the repository of the hook, which need not be this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
