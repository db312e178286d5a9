"""YAML of data sets' cards and of lm-eval's tasks, read without running anything."""

from __future__ import annotations

from typing import Any

import yaml


# libyaml reads MMLU's files in a tenth of the time; not every PyYAML is built with it
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In which `!function module.name` is just its text."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def load_yaml(text: str | bytes) -> Any:
    """What the text says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)
