"""The file name is the registry: a module in a package is a method, recovery or suite of that name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from infra.errors import UnknownName


def available(package: str) -> tuple[str, ...]:
    """Sorted names of the modules in `package`, none of them imported; "_private" ones are left out."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    assert folders is not None, f"{package} is not a package"
    names = (module.name for module in pkgutil.iter_modules(folders))
    return tuple(sorted(name for name in names if name.isidentifier() and not name.startswith("_")))


def load(package: str, name: str, noun: str) -> ModuleType:
    """Import the module `name` of `package`. Raises UnknownName, worded with `noun` ("method", "suite")."""
    known = available(package)
    if name not in known:
        raise UnknownName(
            f"unknown {noun} {name!r}{did_you_mean(name, known) or ';'} available: {', '.join(known) or 'none'}"
        )
    return importlib.import_module(f"{package}.{name}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The clause "; did you mean 'x'?" for the known name most like `name`, or "" if none is close."""
    folded = {_fold(candidate): candidate for candidate in known}
    match = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return f"; did you mean {folded[match[0]]!r}?" if match else ""


def _fold(name: str) -> str:
    # "LLM-Pruner" is what papers write, "llm_pruner" is what a file can be called.
    return name.casefold().replace("-", "_").replace(" ", "_")
