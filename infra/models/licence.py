"""Under which licence a model came: what its model card or its GGUF header says, and the texts that lie beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import SourceInvalid, YamlInvalid
from infra.models.gguf_header import read_gguf_header
from infra.strict_yaml import load_yaml

#: files by these names have to go wherever the weights go
_TEXTS = re.compile(r"(licen[cs]e|notice|use[_-]?policy|copying)([._-].*)?(\.(txt|md|pdf))?", flags=re.IGNORECASE)
_HEAD = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Licence:
    """identifier: as the hub spells it ("apache-2.0", "llama3.2", "other"). name, link: of one that the hub has no
    word for."""

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The keys of a model card."""
        values = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in values.items() if value}


def licence_of(model: Path) -> Licence | None:
    """The licence that a model folder or a GGUF file names; None if it names none that can be read."""
    gguf = sorted(model.glob("*.gguf"))[:1] if model.is_dir() else [model] if model.suffix == ".gguf" else []
    card = model / "README.md"
    if model.is_dir() and card.is_file() and (found := _from_mapping(_head_of(card), "license")):
        return found
    try:
        return _from_mapping(read_gguf_header(gguf[0]).values, "general.license") if gguf else None
    except SourceInvalid:
        return None


def licence_texts(model: Path) -> tuple[Path, ...]:
    """The files of a model folder that have to go along: LICENSE, NOTICE, USE_POLICY and the like."""
    if not model.is_dir():
        return ()
    return tuple(file for file in sorted(model.iterdir()) if file.is_file() and _TEXTS.fullmatch(file.name))


def _head_of(card: Path) -> Mapping[str, Any]:
    head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    try:
        values = load_yaml(head[1]) if head else None
    except YamlInvalid:
        return {}
    return values if isinstance(values, dict) else {}


def _from_mapping(values: Mapping[str, Any], key: str) -> Licence | None:
    def word(name: str) -> str | None:
        value = values.get(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return value.strip() if isinstance(value, str) and value.strip() else None

    joint = "_" if key == "license" else "."
    identifier, name, link = word(key), word(f"{key}{joint}name"), word(f"{key}{joint}link")
    if identifier is None and name is None:
        return None
    return Licence((identifier or "other").lower(), name, link)
