"""Files that are not what they should be: specs, models and data sets, broken as disks, downloads and editors do."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.values import odd

Draw = Callable[[st.SearchStrategy[Any]], Any]

_SPOILED = ("truncated", "emptied", "flipped", "grown", "text", "null bytes", "removed", "folder", "link", "dangling")


def spoil_(draw: Draw, file: Path) -> str:
    """Break one file in one of these ways, and say how."""
    way = draw(st.sampled_from(_SPOILED))
    content = file.read_bytes()
    place = draw(st.integers(0, max(0, len(content) - 1)))
    file.unlink()
    if way == "truncated":
        file.write_bytes(content[:place])
    elif way == "emptied":
        file.touch()
    elif way == "flipped":
        file.write_bytes(content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :])
    elif way == "grown":
        file.write_bytes(content + draw(st.binary(min_size=1, max_size=40)))
    elif way == "text":
        file.write_text(draw(st.text(max_size=40)), encoding="utf-8", errors="surrogatepass")
    elif way == "null bytes":
        file.write_bytes(content[:place] + bytes(len(content) - place))
    elif way == "folder":
        file.mkdir()
    elif way == "link":
        file.symlink_to(file)
    elif way == "dangling":
        file.symlink_to(file.with_name("nothing"))
    return f"{file.name} {way} at {place}"


def spoil_json_(draw: Draw, file: Path) -> str:
    """Put an odd value somewhere into a JSON file, or take a key out, and say where."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return spoil_(draw, file)
    place: Any = content
    path = []
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(min(len(place), 5))))
        path.append(key)
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        break
    if draw(st.integers(0, 4)) == 0:
        del place[key]
        said = "gone"
    else:
        place[key] = draw(odd)
        said = repr(place[key])[:80]
    file.write_text(json.dumps(content), encoding="utf-8")
    return f"{file.name} {'.'.join(map(str, path))}: {said}"


def broken_model(draw: Draw, model: Path, folder: Path) -> tuple[Path, str]:
    """A copy of a model with something broken, and what."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder, symlinks=False)
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "README.md")
    file = draw(st.sampled_from(files))
    of_json = file.suffix == ".json" and draw(st.integers(0, 3)) > 0
    return folder, (spoil_json_ if of_json else spoil_)(draw, file)


def broken_data(draw: Draw, folder: Path) -> tuple[Path, str]:
    """A data file with something broken, and what; perhaps in a folder of its own."""
    import pyarrow
    from pyarrow import csv, parquet

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = [{"text": f"line {number} " + "of words and words " * 20, "n": number} for number in range(60)]
    kind = draw(st.sampled_from(("jsonl", "json", "csv", "parquet", "txt")))
    file = folder / f"train.{kind}"
    table = pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, file)
    elif kind == "csv":
        csv.write_csv(table, file)
    elif kind == "txt":
        file.write_text("\n".join(str(row["text"]) for row in rows), encoding="utf-8")
    else:
        if draw(st.booleans()):
            rows[draw(st.integers(0, len(rows) - 1))]["text"] = draw(odd)
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    if kind in ("jsonl", "csv", "txt") and draw(st.integers(0, 3)) == 0:
        file = _compressed(file)
    said = spoil_(draw, file) if draw(st.integers(0, 4)) else f"{file.name} whole"
    return (file if draw(st.booleans()) else folder), said


def _compressed(file: Path) -> Path:
    packed = file.with_name(f"{file.name}.gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    return packed


def broken_spec(draw: Draw, text: str, file: Path) -> str:
    """Write a spec with a few bytes changed, and say how."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    file.unlink(missing_ok=True)
    lines = text.splitlines()
    way = draw(st.sampled_from(("bytes", "lines", "insert", "indent")))
    line = draw(st.integers(0, len(lines) - 1))
    if way == "bytes":
        file.write_text(text, encoding="utf-8")
        return spoil_(draw, file)
    if way == "lines":
        lines[line] = lines[draw(st.integers(0, len(lines) - 1))]
    elif way == "indent":
        lines[line] = " " * draw(st.integers(0, 6)) + lines[line].lstrip()
    else:
        mark = draw(st.sampled_from("&*!|>%@`{}[],#?:-\t\"'\x00\x85\ufeff\u2028"))
        column = draw(st.integers(0, len(lines[line])))
        lines[line] = lines[line][:column] + mark + lines[line][column:]
    file.write_text("\n".join(lines), encoding="utf-8")
    return f"{way} in line {line + 1}: {lines[line]!r}"
