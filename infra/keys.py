"""Identity of a stage: the same request gives the same key in every process, on every machine, in every run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from pydantic import BaseModel

from infra.errors import NotCanonical

_LABEL = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_HEX_DIGITS = 16


def canonical_json(value: object) -> str:
    """One text per value: sorted keys, no spaces, ASCII, floats by repr, tuples as lists, pydantic models as JSON.

    The int 1 and the float 1.0 are different values (`1`, `1.0`): a pydantic field of type float makes both 1.0 before
    they come here. -0.0 is 0.0. Raises NotCanonical, naming the place, for NaN and infinities, sets (their order
    differs between processes), paths (they say where, not what), and anything without a JSON form.
    """
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False)


def stage_key(label: str, version: int, inputs: Mapping[str, object]) -> str:
    """The key of a stage, such as `prune-slimgpt-v2-0123456789abcdef`: label, version, 16 hex of sha256 of the inputs.

    `label` may be a plug-in's file name: underscores become dashes, since Prefect allows none in an artifact key.
    """
    slug = label.replace("_", "-")
    assert _LABEL.fullmatch(slug), f"{label!r} is no label: lower case letters, digits and single dashes"
    digest = hashlib.sha256(canonical_json(inputs).encode("ascii")).hexdigest()
    return f"{slug}-v{version}-{digest[:_HEX_DIGITS]}"


def slug(name: str) -> str:
    """A name as part of a key: lower case letters and digits, joined by dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _plain(value: object, where: str) -> object:
    """`value` made of dict, list, str, int, float, bool and None only."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return _finite(float(value), where)
        case BaseModel():
            # The JSON dump makes a set a list of accidental order and a path a string: look before it does.
            for problem in _unfit(value.model_dump(), where):
                raise NotCanonical(problem)
            return _plain(value.model_dump(mode="json"), where)
        case Mapping():
            return {_name(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    reason = f"{where} is a {type(value).__name__}, which has no canonical JSON form"
    raise NotCanonical(next(_unfit(value, where), reason))


def _finite(number: float, where: str) -> float:
    if not math.isfinite(number):
        raise NotCanonical(f"{where} is {number!r}: only finite numbers can identify a stage; give a number or null")
    return number + 0.0  # -0.0 == 0.0, so they must not make two keys


def _name(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise NotCanonical(f"{where} has the key {key!r}: only strings can name fields; write it as a string")
    return key


def _unfit(value: object, where: str) -> Iterator[str]:
    """Sentences about sets and paths anywhere inside `value`."""
    if isinstance(value, set | frozenset):
        yield f"{where} is a set, whose order differs between processes; give a sorted list"
    elif isinstance(value, PurePath):
        yield f"{where} is the path {str(value)!r}, which says where and not what; give its content fingerprint"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unfit(item, f"{where}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from _unfit(item, f"{where}[{index}]")
