"""Rows of a located data set. Import it late: `datasets` costs two seconds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
from datasets import Dataset, VerificationMode

from infra.errors import InfraError, SourceInvalid, SourceMissing, SourceUnreadable
from infra.registry import near
from infra.sources import Located, named_by_content

# A compressed file that is cut short is an EOFError, an empty one a StopIteration.
_DAMAGED = (ValueError, OSError, EOFError, StopIteration, zlib.error, pyarrow.ArrowException)
_UNREADABLE = (*_DAMAGED, datasets.exceptions.DatasetGenerationError)
_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def texts(
    located: Located, config: str | None, split: str, data_files: str | None, column: str, *, home: Path
) -> list[str]:
    """One text column, in order; a .txt file is a single text, in the column "text".

    Raises SourceInvalid naming the configs, splits or columns there are, and for what says nothing about a single file.
    """
    rows = load(located, config, split, data_files, home=home)
    return _column(located, rows, column)


def records(
    located: Located, config: str | None, split: str, data_files: str | None, columns: Sequence[str], *, home: Path
) -> list[dict[str, str]]:
    """Rows as dicts of exactly `columns`, all text; None becomes "". Raises SourceInvalid as `texts` does."""
    rows = load(located, config, split, data_files, home=home)
    values = [_column(located, rows, column) for column in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def check_columns(
    located: Located, config: str | None, split: str, data_files: str | None, columns: Sequence[str], *, home: Path
) -> None:
    """Raise what `texts` and `records` would raise about data and columns, by the first row and without the others."""
    _check_file(located, config, split, data_files)
    whole = split.partition("[")[0]  # a stream has no slices, and its first row has the same columns
    with _explained(located, config, whole, home):
        rows = _load(located, config, whole, data_files, home, streaming=True)
        row: dict[str, Any] = next(iter(rows), {})
    for column in columns if row else ():
        _check_column(located, column, list(row))
        _check_text(located, column, 0, row[column])


def splits(located: Located, config: str | None, *, home: Path) -> tuple[str, ...]:
    """Names of the splits under `config` (None: the default one)."""
    if located.folder is not None and located.folder.is_file():
        return ("train",)
    with _explained(located, config, "train", home):
        return tuple(datasets.get_dataset_split_names(_path(located, home), config, revision=located.revision))


def load(located: Located, config: str | None, split: str, data_files: str | None, *, home: Path) -> Dataset:
    """The rows of one split.

    Raises SourceInvalid naming the configs or splits that exist, SourceMissing if the hub is silent.
    """
    return cast(Dataset, _load(located, config, split, data_files, home, streaming=False))


def _load(
    located: Located, config: str | None, split: str, data_files: str | None, home: Path, *, streaming: bool
) -> Any:
    datasets.disable_progress_bars()
    _check_file(located, config, split, data_files)
    if located.folder is not None and located.folder.is_file():
        return _load_files(located, _path(located, home), split, home, streaming)
    if data_files is not None:
        return _load_files(located, _pattern(located, data_files, home), split, home, streaming)
    with _explained(located, config, split, home):
        return datasets.load_dataset(
            _path(located, home),
            config,
            split=split,
            revision=located.revision,
            cache_dir=_cache(located, home),
            streaming=streaming,
        )


def _load_files(located: Located, pattern: str, split: str, home: Path, streaming: bool) -> Any:
    builder = _BUILDERS.get(_kind(pattern))
    if builder is None:
        raise SourceInvalid(f"{pattern} is no text data: known are {', '.join(_BUILDERS)} (each also as .gz)")
    options = {"sample_by": "document"} if builder == "text" else {}
    # The bare builder, not the repository: a README that promises other splits makes `datasets` refuse a single shard.
    try:
        return datasets.load_dataset(
            builder,
            data_files={split.partition("[")[0]: pattern},
            split=split,
            verification_mode=VerificationMode.NO_CHECKS,
            cache_dir=_cache(located, home),
            streaming=streaming,
            **options,
        )
    except _UNREADABLE as error:
        raise SourceInvalid(
            f"{located.repo_id}: {pattern} cannot be read as {builder}: {_reason(error.__cause__ or error)}"
        ) from error


def _pattern(located: Located, data_files: str, home: Path) -> str:
    if located.folder is None:
        return f"hf://datasets/{located.repo_id}@{located.revision}/{data_files}"
    if not any(located.folder.glob(data_files)):
        files = (file.relative_to(located.folder) for file in located.folder.rglob("*") if file.is_file())
        have = sorted(file.as_posix() for file in files if not file.name.startswith("."))
        raise SourceInvalid(
            f"{located.repo_id} in {located.mirror} has no file {data_files!r}; it has {', '.join(have[:8])}"
        )
    return f"{_path(located, home)}/{data_files}"


def _path(located: Located, home: Path) -> str:
    return located.repo_id if located.folder is None else str(named_by_content(located, home))


def _cache(located: Located, home: Path) -> str | None:
    # Copies of local folders are slimline's own; what came from the hub belongs in the cache that all programs share.
    return None if located.folder is None else str(home / "cache" / "datasets")


def _kind(file: str) -> str:
    return Path(file.removesuffix(".gz")).suffix


def _check_file(located: Located, config: str | None, split: str, data_files: str | None) -> None:
    """Refuse what says nothing about a single file; anything else passes."""
    if located.folder is None or not located.folder.is_file():
        return
    if data_files is not None:
        raise SourceInvalid(
            f"{located.repo_id} is a single file: data_files {data_files!r} names nothing in it; leave data_files out, "
            "or give the folder as `dataset`"
        )
    if config is not None or split.partition("[")[0] != "train":
        raise SourceInvalid(
            f"{located.repo_id} is a single file: it has the split 'train' and no configs, not {config or split!r}; "
            "leave config and split out"
        )
    if _kind(located.folder.name) == ".txt" and split != "train":
        raise SourceInvalid(
            f"{located.repo_id} is a single text: split {split!r} names nothing in it; leave split out, or give a "
            ".jsonl with a row for each text"
        )


@contextmanager
def _explained(located: Located, config: str | None, split: str, home: Path) -> Iterator[None]:
    """Turn the many ways `datasets` refuses into one sentence that names what exists."""
    try:
        yield
    except InfraError:  # explained already
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SourceUnreadable(f"{located.repo_id} in {located.mirror} holds no data files that can be read") from error
    except ConnectionError as error:
        raise SourceMissing(
            f"the hub did not answer while {located.repo_id} was downloaded; run again to continue"
        ) from error
    except RuntimeError as error:  # datasets 5 says so, and no more
        if "scripts are no longer supported" not in str(error):
            raise
        raise _only_a_script(located) from error
    except _UNREADABLE as error:
        scripts = [] if located.folder is None else list(located.folder.glob("*.py"))
        if scripts and "data files found" in str(error):
            raise _only_a_script(located) from error
        if words := _diagnosis(located, config, split, home):
            raise SourceInvalid(words) from error
        raise SourceUnreadable(f"{located.repo_id}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return "a file is empty" if isinstance(error, StopIteration) else str(error)


def _only_a_script(located: Located) -> SourceInvalid:
    return SourceInvalid(
        f"{located.repo_id} in {located.mirror} is a loading script, and code of a data set is never run; take a copy "
        "with the data as parquet, json or csv (on the hub often the revision refs/convert/parquet)"
    )


def _diagnosis(located: Located, config: str | None, split: str, home: Path) -> str | None:
    path, where = _path(located, home), f"{located.repo_id} ({located.mirror})"
    try:
        configs = datasets.get_dataset_config_names(path, revision=located.revision)
        if config is None and len(configs) > 1 and "default" not in configs:
            return f"{where} has several configs, name one: {', '.join(configs)}"
        if config is not None and config not in configs:
            return f"{where} has no config {config!r}{near(config, configs)}; it has {', '.join(configs)}"
        names = datasets.get_dataset_split_names(path, config, revision=located.revision)
    except _UNREADABLE:
        return None
    asked = split.partition("[")[0]
    return None if asked in names else f"{where} has no split {asked!r}{near(asked, names)}; it has {', '.join(names)}"


def _column(located: Located, rows: Dataset, column: str) -> list[str]:
    _check_column(located, column, rows.column_names)
    values: list[Any] = list(rows[column])
    for index, value in enumerate(values):
        _check_text(located, column, index, value)
    return ["" if value is None else value for value in values]


def _check_column(located: Located, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise SourceInvalid(
            f"{located.repo_id} has no column {column!r}{near(column, names)}; it has {', '.join(names)}"
        )


def _check_text(located: Located, column: str, index: int, value: Any) -> None:
    if not isinstance(value, str | None):
        raise SourceInvalid(f"{located.repo_id}: column {column!r} is not text (row {index} is {type(value).__name__})")
