"""The descriptions that MLflow and Prefect show: markdown, with the figures in a table."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path

from infra.results.rows import MetricRow

#: an MLflow tag has no more characters
MOST_CHARACTERS = 8000
#: a table with more columns is not read
_MOST_FIGURES = 8
#: a page with more images is slow to come
_MOST_IMAGES = 4
#: of the profile these are shown, last
_OF_PROFILE = ("num_parameters", "decode_ms_per_token_p50")


def run_description(
    words: str, params: Mapping[str, Mapping[str, str]], metrics: Sequence[MetricRow], message: str | None
) -> str:
    """Of a run: a row per checkpoint. words: of the user. params: of each checkpoint. message: what failed."""
    chosen = chosen_figures(metrics)
    shown = {(row.checkpoint, *_figure(row)): row for row in metrics}
    headings = ["checkpoint", "method", "sparsity", "recovery", *(" ".join(figure[1:]) for figure in chosen)]
    rows = []
    for name, given in params.items():
        found = [shown.get((name, *figure)) for figure in chosen]
        values = ["" if row is None else number(row.value) for row in found]
        rows.append([name, *(given.get(word, "") for word in headings[1:4]), *values])
    failed = f"**Failed:** {_plain(message)}" if message else ""
    return _cut([_plain(words), failed], _table(headings, rows))


def run_page(
    description: str,
    run_key: str,
    checkpoints: Mapping[str, Path],
    records: Path,
    address: str | None,
    images: Iterable[tuple[str, bytes]] = (),
) -> str:
    """Of a run in Prefect: its description, some images, and where all of it lies.

    checkpoints: their folders. records: the file with its rows. address: of its page in MLflow, if it has one. images:
    PNGs with what each shows, of which the first are in the page itself.
    """
    shown = [markdown_image(words, png) for words, png in islice(images, _MOST_IMAGES)]
    places = [f"* [MLflow run]({address})"] if address else []
    places += [f"* checkpoint {_plain(name)}: `{folder}`" for name, folder in checkpoints.items()]
    places += [f"* rows of the results store: `{records}`", f"* all figures: `slimline results --run {run_key}`"]
    return "\n".join(filter(None, [description, *shown, "\n## Where it lies\n", *places]))


def markdown_image(words: str, png: bytes) -> str:
    """A PNG inside the text itself: Prefect's pages have no files of ours to point to."""
    plain = re.sub(r"[^\w .,:+-]", " ", words)
    return f"\n![{plain}](data:image/png;base64,{b64encode(png).decode()})\n"


def checkpoint_description(label: str, params: Mapping[str, str], metrics: Sequence[MetricRow], key: str) -> str:
    """Of a checkpoint: how it was made, and all its figures."""
    made = "; ".join(f"{word} {_plain(value)}" for word, value in params.items())
    rows = [
        [
            *_figure(row),
            number(row.value),
            "" if row.stderr is None else number(row.stderr),
            "" if row.num_examples is None else str(row.num_examples),
        ]
        for row in metrics
    ]
    headings = ["suite", "task", "metric", "value", "standard error", "items"]
    return _cut([f"**{_plain(label)}**, artifact `{key}`", made], _table(headings, rows) if rows else [])


def number(value: float) -> str:
    """As it is shown: four significant digits, large ones whole; nan and inf are words."""
    if math.isfinite(value) and abs(value) >= 10_000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _figure(row: MetricRow) -> tuple[str, str, str]:
    return row.suite, row.task, row.metric


def chosen_figures(metrics: Iterable[MetricRow]) -> list[tuple[str, str, str]]:
    """The figures (suite, task, metric) that a table shows: what suites measured as it comes, without a second accuracy
    of one task, then sizes."""
    figures = list(dict.fromkeys(map(_figure, metrics)))
    suites = [figure for figure in figures if figure[0] != "profile"]
    suites = [figure for figure in suites if figure[2] != "acc_norm" or (*figure[:2], "acc") not in suites]
    profiled = [figure for word in _OF_PROFILE for figure in figures if figure == ("profile", "profile", word)]
    return suites[: _MOST_FIGURES - len(profiled)] + profiled


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(cell if cell == "---" else _plain(cell) for cell in line) + " |" for line in lines]


def _plain(text: str) -> str:
    """The text as text in markdown: nothing in it becomes a tag, a cell or a line of its own."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _cut(parts: Iterable[str], table: Sequence[str]) -> str:
    """The parts, then as many lines of the table as there is room for."""
    text = "\n\n".join(part[: MOST_CHARACTERS // 4] for part in parts if part) + "\n"
    for index, line in enumerate(table):
        rest = f"\n\n{len(table) - index} more rows: `slimline results --format csv`"
        if len(text) + len(line) + len(rest) >= MOST_CHARACTERS:
            return text + rest
        text += f"\n{line}"
    return text.strip()
