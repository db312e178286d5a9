"""What files of data are called, and what a single one of them can be asked for. `datasets` is not imported."""

from __future__ import annotations

from pathlib import Path

from infra.errors import SourceInvalid
from infra.log_once import warn_once
from infra.sources.located import Located

BUILDERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".ndjson": "json",
    ".arrow": "arrow",
}

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DATA = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
#: what lies beside data without being data
_NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")


def kind_of(file: str) -> str:
    """The ending that says the format: ".jsonl" of a .jsonl.gz."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def say_left_out(folder: Path, read: set[str]) -> None:
    """Of a folder with files of several formats `datasets` reads one, and says nothing of the others."""
    card = folder / "README.md"
    if folder.is_file() or (card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")):
        return  # what is not read is not meant
    kinds = {kind_of(file) for file in read}
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    others = sorted(name for name in names if kind_of(name) in _DATA and kind_of(name) not in kinds)
    if others := [name for name in others if Path(name).name not in _NOT_DATA and not name.startswith(".")]:
        warn_once(
            f"{folder}: its {'/'.join(sorted(kinds))} files are read, {', '.join(others[:3])} not; name files of one "
            "format by data_files, or put them into a folder of their own"
        )


def check_single_file(located: Located, config: str | None, split: str, data_files: str | None) -> None:
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
    if kind_of(located.folder.name) == ".txt" and split != "train":
        raise SourceInvalid(
            f"{located.repo_id} is a single text: split {split!r} names nothing in it; leave split out, or give a "
            ".jsonl with a row for each text"
        )
