"""YAML as people mean it: what stands there twice is refused, and words are not silently turned into something else.

The one reader of what users write: specs, `--set` values, cards of local data sets.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from infra.errors import YamlInvalid

#: nodes of a document with its anchors written out, and levels: more is no spec but a trap
_LARGEST, _DEEPEST = 1_000_000, 100
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises: a bare `on` (a key of ours), yes, no or off is a word, as are 2024-01-01
    and 1:30; 0123 is not octal; 1e-4 is a number. Pydantic makes of words what a key asks for. Merge keys (`<<`) are
    as in YAML 1.1."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[Node, int] = {}
        self._level = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """A node, if it is not too large with all that its anchors stand for."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._level += 1
        if self._level > _DEEPEST:
            raise ComposerError(None, None, f"this lies in more than {_DEEPEST} levels of brackets", mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is not None and node not in self._sizes:
            raise ComposerError(None, None, "an anchor stands for something that it lies in", mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        """A scalar, which counts as one node."""
        return self._measured(super().compose_scalar_node(anchor), 0)

    def compose_sequence_node(self, anchor: Any) -> Any:
        """A list, which counts with all that is in it."""
        node = super().compose_sequence_node(anchor)
        return self._measured(node, sum(self._sizes[entry] for entry in node.value))

    def compose_mapping_node(self, anchor: Any) -> Any:
        """A mapping without a key that it has already. Looked at before merge keys are resolved: those may override."""
        node = super().compose_mapping_node(anchor)
        _refuse_twice(node)
        return self._measured(node, sum(self._sizes[key] + self._sizes[value] for key, value in node.value))

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; one that its explicit tag denies is an error of YAML, too."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # half of a surrogate pair is no text
            return value
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"{str(node.value)[:40]!r} is no {kind}", node.start_mark) from error

    def _measured(self, node: Any, inside: int) -> Any:
        self._sizes[node] = 1 + inside
        if self._sizes[node] > _LARGEST:
            raise ComposerError(None, None, "its anchors stand for millions of values", node.start_mark)
        return node


_INT = r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+][0-9]+"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_OURS = {"bool": r"true|True|TRUE|false|False|FALSE", "int": _INT, "float": _FLOAT, "timestamp": None, "value": None}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in resolvers if tag.rpartition(":")[2] not in _OURS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _words in _OURS.items():
    if _words is not None:
        _Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_words})$"), list("-+.0123456789tTfF")
        )


def load_yaml(content: bytes | str) -> Any:
    """What the one document says.

    Raises YamlInvalid, with the line: no YAML, a key twice in a mapping (with both lines), several documents, anchors
    that lead in a circle or stand for too much; UnicodeDecodeError for bytes that are neither UTF-8 nor UTF-16.
    """
    text = content
    if isinstance(text, bytes):
        text = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        invalid = _invalid(error, text)
    # outside: hundreds of frames of a deep document would hang on it, and Dask pickles the traces of causes too
    raise invalid


def _invalid(error: yaml.YAMLError | RecursionError, text: str) -> YamlInvalid:
    if isinstance(error, RecursionError):
        return YamlInvalid("it has too many levels of brackets", None)
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        return YamlInvalid(f"the character {chr(error.character)!r} cannot be in it", line)
    mark = getattr(error, "problem_mark", None)
    words = str(getattr(error, "problem", None) or error)
    if words.startswith("but "):  # the second half of a sentence
        words = f"{getattr(error, 'context', '')}, {words}"
    return YamlInvalid(words, mark.line + 1 if mark else None)


def _refuse_twice(node: MappingNode) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode) or key.tag == _MERGE:
            continue
        line, name = key.start_mark.line + 1, (key.tag, key.value)
        if name in first:
            places = f"in line {first[name]} and in line {line}" if line != first[name] else f"in line {line}"
            raise ComposerError(
                None, None, f"the key {key.value!r} is there twice, {places}; take one of them out", key.start_mark
            )
        first[name] = line
