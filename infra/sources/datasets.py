"""Rows of a located data set. Import it late: `datasets` costs two seconds."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import Dataset, VerificationMode
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.download import StreamingDownloadManager
from datasets.table import table_cast

from infra.errors import InfraError, SourceInvalid, SourceMissing, SourceUnreadable
from infra.log_once import warn_once
from infra.registry import did_you_mean
from infra.sources.data_files import DataFiles, reason
from infra.sources.file_kinds import BUILDERS, COMPRESSED, check_single_file, kind_of, say_left_out
from infra.sources.located import Located, named_by_content

#: how much of a file is read at once: the option of its format, and its value for up to _FEW files
_PIECES = {"json": ("chunksize", 10 * 2**20), "csv": ("chunksize", 10_000), "parquet": ("batch_size", 10_000)}
_FEW = 8
#: rows of a stream that are mixed with each other
_SHUFFLED_ROWS = 10_000
_FAILURES = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    StopIteration,
    NotImplementedError,
    zlib.error,
    pa.ArrowException,
    datasets.exceptions.DatasetsError,
)


def load(located: Located, config: str | None, split: str, data_files: str | None, *, home: Path) -> Dataset:
    """The rows of one split.

    Raises SourceInvalid naming the configs or splits that exist, SourceUnreadable, SourceMissing if the hub is silent.
    """
    check_single_file(located, config, split, data_files)
    where = _where(located, config, split, data_files, home)
    checks = VerificationMode.NO_CHECKS if "data_files" in where else VerificationMode.BASIC_CHECKS
    with explained(located, config, split, home, named=data_files is not None):
        if hasattr(datasets.load_dataset_builder(**where).config, "on_mixed_types"):
            # "use_json" would make a text beside a number the JSON of itself, '"text"'; None means the same
            where["on_mixed_types"] = "refuse"
        try:
            return cast(Dataset, datasets.load_dataset(**where, split=split, verification_mode=checks))
        except datasets.exceptions.SplitsVerificationError:
            warn_once(
                f"{located.repo_id} does not have the splits and rows that its README promises; what is there is read"
            )
            checks = VerificationMode.NO_CHECKS
            return cast(Dataset, datasets.load_dataset(**where, split=split, verification_mode=checks))


def stream(
    located: Located, config: str | None, split: str, data_files: str | None, *, seed: int, home: Path
) -> Iterator[Mapping[str, Any]]:
    """The rows of one split, read as they are asked for: shards in an order that the seed decides, rows mixed within a
    buffer. Raises as `load` does."""
    check_single_file(located, config, split, data_files)
    where = _where(located, config, split, data_files, home)
    with explained(located, config, split, home, named=data_files is not None):
        rows = datasets.load_dataset(**where, split=split, streaming=True)
        return iter(rows.shuffle(seed=seed, buffer_size=_SHUFFLED_ROWS))


def files_of(located: Located, config: str | None, split: str, data_files: str | None, *, home: Path) -> DataFiles:
    """The files of a split. Raises what `load` raises about configs, splits and files that are not there."""
    check_single_file(located, config, split, data_files)
    where = _where(located, config, split, data_files, home)
    with explained(located, config, split, home, named=data_files is not None):
        builder = datasets.load_dataset_builder(**where)
        listed = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
        asked = list(listed) if split == "all" else split_names(split)
        if not set(asked) <= listed.keys():
            raise ValueError(f"no split {split!r}; it has {', '.join(listed)}")
        names = [file for name in asked for file in listed[name]]
    if data_files is None and located.folder is not None and builder.config.name == "default":
        say_left_out(located.folder, {file for files in listed.values() for file in files})
    return _data_files(located, builder, names, home)


def check_tables(located: Located, excerpt: Path, config: str | None, splits: Sequence[str], *, home: Path) -> None:
    """Raise SourceUnreadable, naming file and reason, if a split cannot be read as one table with all its columns, as
    far as the beginnings of its files tell. excerpt: a folder whose README names files of a located data set."""
    for files in files_by_split(located, excerpt, config, splits, home=home).values():
        with explained(located, config, "", home, named=True):
            files.check(None)


def files_by_split(
    located: Located, excerpt: Path, config: str | None, splits: Sequence[str], *, home: Path
) -> dict[str, DataFiles]:
    """The files of these splits of a located data set, as `check_tables` is told of them."""
    _quiet()
    with explained(located, config, "", home, named=True):
        builder = datasets.load_dataset_builder(str(excerpt), config, cache_dir=str(excerpt / "cache"))
        return {split: _data_files(located, builder, builder.config.data_files[split], home) for split in splits}


def _quiet() -> None:
    """What `datasets` says of failures, it says to us alone."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


