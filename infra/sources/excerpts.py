"""A seeded sample of what a data set says, from the beginnings of some of its files: it takes a second or so, however
large the data set is. Import it late, as `datasets`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from infra.overlap.splits import parts_of
from infra.sources.data_files import DataFiles
from infra.sources.datasets import part_of

MOST = 2000
"""Texts in a sample, unless fewer are asked for."""

LONGEST = 2000
"""Characters of a text; what is longer counts as several."""

#: of one data set: Arrow's bytes of the wanted columns, and files, each of which is read to its share of the bytes
_MOST_BYTES = 32 * 2**20
_MOST_FILES = 16

_SEED = "excerpts"

T = TypeVar("T")


@dataclass(frozen=True)
class Excerpts:
    """Sampled texts. exact: they are of the very rows that were asked for; else a slice ("train[90%:]") was asked of
    files that were not read to their end, and the texts may be of any rows of the split."""

    texts: tuple[str, ...]
    exact: bool


@dataclass(frozen=True)
class _Taken:
    """What was read of a split. whole: all of it was."""

    tables: tuple[pa.Table, ...]
    whole: bool

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def rows(self) -> Iterator[tuple[pa.Table, int]]:
        return ((table, row) for table in self.tables for row in range(len(table)))


def excerpts(
    split: str,
    open_files: Callable[[str], DataFiles],
    columns: Sequence[str] | None,
    *,
    first_only: bool,
    most: int = MOST,
) -> Excerpts:
    """At most so many texts of a split, the same in every process: of a row all its columns, or all that hold text.

    open_files: the files of a split by its bare name. first_only: of several files only the first is read. Raises
    SourceUnreadable for a damaged file, and what `open_files` raises.
    """
    draw = random.Random(_SEED)
    names = dict.fromkeys(part.name for part in parts_of(split))
    taken = {name: _take(open_files(name), columns, draw, first_only) for name in names}
    exact = "[" not in split or all(each.whole for each in taken.values())
    rows = [row for each in taken.values() for row in each.rows()]
    if "[" in split and exact:
        slices = part_of(split, {name: len(each) for name, each in taken.items()})
        rows = [row for name, part in slices for row in list(taken[name].rows())[part]]
    texts = [_text(table, row) for table, row in _sample(rows, most, draw)]
    pieces = [text[start : start + LONGEST] for text in texts for start in range(0, len(text), LONGEST)]
    return Excerpts(tuple(_sample(pieces, most, draw)), exact)


def _take(files: DataFiles, columns: Sequence[str] | None, draw: random.Random, first_only: bool) -> _Taken:
    names = files.names[:1] if first_only else files.names
    chosen = set(draw.sample(names, min(_MOST_FILES, len(names))))
    whole, tables = len(chosen) == len(set(files.names)), []
    for name in [name for name in names if name in chosen]:
        left = _MOST_BYTES // len(chosen)
        for _, table in files.pieces(name):
            if left <= 0:
                whole = False
                break
            tables.append(_wanted(table, columns))
            left -= tables[-1].nbytes
    return _Taken(tuple(tables), whole)


def _wanted(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    if columns is not None:
        return table.select([name for name in columns if name in table.column_names])
    return table.select([field.name for field in table.schema if _holds_text(field.type)])


def _holds_text(kind: pa.DataType) -> bool:
    """Whether there are texts somewhere in values of this type: the choices of a question are often a list of them."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))


def _sample(values: Sequence[T], most: int, draw: random.Random) -> list[T]:
    """So many of them in their order, or all."""
    return [values[index] for index in sorted(draw.sample(range(len(values)), min(most, len(values))))]


def _text(table: pa.Table, row: int) -> str:
    """All texts of a row in one: a question and its answers are read one after another."""
    return " ".join(part for column in table.columns for part in _texts(column[row].as_py()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
