"""Text columns of data sets: read whole, or looked at before work begins. Import it late, as `datasets`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import SourceUnreadable
from infra.log_once import warn_once
from infra.sources import datasets
from infra.sources.data_files import check_text, missing_column
from infra.sources.located import Located

#: of a folder's files: more is streamed
_STREAMED_FROM = 2 * 2**30


def _bytes_below(folder: Path) -> int:
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True)
class TextColumns:
    """Which rows of a located data set, and what of them. home: as of Sources."""

    located: Located
    config: str | None
    split: str
    data_files: str | None
    columns: tuple[str, ...]
    home: Path

    def read(self) -> dict[str, list[str]]:
        """The texts by column, in order; a .txt file is a single text, in the column "text".

        Files may differ in other columns. A null is read as "", with one warning that names its row. Raises
        SourceInvalid naming the configs, splits or columns there are, for what says nothing about a single file, and
        naming the row for what is not text; SourceUnreadable naming the file that is damaged, or if there is no text.
        """
        values = self._values()
        for column, texts in values.items():
            self._say_nulls(column, texts)
        if not any(text for texts in values.values() for text in texts):
            names = ", ".join(self.columns)
            raise SourceUnreadable(f"{self.located.repo_id}: there is no text in {names}; name another data set")
        return {column: [text or "" for text in texts] for column, texts in values.items()}

    def shuffled(self, seed: int) -> Iterator[str]:
        """The texts of the only column that are not empty, in a seeded order; see Sources.shuffled_texts."""
        (column,) = self.columns
        if self.located.folder is not None and _bytes_below(self.located.folder) <= _STREAMED_FROM:
            texts = self.read()[column]
            random.Random(seed).shuffle(texts)
            yield from (text for text in texts if text)
            return
        rows = datasets.stream(self.located, self.config, self.split, self.data_files, seed=seed, home=self.home)
        with datasets.explained(self.located, self.config, self.split, self.home):
            for number, row in enumerate(rows):
                if column not in row:
                    raise missing_column(self.located.repo_id, column, list(row))
                check_text(self.located.repo_id, column, number, row[column])
                if row[column]:
                    yield row[column]

    def check(self) -> None:
        """Raise what `read` would raise, as far as the first pieces of the files tell (of the hub's only the first
        file): see infra/sources/data_files.py."""
        files = self._files(self.split)
        files = replace(files, names=files.names[: 1 if self.located.folder is None else None])
        with datasets.explained(self.located, self.config, self.split, self.home):
            text = files.check(self.columns)
        if not text and self.located.folder is not None:
            self.read()  # so that what has no text at all is refused, however it is read

    def _values(self) -> dict[str, list[str | None]]:
        """From the table of all files, which `datasets` keeps, or file by file where there can be none."""
        try:
            rows = datasets.load(self.located, self.config, self.split, self.data_files, home=self.home)
            for column in self.columns:
                if column not in rows.column_names:
                    raise missing_column(self.located.repo_id, column, rows.column_names)
            values: dict[str, list[Any]] = {column: list(rows[column]) for column in self.columns}
        except (SourceUnreadable, UnicodeDecodeError):  # the latter only when a text is looked at
            return self._file_by_file()
        for column, texts in values.items():
            if not all(isinstance(text, str | None) for text in texts):
                self._file_by_file()  # says which file
                for row, text in enumerate(texts):
                    check_text(self.located.repo_id, column, row, text)
        return values

    def _file_by_file(self) -> dict[str, list[str | None]]:
        """Each file by its own types, where they fit into no common table."""
        names = datasets.split_names(self.split)
        whole = {name: self._files(name).read(self.columns) for name in names}
        lengths = {name: len(values[self.columns[0]]) for name, values in whole.items()}
        parts = datasets.part_of(self.split, lengths)
        return {column: [text for name, rows in parts for text in whole[name][column][rows]] for column in self.columns}

    def _say_nulls(self, column: str, texts: Sequence[str | None]) -> None:
        missing = sum(text is None for text in texts)
        if missing:
            row = texts.index(None)
            whole = self.located.folder is not None and datasets.split_names(self.split) == [self.split]
            place = self._files(self.split).place_of(row) if whole else f"row {row}"
            rows = f"{missing} of {len(texts)} rows of {self.split} have no text in {column!r}"
            warn_once(f"{self.located.repo_id}: {rows}, the first is {place}; they are read as empty")

    def _files(self, split: str) -> Any:
        return datasets.files_of(self.located, self.config, split, self.data_files, home=self.home)