def _data_files(located: Located, builder: Any, names: Sequence[str], home: Path) -> DataFiles:
    return DataFiles(
        repo_id=located.repo_id,
        names=tuple(names),
        tables=partial(_tables, builder, _piece(builder.info.builder_name, len(names))),
        label=partial(_label, located, home),
        absent_is_empty=builder.info.builder_name == "json",
        cast=table_cast,
    )


def _tables(builder: Any, piece: Mapping[str, int], file: str) -> Iterator[pa.Table]:
    """One file in pieces. This is what the builder does with all of them, but here every piece keeps its own types."""
    one, features = copy.copy(builder), builder.info.features  # those that a README states
    files = DataFilesDict({"train": DataFilesList([file], [()])})
    one.info, one.config = copy.deepcopy(builder.info), replace(builder.config, data_files=files, **piece)
    [generator] = one._split_generators(StreamingDownloadManager(base_path=builder.base_path))
    one.info.features = features
    for _key, table in one._generate_tables(**generator.gen_kwargs):
        yield table


def _piece(builder: str, num_files: int) -> dict[str, int]:
    """How much of each file is read at once: of many files less, so that to look at all of them takes seconds."""
    if builder not in _PIECES:
        return {}
    option, most = _PIECES[builder]
    return {option: max(most // 10, min(most, most * _FEW // max(num_files, 1)))}


def _label(located: Located, home: Path, file: str) -> str:
    """A file as the user knows it: below the folder that they gave or under the data set's id on the hub."""
    if located.folder is None:
        return file
    if located.folder.is_file():
        return str(located.folder)
    for place in (located.folder.resolve(), named_by_content(located, home)):
        if Path(file).is_relative_to(place):
            return str(located.folder / Path(file).relative_to(place))
    return file


def _where(located: Located, config: str | None, split: str, data_files: str | None, home: Path) -> dict[str, Any]:
    """What `datasets` is told about where the rows are."""
    _quiet()
    if data_files is None and (located.folder is None or not located.folder.is_file()):
        place = {"path": _path(located, home), "name": config, "revision": located.revision}
        return {**place, "cache_dir": _cache(located, home)}
    pattern = _path(located, home) if data_files is None else _pattern(located, data_files, home)
    builder = BUILDERS.get(kind_of(pattern))
    if builder is None:
        file = data_files or located.repo_id
        also = ", ".join(COMPRESSED)
        raise SourceInvalid(f"{file} is no text data: known are {', '.join(BUILDERS)} (each also as {also})")
    # The bare builder, not the repository: a README that promises other splits makes `datasets` refuse a single shard.
    return {
        "path": builder,
        "data_files": {split.partition("[")[0]: pattern},
        "cache_dir": _cache(located, home),
        **({"sample_by": "document"} if builder == "text" else {}),
    }


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


def part_of(split: str, lengths: Mapping[str, int]) -> list[tuple[str, slice]]:
    """What "train[:10%]+test" takes of splits of so many rows, in order."""
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(dict(lengths))
    return [(part.splitname, slice(part.from_, part.to)) for part in parts]


def split_names(split: str) -> list[str]:
    """The splits of which "train[:10%]+test" is made."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


@contextmanager
def explained(located: Located, config: str | None, split: str, home: Path, *, named: bool = False) -> Iterator[None]:
    """Turn the many ways `datasets` refuses into one sentence that names what exists. named: the files are, so that
    configs and splits play no part."""
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
    except _FAILURES as error:
        scripts = [] if located.folder is None else list(located.folder.glob("*.py"))
        if scripts and "data files found" in str(error):
            raise _only_a_script(located) from error
        if not named and (words := _diagnosis(located, config, split, home)):
            raise SourceInvalid(words) from error
        raise SourceUnreadable(f"{located.repo_id}: {_in_users_words(located, home, reason(error))}") from error


def _in_users_words(located: Located, home: Path, words: str) -> str:
    """A message of `datasets` with the folder that the user gave instead of the link by which it is read."""
    if "save_to_disk" in words:
        return "it was written by save_to_disk; give data_files: '*.arrow', or write it as parquet"
    return words if located.folder is None else words.replace(_path(located, home), str(located.folder))


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
            return f"{where} has no config {config!r}{did_you_mean(config, configs)}; it has {', '.join(configs)}"
        names = datasets.get_dataset_split_names(path, config, revision=located.revision)
    except _FAILURES:
        return None
    for asked in split_names(split):
        if asked not in names:
            return f"{where} has no split {asked!r}{did_you_mean(asked, names)}; it has {', '.join(names)}"
    return None
