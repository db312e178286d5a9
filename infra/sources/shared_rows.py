"""Whether what is trained on and what is measured have rows in common: the same rows of one data set, or rows with the
same words (13 in a row, of a sample). A comparison of the same data is made once and remembered in the home.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from infra.keys import stage_key
from infra.overlap.splits import EVERY, Part, parts_of
from infra.overlap.words import shared_grams, word_grams
from infra.sources.find import Located, Sources, TextData

if TYPE_CHECKING:
    from infra.sources.data_files import DataFiles
    from infra.sources.excerpts import Excerpts

#: in the names that the hub's files have in `datasets`
_REVISION = re.compile(r"@[^/]*")

_VERSION = 1
"""Of what is remembered; counted up when the same data would be compared otherwise."""

_MOST_SAMPLED = 8
"""Of the parts of one data set, such as MMLU's 57 subjects, so many are sampled."""


class Reading(BaseModel):
    """What is read: rows of a data set, and of them some columns, or all that hold text. `text_field` plays no part."""

    model_config = ConfigDict(frozen=True)

    data: TextData
    columns: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        """E.g. "allenai/c4 (en, train)"."""
        data = self.data
        parts = filter(None, (data.config, data.data_files or data.split))
        return f"{data.dataset} ({', '.join(parts)})"


class Overlap(BaseModel):
    """What two readings have in common. same_rows: they read the same rows. Else num_shared of num_measured sampled
    texts of the one share 13 words in a row with num_trained sampled texts of the other; example: such a run of words.
    measured: where that was found."""

    model_config = ConfigDict(frozen=True)

    measured: str = ""
    same_rows: bool = False
    num_shared: int = 0
    num_measured: int = 0
    num_trained: int = 0
    example: str = ""

    def __bool__(self) -> bool:
        return self.same_rows or self.num_shared > 0


class SharedRows:
    """Compares readings that these sources find. open_files: the files of one split of a reading."""

    def __init__(self, sources: Sources, open_files: Callable[[Reading, TextData], DataFiles]) -> None:
        self._sources = sources
        self._open_files = open_files
        self._grams: dict[Reading, tuple[frozenset[str], int, bool]] = {}

    def between(self, trained: Reading, measured: Sequence[Reading], *, look: bool = True) -> Overlap | None:
        """What training on the one shows of the others, which are parts of one data set; None if that is not known and,
        with look=False, not looked for. Raises SourceMissing, and what reading raises."""
        memo = self._memo(trained, measured)
        known = _remembered(memo)
        if known is not None or not look:
            return known
        found = self._same_rows(trained, measured) or self._same_words(trained, measured)
        _remember(memo, found)
        return found

    def _memo(self, trained: Reading, measured: Sequence[Reading]) -> Path:
        identities = [self._find(reading).identity for reading in (trained, *measured)]
        readings = [reading.model_dump(mode="json") for reading in (trained, *measured)]
        key = stage_key("overlap", _VERSION, {"identities": identities, "readings": readings})
        return self._sources.home / "cache" / "overlaps" / f"{key}.json"

    def _find(self, reading: Reading) -> Located:
        return self._sources.find(reading.data.dataset, "dataset", revision=reading.data.revision)

    def _same_rows(self, trained: Reading, measured: Sequence[Reading]) -> Overlap | None:
        for reading in measured:
            if any(not (same and part.apart_from(other)) for part, other, same in self._touching(trained, reading)):
                return Overlap(same_rows=True, measured=reading.words)
        return None

    def _same_words(self, trained: Reading, measured: Sequence[Reading]) -> Overlap:
        from infra.sources.excerpts import MOST

        grams, num_trained, exact = self._grams_of(trained)
        texts: list[str] = []
        sampled = measured[:: -(-len(measured) // _MOST_SAMPLED)]
        for reading in sampled:
            sample = self._excerpts(reading, MOST // len(sampled))
            # of slices of the same files that lie apart only what is surely in them
            if (exact and sample.exact) or not any(self._touching(trained, reading)):
                texts += sample.texts
        shared = shared_grams(texts, grams)
        return Overlap(
            measured=measured[0].words if len(measured) == 1 else measured[0].data.dataset,
            num_shared=shared.num_texts,
            num_measured=len(texts),
            num_trained=num_trained,
            example=shared.example,
        )

    def _grams_of(self, trained: Reading) -> tuple[frozenset[str], int, bool]:
        """The runs of words of a sample, of how many texts it is, and whether it is of the very rows."""
        from infra.sources.excerpts import MOST

        if trained not in self._grams:
            sample = self._excerpts(trained, MOST)
            grams = frozenset(gram for text in sample.texts for gram in word_grams(text))
            self._grams = {trained: (grams, len(sample.texts), sample.exact)}  # of the last only: they are many
        return self._grams[trained]

    def _excerpts(self, reading: Reading, most: int) -> Excerpts:
        from infra.sources.excerpts import excerpts

        remote = self._find(reading).folder is None
        return excerpts(reading.data.split, self._opener(reading), reading.columns, first_only=remote, most=most)

    def _opener(self, reading: Reading) -> Callable[[str], DataFiles]:
        """The files of a split by its bare name."""
        return lambda split: self._open_files(reading, reading.data.model_copy(update={"split": split}))

    def _touching(self, trained: Reading, measured: Reading) -> Iterator[tuple[Part, Part, bool]]:
        """Pairs of parts ("train[:10%]") that read files in common, and whether all of them."""
        here, there = self._find(trained), self._find(measured)
        if not _may_be_one(here, there):
            return
        for part in parts_of(trained.data.split):
            for other in parts_of(measured.data.split):
                mine = _names(here, self._opener(trained)(part.name), beside=there)
                theirs = _names(there, self._opener(measured)(other.name), beside=here)
                if mine & theirs or (_hold_the_same(trained, measured) and _is_one_split(part, other)):
                    yield part, other, mine == theirs


def _may_be_one(here: Located, there: Located) -> bool:
    """Whether the two may be one data set: by name or content, or because one lies in the other's folder."""
    if any(there.identity.get(key) == value for key, value in here.identity.items() if key != "revision"):
        return True
    if here.folder is None or there.folder is None:
        return False
    one, other = here.folder.resolve(), there.folder.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _hold_the_same(trained: Reading, measured: Reading) -> bool:
    """Whether files of other names hold the same rows: those of another revision, or of a configuration "all"."""
    one, other = trained.data, measured.data
    if one.data_files is not None or other.data_files is not None:
        return False
    configs = {one.config, other.config}
    return (len(configs) == 2 and EVERY in configs) or (one.revision != other.revision and len(configs) == 1)


def _is_one_split(part: Part, other: Part) -> bool:
    return part.name == other.name or EVERY in (part.name, other.name)


def _names(located: Located, files: DataFiles, *, beside: Located) -> set[str]:
    """What the files are called, whatever the revision: of copies of one folder, inside it."""
    if located.folder is None:
        return {_REVISION.sub("", name, count=1) for name in files.names}
    if located.identity["content"] == beside.identity.get("content"):
        return {os.path.relpath(files.label(name), located.folder) for name in files.names}
    return {str(Path(name).resolve()) for name in files.names}


def _remembered(memo: Path) -> Overlap | None:
    try:
        return Overlap.model_validate_json(memo.read_bytes())
    except (OSError, ValidationError):
        return None


def _remember(memo: Path, found: Overlap) -> None:
    aside = memo.with_name(f".{memo.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):  # it only saves time
        memo.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(found.model_dump_json(), encoding="utf-8")
        aside.replace(memo)
