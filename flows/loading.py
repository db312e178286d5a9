"""Finding and reading a spec: a shipped name or a path, YAML, overrides from the command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.errors import SpecError
from flows.messages import first_problem
from flows.spec import RunSpec

SHIPPED = Path(__file__).parent / "specs"


def shipped_specs() -> dict[str, Path]:
    """The specs that come with slimline, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_spec(name_or_path: str, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec and apply overrides such as "steps.0.sparsity=0.5"; values are YAML.

    Raises SpecError with one sentence: no such spec, not YAML, unknown key (and the nearest known), value out of range.
    """
    path = _find(name_or_path)
    raw = _read_yaml(path)
    for override in overrides:
        _apply_(raw, override)
    return parse_spec(raw, source=str(name_or_path))


def parse_spec(raw: Any, *, source: str) -> RunSpec:
    """A RunSpec from plain data; `source` names it in the error."""
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(f"{source}: {first_problem(error, model=RunSpec)}") from error


def dump_spec(spec: RunSpec) -> str:
    """The spec as YAML with every default written out; `parse_spec` of it gives the same spec."""
    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    shipped = shipped_specs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    close = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SpecError(f"there is no spec file {name_or_path!r}{hint}; shipped specs: {', '.join(shipped)}")


def _read_yaml(path: Path) -> Any:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise SpecError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(raw, dict):
        raise SpecError(f"{path} holds no mapping; a spec has keys such as name, model, calibration, steps, evals")
    return raw


def _apply_(raw: dict[str, Any], override: str) -> None:
    """Set one value in place: keys by name, list entries by number; missing mappings on the way are created."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {override!r} is not of the form a.b.c=value, e.g. --set steps.0.sparsity=0.5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override!r}: the value is not valid YAML") from error
    place: Any = raw
    for key in keys[:-1]:
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[_index(place, key, override)]
    if isinstance(place, dict):
        place[keys[-1]] = value
    else:
        place[_index(place, keys[-1], override)] = value


def _index(place: Any, key: str, override: str) -> Any:
    if isinstance(place, dict):
        return key
    if isinstance(place, list):
        if key.isdigit() and int(key) < len(place):
            return int(key)
        raise SpecError(f"--set {override!r}: {key!r} is not an entry of a list of {len(place)}; count from 0")
    raise SpecError(f"--set {override!r}: there is nothing under {key!r}, its parent is a plain value")
