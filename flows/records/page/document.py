"""A page as one HTML file that loads nothing: its content as JSON, our script and style, Plotly."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from flows.records.page.content import Page

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("state.js", "board.js", "compare.js", "chart.js", "lineage.js", "night.js", "main.js")
#: points above which Plotly draws by WebGL, whose programs it makes by Function(): chart.js has the same number
_MOST_IN_SVG = 2000
_SECTIONS = ("table", "compare", "chart", "lineage", "protocol")
_LINKS = ("Checkpoints", "Compare", "Chart", "Lineage", "Protocol")


def page_html(page: Page) -> str:
    """The file. No text of a run or a spec can end what it stands in, and no script runs but the two that are named in
    the page's policy by their hashes; the policy forbids every connection."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs().replace("\r", "")
    script = _script()
    parts = {
        "policy": _policy((plotly, script), len(page.data["checkpoints"]["key"]) > _MOST_IN_SVG),
        "title": escape(page.title),
        "style": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "lines": _headlines(page),
        "about": escape(page.about),
        "links": "\n".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in _links(page)),
        "night": _night(page),
        "protocol": _items([*page.notes, *page.protocol]),
        "data": _json(page.data),
        "plotly": plotly,
        "script": script,
    }
    template = (_ASSETS / "page.html").read_text(encoding="utf-8")
    # in one pass: what is filled in is not searched for more places
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _script() -> str:
    parts = ((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _policy(scripts: Iterable[str], with_webgl: bool) -> str:
    sources = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    if with_webgl:
        sources.append("'unsafe-eval'")
    return (
        f"default-src 'none'; script-src {' '.join(sources)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(data: object) -> str:
    """Nothing in it ends the element that it stands in, or a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    # half of a surrogate pair, which JSON may hold and UTF-8 may not
    return re.sub(r"[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def _headlines(page: Page) -> str:
    if not page.lines:
        return ""
    kind = "headlines" if page.good else "headlines not-good"
    return f'<ul class="{kind}">\n{_items(page.lines)}\n</ul>'


def _night(page: Page) -> str:
    if page.data["night"] is None:
        return ""
    return (
        '<section aria-labelledby="night">\n<h2 id="night" tabindex="-1">Against the last good night</h2>\n'
        '<div id="changes"></div>\n<div id="history"></div>\n</section>'
    )


def _links(page: Page) -> list[tuple[str, str]]:
    night = [("night", "Night")] if page.data["night"] is not None else []
    return [*night, *zip(_SECTIONS, _LINKS, strict=True)]


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"<li>{escape(line)}</li>" for line in lines)
