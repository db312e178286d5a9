"""What every spec is checked for before it is typed, and errors as one sentence: pydantic's (where, what, the nearest
key that exists), and any that a terminal shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from infra.registry import did_you_mean
from infra.secrets import place_of_secret
from infra.sources.safe_names import check_data_files, check_name, check_revision

#: of what a mapping with a `dataset` says, which may not lead out of the data set
_NAME_CHECKS: Mapping[str, Callable[[str | None], str | None]] = {
    "data_files": check_data_files,
    "config": check_name,
    "split": check_name,
    "revision": check_revision,
}

#: what pydantic adds to the place of an error in a union, which the user did not write
_TAG = re.compile(r"prune|recover|str|int|function-.*|literal\[.*|`?tuple\[.*|\[key\]")

#: of a word, which may be a path, and of a whole sentence
_LONGEST_WORD, _LONGEST = 300, 1500


def refuse_unsafe(raw: Any) -> Any:
    """The plain values of a spec, as they are. Raises ValueError, naming the key, for tokens and passwords, and for
    names that lead out of a data set: before values are typed, so that no later message can repeat a secret."""
    place = place_of_secret(raw)
    if place is not None:
        raise ValueError(
            f"{place} holds a token or password; a spec is recorded and shown: take it out, and give it to the program "
            "that needs it as environment variable (HF_TOKEN, MLFLOW_TRACKING_PASSWORD, ...)"
        )
    for where, data in _data_sets(raw):
        for key, check in _NAME_CHECKS.items():
            if isinstance(data.get(key), str):
                try:
                    check(data[key])
                except ValueError as error:
                    raise ValueError(f"{where}.{key}".lstrip(".") + f": {error}") from error
    return raw


def _data_sets(raw: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping that names a data set, and where it stands."""
    if isinstance(raw, Mapping):
        if "dataset" in raw:
            yield place, raw
        for key, inner in raw.items():
            yield from _data_sets(inner, f"{place}.{key}".lstrip("."))
    elif isinstance(raw, list | tuple):
        for index, inner in enumerate(raw):
            yield from _data_sets(inner, f"{place}.{index}".lstrip("."))


def first_problem(
    error: ValidationError, *, also_known: Iterable[str] = (), model: type[BaseModel] | None = None
) -> str:
    """The first thing wrong, e.g. "unknown key 'sparsty' in steps.0; did you mean 'sparsity'?".

    also_known: further keys that are allowed at the top. model: where to look up the keys that exist.
    """
    problem = error.errors(include_url=False)[0]
    location: Sequence[Any] = problem["loc"]
    if problem["type"] == "extra_forbidden":
        known = [*_keys_at(model, location[:-1]), *(also_known if len(location) == 1 else ())]
        return _unknown_key(str(location[-1]), location[:-1], known)
    where = ".".join(str(part) for part in location if not _TAG.fullmatch(str(part)))
    message = _without_python_types(problem["msg"].removeprefix("Value error, "))
    if problem["type"] in ("value_error", "step_kind"):
        return f"{where}: {message}" if where else message
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "string_pattern_mismatch":  # all patterns of a spec are those of names
        message = "A name is made of letters, digits, '.', '_' and '-', and begins with a letter or digit"
    shown = repr(problem["input"])
    return f"{where} = {shown if len(shown) < 80 else shown[:77] + '...'}: {message[0].lower()}{message[1:]}"


def one_line(text: str) -> str:
    """A message as one line that a terminal can show: what a user, a file or a library put into it may be anything."""
    text = "".join(sign if sign.isprintable() else _escaped(sign) for sign in text.strip())
    text = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: _shortened(word.group(), _LONGEST_WORD), text)
    return _shortened(text, _LONGEST)


def _escaped(sign: str) -> str:
    return " " if sign.isspace() else sign.encode("unicode_escape").decode()


def _shortened(text: str, longest: int) -> str:
    """The text with its middle left out if it is too long: how it begins and how it ends tell most."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} ... {text[-longest // 4 :]}"


def _without_python_types(message: str) -> str:
    """A YAML file has mappings and lists, no dictionaries and tuples."""
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message)
    return message.replace("a valid tuple", "a list").replace("tuple should", "list should")


def _unknown_key(key: str, inside: Sequence[Any], known: Sequence[str]) -> str:
    where = f" in {'.'.join(str(part) for part in inside)}" if inside else ""
    names = f"; known: {', '.join(known)}" if known else ""
    return f"unknown key {key!r}{where}{did_you_mean(key, known)}{names}"


def _keys_at(model: type[BaseModel] | None, location: Sequence[Any]) -> list[str]:
    """Field names of the model found by following a location from `model`; empty where that leaves plain models."""
    for part in location:
        if model is None:
            return []
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        model = _model_in(field.annotation) if field else None
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside X | None, tuple[X, ...] and the like, if there is just one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = {inner for part in getattr(annotation, "__args__", ()) if (inner := _model_in(part)) is not None}
    return models.pop() if len(models) == 1 else None
