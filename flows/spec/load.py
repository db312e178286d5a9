"""Finding and reading the spec of a run or of a night: a shipped name or a path, YAML, overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from flows.errors import SpecError
from flows.spec.night import NightSpec
from flows.spec.run import RunSpec
from flows.spec.start_folder import with_start_folder
from flows.spec.validation import first_problem
from infra.errors import YamlInvalid
from infra.registry import did_you_mean
from infra.secrets import redacted, secrets_kept
from infra.strict_yaml import load_yaml

S = TypeVar("S", bound=BaseModel)

SHIPPED = Path(__file__).parents[1] / "specs"


def shipped_specs() -> dict[str, Path]:
    """The specs that come with slimline, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def shipped_nights() -> dict[str, Path]:
    """The nights that come with slimline, by name."""
    return {path.stem: path for path in sorted((SHIPPED / "nights").glob("*.yaml"))}


def load_spec(name_or_path: str, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a spec and apply overrides such as "steps.0.sparsity=0.5"; values are YAML. Its relative paths start in the
    current folder, which the spec that is returned names.

    Raises SpecError with one sentence: no such spec, not YAML, unknown key (and the nearest known), value out of range.
    """
    raw = _read(name_or_path, overrides, shipped_specs(), "spec")
    if "matrix" in raw:
        raise SpecError(
            f"{name_or_path} is a night, since it has a `matrix`; run it with: slimline nightly {name_or_path}"
        )
    return with_start_folder(parse_spec(raw, source=str(name_or_path)))


def load_night(name_or_path: str, overrides: Sequence[str] = ()) -> NightSpec:
    """The same for a night. Raises SpecError."""
    raw = _read(name_or_path, overrides, shipped_nights(), "night")
    if "matrix" not in raw:
        raise SpecError(f"{name_or_path} has no `matrix`, so it is no night; run it with: slimline run {name_or_path}")
    return with_start_folder(parse_night(raw, source=str(name_or_path)))


def find_spec(name_or_path: str) -> Path:
    """The file of a run's or a night's spec. Raises SpecError."""
    return _find(name_or_path, shipped_specs() | shipped_nights(), "spec")


def is_night(name_or_path: str) -> bool:
    """Whether it is a night's spec; a name that both a run and a night have is the night's. Raises SpecError."""
    return "matrix" in _read_yaml(find_spec(name_or_path))


def parse_spec(raw: Any, *, source: str) -> RunSpec:
    """A RunSpec from plain data; `source` names it in the error. Raises SpecError."""
    return _parse(RunSpec, raw, source)


def parse_night(raw: Any, *, source: str) -> NightSpec:
    """A NightSpec from plain data; `source` names it in the error. Raises SpecError."""
    return _parse(NightSpec, raw, source)


def dump_spec(spec: RunSpec) -> str:
    """The spec as YAML with every default written out; `parse_spec` of it gives the same spec."""
    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _parse(model: type[S], raw: Any, source: str) -> S:
    with secrets_kept():  # pydantic's error repeats the input
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            raise SpecError(f"{source}: {first_problem(error, model=model)}") from error


def _read(name_or_path: str, overrides: Sequence[str], shipped: dict[str, Path], noun: str) -> dict[str, Any]:
    raw = _read_yaml(_find(name_or_path, shipped, noun))
    for override in overrides:
        _apply_(raw, override)
    return raw


def _find(name_or_path: str, shipped: dict[str, Path], noun: str) -> Path:
    path = os.path.expanduser(name_or_path)
    if os.path.isfile(path):  # unlike Path.is_file it also takes what no path can be
        return Path(path)
    if name_or_path in shipped:
        return shipped[name_or_path]
    hint = did_you_mean(name_or_path, shipped)
    raise SpecError(f"there is no {noun} file {name_or_path!r}{hint}; shipped {noun}s: {', '.join(shipped)}")


def read_raw(path: Path) -> Any:
    """What a spec's file says, whether it makes a spec or not. Raises SpecError."""
    try:
        return load_yaml(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {redacted(str(error))}") from error
    except YamlInvalid as error:
        line = f" (line {error.line})" if error.line else ""
        raise SpecError(f"{path}{line} is not valid YAML: {redacted(str(error))}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    raw = read_raw(path)
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
        value = load_yaml(text)
    except YamlInvalid as error:
        raise SpecError(f"--set {override!r}: the value is not valid YAML: {error}") from error
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
