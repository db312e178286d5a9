"""bench.json (flat keys) and bench.md (the same as tables). Parts run at different times meet in these two files.

Every section carries its protocol, so that a figure of last week beside one of today says so itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from infra.provenance import git_revision, versions
from tests.bench.options import Options

Value = str | int | float | bool
Figures = dict[str, Value]

#: section -> title and what its keys begin with; a key belongs to the longest beginning that fits
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "speed": ("Pruning against one plain forward pass", ("speed", "prune_over_forward")),
    "naive": ("The naive schedule against ours", ("naive",)),
    "stream": ("A checkpoint larger than the memory it is pruned in", ("stream",)),
    "transfers": ("What a layer moves to and from an accelerator", ("transfers",)),
    "growth": ("Growth with depth, width, tokens and sparsity", ("growth",)),
    "night": ("What a night costs beside the work", ("night",)),
    "results": ("Questions to a large results store", ("results",)),
    "ordering": ("The paper's ordering: P1 perplexity", ("ordering",)),
    "ordering_kv_group": ("The paper's ordering by kv groups: P1 perplexity", ("ordering_kv_group",)),
    "ordering_query_head": ("The paper's ordering by query heads: P1 perplexity", ("ordering_query_head",)),
    "p1": ("Protocol P1", ("p1",)),
    "profile": ("The profile's ratio to the dense model, three times", ("profile",)),
    "zero_shot": ("The seven tasks against bare forward passes", ("zero_shot",)),
    "few_shot": ("MMLU with its examples run once against whole prompts", ("few_shot",)),
    "lm_eval": ("lm_eval by hand against ours", ("lm_eval",)),
}
_NOTES = ("protocol", "skipped")


@dataclass(frozen=True)
class Result:
    """What a part found: its section, how it was taken, and its figures by their keys."""

    section: str
    protocol: str
    figures: Figures


class Skipped(Exception):
    """A part cannot be run here; the message is the sentence that says why."""


def protocol(options: Options, *details: str, batches: str | None = None) -> str:
    """Details of the part, then device, dtype, threads, versions, commit and time. batches: if not of the option."""
    libraries = versions()
    shown = [f"{name} {libraries[name]}" for name in ("python", "torch", "transformers") if name in libraries]
    machine = [
        f"{options.device} ({torch.get_num_threads()} threads, {os.cpu_count()} cores)",
        "float32",
        batches or f"batches of {options.batch_size}",
        ", ".join(shown),
        f"slimline {git_revision() or libraries.get('slimline', 'unknown')}",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    return "; ".join([*details, *machine])


def section_of(key: str) -> str:
    """The section that a key of bench.json belongs to."""
    fitting = [
        (beginning, section)
        for section, (_, beginnings) in SECTIONS.items()
        for beginning in beginnings
        if key == beginning or key.startswith(f"{beginning}_")
    ]
    assert fitting, f"{key} belongs to no section"
    return max(fitting, key=lambda pair: len(pair[0]))[1]


def record(result: Result, folder: Path) -> None:
    """Replace the section's figures in bench.json, leave the others, and write bench.md anew."""
    figures = {f"{result.section}_protocol": result.protocol, **result.figures}
    strangers = [key for key in figures if section_of(key) != result.section]
    assert not strangers, f"{strangers} are no keys of {result.section}"
    others = {key: value for key, value in read(folder).items() if section_of(key) != result.section}
    _write(folder, others | figures)


def record_skip(section: str, reason: str, folder: Path) -> None:
    """Note that a part was not run; figures that an earlier run left stay, with their own protocol."""
    _write(folder, read(folder) | {f"{section}_skipped": reason})


def read(folder: Path) -> Figures:
    """What bench.json holds; nothing if it is not there yet."""
    file = folder / "bench.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def markdown(figures: Mapping[str, Value]) -> str:
    """One table a section, its protocol above it."""
    lines = ["# slimline benchmarks", "", "Ratios are of times taken side by side in one process; a `*_skipped` part"]
    lines += ["was not measured here. Perplexity is in the protocol that the section names.", ""]
    for section, (title, _) in SECTIONS.items():
        mine = {key: value for key, value in figures.items() if section_of(key) == section}
        if not mine:
            continue
        lines += [f"## {title}", ""]
        notes = {note: mine.pop(f"{section}_{note}", None) for note in _NOTES}
        lines += [f"{note.capitalize()}: {text}" + "\n" for note, text in notes.items() if text]
        if mine:
            lines += ["| key | value |", "|---|---|", *(f"| {key} | {_shown(mine[key])} |" for key in mine), ""]
    return "\n".join(lines)


def _write(folder: Path, figures: Figures) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"bench.json": json.dumps(figures, indent=1) + "\n", "bench.md": markdown(figures)}
    for name, text in contents.items():
        aside = folder / f".{name}.new"
        aside.write_text(text, encoding="utf-8")
        aside.replace(folder / name)


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
