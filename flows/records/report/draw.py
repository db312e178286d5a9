"""A table of a paper as text in the form that is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from flows.records.render import csv_table, html_table, latex_table, latex_text, markdown_table, markdown_text
from flows.records.report.build import Line, Report, Section

_CSV = (
    *("table", "model", "method", "options", "sparsity", "removed", "recovery", "calibration", "source", "figure"),
    *("value", "stderr", "num_examples", "run_key", "checkpoint", "checkpoint_key", "protocol"),
)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 2rem 0; overflow-x: auto; }
table { border-collapse: collapse; }
caption { font-weight: bold; text-align: left; padding: .5rem 0; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8888; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
li { overflow-wrap: anywhere; }
"""


def draw(report: Report, form: str) -> str:
    """`form`: markdown, csv (a line per figure, in full), latex (needs booktabs) or html (a page of its own)."""
    drawn = {"markdown": _markdown, "csv": _csv, "latex": _latex, "html": _html}[form](report)
    return drawn.rstrip("\n")


def _markdown(report: Report) -> str:
    parts = [f"# {report.title} ({report.paper})"]
    for section in report.sections:
        notes = "\n".join(f"- {markdown_text(note)}" for note in section.notes)
        parts += [f"## {markdown_text(section.title)}", markdown_table(_headings(section), _rows(section)), notes]
    return "\n\n".join([*parts, *map(markdown_text, report.notes)])


def _csv(report: Report) -> str:
    lines = [
        _figure(report, section, line, heading)
        for section in report.sections
        for line in section.lines
        for heading in line.values
    ]
    return csv_table(_CSV, lines)


def _figure(report: Report, section: Section, line: Line, heading: str) -> dict[str, Any]:
    metric = line.metrics.get(heading)
    found: dict[str, Any] = {"table": report.name, "model": section.title, **line.labels, "figure": heading}
    if metric is None:
        return found | {"value": line.values[heading]}
    recorded = json.loads(metric.model_dump_json())  # in which infinity is a word
    found["figure"] = f"{metric.suite}/{metric.task}/{metric.metric}"  # a heading has a unit, the value its own
    return found | {name: recorded[name] for name in _CSV if name in recorded}


def _latex(report: Report) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for section in report.sections:
        notes = [rf"\par {latex_text(note)}" for note in (*section.notes, *report.notes)]
        table = latex_table(_headings(section), _rows(section), _numeric(section))
        caption = latex_text(f"{report.title} ({report.paper}): {section.title}")
        small = ["{\\footnotesize", *notes, "}"]
        parts += ["\\begin{table}", rf"\caption{{{caption}}}", table, *small, "\\end{table}"]
    return "\n".join(parts)


def _html(report: Report) -> str:
    title = escape(f"{report.title} ({report.paper})")
    figures = []
    for section in report.sections:
        table = html_table(_headings(section), _rows(section), _numeric(section), section.title)
        notes = "\n".join(f"<li>{escape(note)}</li>" for note in section.notes)
        figures.append(f"<figure>\n{table}\n<figcaption><ul>\n{notes}\n</ul></figcaption>\n</figure>")
    about = "\n".join(f"<p>{escape(note)}</p>" for note in report.notes)
    head = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>'
    )
    body = "\n".join([f"<h1>{title}</h1>", *figures, about])
    return f"{head}\n<body>\n{body}\n</body>\n</html>"


def _headings(section: Section) -> list[str]:
    return [*section.labels, *section.figures]


def _rows(section: Section) -> list[Sequence[str]]:
    return [
        [*(line.labels[name] for name in section.labels), *(line.cells.get(name, "") for name in section.figures)]
        for line in section.lines
    ]


def _numeric(section: Section) -> list[bool]:
    return [*(False for _ in section.labels), *(True for _ in section.figures)]
