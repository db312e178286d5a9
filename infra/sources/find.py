"""Where data and models come from: mirror folders, the offline default, the hub.

Nothing else, and never silently another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, field_validator

from infra import hub
from infra.errors import SourceInvalid, SourceMissing
from infra.hub import RepoType
from infra.offline.default import OfflineDefault
from infra.settings import HUB_WORD, OFFLINE_WORD, Settings, mirror_entries, mirror_folders
from infra.sources.fingerprints import fingerprint
from infra.sources.located import LOCAL_PATH, Located, named_by_content
from infra.sources.safe_names import check_data_files, check_name, check_revision, is_repository_id

if TYPE_CHECKING:
    from infra.sources.data_files import DataFiles
    from infra.sources.text_columns import TextColumns

__all__ = ["Located", "RepoType", "Sources", "TextData", "fingerprint", "sources_from"]


class TextData(BaseModel):
    """Which texts: a data set (hub id, folder, or one .txt, .jsonl, .json, .csv or .parquet file), split and column.

    `data_files` picks files inside the data set instead of config and split (C4 on the hub has 1024 shards of which
    the pruning literature reads the first: "en/c4-train.00000-of-01024.json.gz", as in SparseGPT, arXiv 2301.00774).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    config: str | None = None
    split: str = "train"
    text_field: str = "text"
    revision: str | None = None
    data_files: str | None = None

    _inside = field_validator("data_files")(check_data_files)
    _named = field_validator("config", "split")(check_name)
    _revision = field_validator("revision")(check_revision)


