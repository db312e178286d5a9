"""What goes elsewhere names no folder of this machine and holds no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from infra.secrets import redacted
from infra.sources.safe_names import is_repository_id

#: an absolute path, or one below a home; a URL's is not: its slashes follow a colon, a slash or a letter
_PATH = re.compile(r"(?<![\w:/.<])~?/(?:[^\s\"',;|`/\\]+/)*([^\s\"',;|`/\\]+)/?")


def public(value: Any) -> Any:
    """The same with the last part alone of every path, and *** in the place of secrets; of plain data every string."""
    if isinstance(value, str):
        return _PATH.sub(r"\1", redacted(value))
    if isinstance(value, Mapping):
        return {public(key): public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    return value


def repository(name: str) -> str | None:
    """The id of a model or data set on the hub (owner/name); None for a folder, which has a name only here."""
    return name if is_repository_id(name) and name.count("/") == 1 and not name.startswith("slimline/") else None


def short_name(name: str) -> str:
    """Of a model: without its owner, or the folders that it lies in."""
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