class Sources:
    """Finds repositories in this order: an existing local path, the mirrors, the offline default, the hub if allowed.

    `home` holds small caches (content hashes, names for `datasets`). start: where relative paths start, by default the
    current folder. Construction touches neither disk nor network.
    """

    def __init__(
        self,
        mirrors: tuple[Path, ...],
        offline: OfflineDefault | None,
        hub: bool,
        *,
        home: Path,
        start: str | None = None,
    ) -> None:
        self.mirrors = mirrors
        self.offline = offline
        self.hub = hub
        self.home = home
        self.start = start
        self._found: dict[tuple[str, str, str | None], Located] = {}

    def find(self, repo_id: str, repo_type: RepoType, *, revision: str | None = None) -> Located:
        """Locate a repository; building it first if it belongs to the offline default, asking the hub for its commit.

        Raises SourceMissing, naming where it was looked for and the ways out. Found once, it is not looked for again.
        """
        asked = (repo_id, repo_type, revision)
        if asked not in self._found:
            self._found[asked] = self._find(repo_id, repo_type, revision)
        return self._found[asked]

    def require_unchanged(self, identities: Sequence[Mapping[str, str]]) -> None:
        """Raise SourceInvalid if a folder that was found under one of them holds something else by now: what was read
        of it meanwhile is not what the key says. Costs a look at each file's state."""
        for located in self._found.values():
            identity = vars(located).get("identity")  # of what was asked for it: others were not read
            if located.folder is None or identity is None or identity not in identities:
                continue
            if fingerprint(located.folder, located.memo) != identity["content"]:
                raise SourceInvalid(
                    f"{located.repo_type} {located.repo_id} ({located.folder}) was changed while the run used it; run "
                    "again, and it counts as what it is then"
                )

    def texts(self, data: TextData) -> list[str]:
        """The texts of one column, in order; raises SourceMissing, or SourceInvalid naming what exists."""
        return self._columns(data, (data.text_field,)).read()[data.text_field]

    def shuffled_texts(self, data: TextData, seed: int) -> Iterator[str]:
        """The texts of one column that are not empty, in an order that the seed decides, one after the other.

        What lies on the hub, or is larger than memory should hold, is streamed: shards in random order, rows mixed
        within a buffer. Raises as `texts` does.
        """
        return self._columns(data, (data.text_field,)).shuffled(seed)

    def records(self, data: TextData, columns: Sequence[str]) -> list[dict[str, str]]:
        """Rows with just those text columns (None becomes ""); `text_field` plays no part. Raises as `texts` does."""
        values = self._columns(data, columns).read()
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    def check_columns(self, data: TextData, columns: Sequence[str]) -> None:
        """Raise what `records` would raise about these columns, as far as the beginnings of the files tell: it takes a
        second or so, before expensive work."""
        self._columns(data, columns).check()

    def check_tables(self, repo_id: str, excerpt: Path, config: str | None, splits: Sequence[str]) -> None:
        """Raise SourceUnreadable, naming the file, for splits of a data set that cannot be read whole; `excerpt`: a
        folder with a README that names their files, and the configuration."""
        from infra.sources import datasets

        datasets.check_tables(self.find(repo_id, "dataset"), excerpt, config, splits, home=self.home)

    def files(self, data: TextData) -> DataFiles:
        """The files of a split one by one. Raises as `texts` does about data that is not there."""
        from infra.sources import datasets

        located = self.find(data.dataset, "dataset", revision=data.revision)
        return datasets.files_of(located, data.config, data.split, data.data_files, home=self.home)

    def named_files(self, repo_id: str, excerpt: Path, config: str | None, split: str) -> DataFiles:
        """The same of a data set whose files `excerpt` names, as for `check_tables`."""
        from infra.sources import datasets

        located = self.find(repo_id, "dataset")
        return datasets.files_by_split(located, excerpt, config, [split], home=self.home)[split]

    def folder(self, repo_id: str) -> Path | None:
        """A data set's folder for `datasets.load_dataset`, under a name made of its content; None for the hub.

        `datasets` 5.2 keys its cache for local folders on folder name, README and config, not on the files: an edited
        folder would be served stale. A link named after the content makes that cache right for whoever loads it.
        """
        located = self.find(repo_id, "dataset")
        if located.folder is None:
            return None
        return named_by_content(located, self.home)

    def _columns(self, data: TextData, columns: Sequence[str]) -> TextColumns:
        from infra.sources.text_columns import TextColumns

        located = self.find(data.dataset, "dataset", revision=data.revision)
        return TextColumns(located, data.config, data.split, data.data_files, tuple(columns), self.home)

    def _find(self, repo_id: str, repo_type: RepoType, revision: str | None) -> Located:
        if not repo_id.strip():  # as a path it would be the current folder
            raise SourceMissing(f"the {repo_type} is {repo_id!r}; give an id (owner/name) or a path")
        memo = self.home / "cache" / "fingerprints.json"
        path = Path(self.start or "", os.path.expanduser(repo_id))
        if os.path.exists(path):  # unlike Path.exists it also takes what no path can be
            return Located(repo_id, repo_type, path.absolute(), None, LOCAL_PATH, memo)
        if repo_id.startswith((".", "/", "~")):
            where = f" in {self.start}" if self.start is not None and repo_id.startswith(".") else ""
            raise SourceMissing(
                f"{repo_type} path {repo_id} does not exist{where}; give an existing folder or file, or a hub id "
                "(owner/name)"
            )
        try:
            check_revision(revision)
        except ValueError as error:
            raise SourceMissing(f"{repo_type} {repo_id} has no revision {revision!r}: {error}") from error
        if not is_repository_id(repo_id):
            raise SourceMissing(
                f"{repo_type} {repo_id!r} is neither an existing path nor an id (owner/name); a path begins with / or ."
            )
        for mirror in self.mirrors:
            if (mirror / repo_id).is_dir():
                return Located(repo_id, repo_type, mirror / repo_id, None, str(mirror), memo)
        if self.offline is not None and self.offline.offers(repo_id, repo_type):
            return Located(repo_id, repo_type, self.offline.folder(repo_id), None, "offline default", memo)
        if not self.hub:
            answer = "the hub was not asked, the mirror setting leaves it out"
            raise SourceMissing(self._missing(repo_id, repo_type, answer))
        try:
            return Located(repo_id, repo_type, None, hub.resolve(repo_id, repo_type, revision), "hub")
        except SourceMissing as error:  # chained: "did not answer" is worth another try, "knows no such" is not
            raise SourceMissing(self._missing(repo_id, repo_type, str(error))) from error

    def _missing(self, repo_id: str, repo_type: RepoType, answer: str) -> str:
        looked = [str(mirror / repo_id) for mirror in self.mirrors]
        if self.offline is not None:
            looked.append(f"the offline default, which has only {', '.join(self.offline.names(repo_type))}")
        places = f"looked in {'; '.join(looked)}; " if looked else ""
        ways = [
            "the hub: unset SLIMLINE_MIRROR and the spec's mirror, with network",
            f"a mirror: copy it to <folder>/{repo_id} and set SLIMLINE_MIRROR=<folder> (or the spec's mirror)",
        ]
        if self.offline is None:
            one = f"`{OfflineDefault.INSTALL}`, SLIMLINE_MIRROR=offline and one of its {repo_type}s"
            ways.append(f"the offline default: {one}")
        numbered = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
        return f"{repo_type} {repo_id!r} was not found: {places}{answer}. Ways out: {numbered}"


def sources_from(mirror: str | Sequence[str] | None, settings: Settings, *, start: str | None = None) -> Sources:
    """Sources as the spec's `mirror` asks, else SLIMLINE_MIRROR, else the hub alone.

    Entries are folders laid out <folder>/<owner>/<name>, or the words "offline" and "hub"; a string may join several
    with os.pathsep. Only what is named is used. start: where the spec's relative paths start, by default the current
    folder. Raises SourceMissing for a folder that does not exist.
    """
    asked = settings.mirror if mirror is None else mirror
    from_here = Path(start or "") if mirror is not None else Path()
    folders = tuple((from_here / os.path.expanduser(entry)).absolute() for entry in mirror_folders(asked or ()))
    for folder in folders:
        if not os.path.isdir(folder):  # unlike Path.is_dir it also takes what no path can be
            raise SourceMissing(
                f"mirror folder {folder} does not exist; a mirror is a folder, or one of the words 'offline' and 'hub'"
            )
    words = set(mirror_entries(asked or ())) or {HUB_WORD}
    offline = OfflineDefault(settings.offline_root) if OFFLINE_WORD in words else None
    return Sources(folders, offline, HUB_WORD in words, home=settings.home, start=start)
