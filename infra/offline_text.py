"""Offline texts from gensim's test data: Australian news to calibrate on, English Wikipedia to measure perplexity on.

The two differ in source, year and domain and share no passage, so a perplexity measured on the second is out of the
calibration's domain.
"""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from infra.errors import SourceMissing
from infra.offline_repository import installed, text_table, write_dataset

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Tag, Template
    from mwparserfromhell.wikicode import Wikicode

_NEWS_ABOUT = (
    "Short articles of the Australian Broadcasting Corporation (2000-2002), the corpus of Lee, Pincombe & Welsh "
    "(2005), "
    "as shipped in gensim's test data (lee_background.cor and lee.cor), one article per row."
)
_WIKIPEDIA_ABOUT = (
    "Articles of an English Wikipedia dump shipped in gensim's test data (CC BY-SA), markup, tables, lists of "
    "references and "
    "headings removed, one article per row. Every fifth article is in test, the others in train; no 13 words in a "
    "row are in both."
)
_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_TEST_EVERY = 5
_MIN_CHARACTERS = 1500  # shorter remains are disambiguation pages and stubs

# Sections that hold pointers, not prose: they end an article, everything after the first of them is apparatus.
_APPARATUS = re.compile(
    r"(see also|references?|notes|footnotes|further reading|external links|bibliography|sources|works "
    r"cited|citations?|gallery)\b",
    re.IGNORECASE,
)
_NAMESPACE = re.compile(
    r"^:?(file|image|category|media|template|wikipedia|portal|help|[a-z]{2,3}(-[a-z]+)*):", re.IGNORECASE
)
_KEPT_TAGS = {
    "b",
    "i",
    "blockquote",
    "small",
    "big",
    "span",
    "u",
    "em",
    "strong",
    "q",
    "s",
    "nowiki",
    "sup",
    "sub",
    "cite",
    "abbr",
}
_LIST_TAGS = {"li", "dt", "dd"}
_FORMULA_TAGS = {"math", "code", "chem", "ce", "score", "hiero"}
_WORDED_TEMPLATES = re.compile(
    r"^(lang([-|_].*)?|transl|transliteration|nowrap|nobr|small|smallcaps|sc|em|abbr)$", re.IGNORECASE
)
_CITATION_TEMPLATES = re.compile(
    r"^(cite|citation|cn|fact|sfn|harv|refn|efn|r$|rp$|dubious|clarify|who|when|why|where|which|by whom|according "
    r"to|page needed|"
    r"verify|failed|dead link|better source|vague|anchor|main|see also|further|refimprove|primary|not in|citation "
    r"needed|full|update|"
    r"clear|portal|multiple image|infobox|use "
    r"|note|ref|page|nbsp|ndash|spaced|dot|better|specify|weasel|undue|original|synthesis)",
    re.IGNORECASE,
)

# In the text on its way: a line of a list, and a hole where a formula or an unknown inline template was.
_LIST_LINE, _HOLE = "\x00", "\x01"
_BROKEN = re.compile(r"[\x00\x01]|\{\{|\}\}|\[\[|''|<[a-z/]")  # those, and markup its author left unclosed


def build_news(folder: Path) -> None:
    """Write slimline/news: config default, split train, column text."""
    write_dataset(folder, "slimline/news", _NEWS_ABOUT, {"default": {"train": text_table({"text": news_texts()})}})


def build_wikipedia(folder: Path) -> None:
    """Write slimline/wikipedia: config default, splits train and test, columns title and text."""
    articles = list(wikipedia_articles())
    test = articles[::_TEST_EVERY]
    seen = {gram for _, text in test for gram in word_grams(text)}
    rest = [article for number, article in enumerate(articles) if number % _TEST_EVERY]
    train = [(title, _without(text, seen)) for title, text in rest]
    tables = {
        split: text_table({"title": [title for title, _ in rows], "text": [text for _, text in rows]})
        for split, rows in (("train", train), ("test", test))
    }
    write_dataset(folder, "slimline/wikipedia", _WIKIPEDIA_ABOUT, {"default": tables})


def word_grams(text: str, length: int = 13) -> set[str]:
    """Runs of `length` words, as used to find overlap between data sets (GPT-3, arXiv 2005.14165, appendix C)."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def news_texts() -> list[str]:
    """Articles in file order, each once."""
    data = installed("gensim") / "test" / "test_data"
    files = {"lee_background.cor": "utf-8", "lee.cor": "cp1252"}
    lines = [
        line.strip() for name, code in files.items() for line in (data / name).read_text(encoding=code).split("\n")
    ]
    return list(dict.fromkeys(line for line in lines if line))


def wikipedia_articles() -> Iterator[tuple[str, str]]:
    """(title, prose) of every real article of the dump, in its order."""
    for title, markup in _pages(installed("gensim") / "test" / "test_data" / _DUMP):
        text = prose(markup)
        if len(text) >= _MIN_CHARACTERS and not title.startswith("List of"):
            yield title, text


def prose(markup: str) -> str:
    """Plain paragraphs of a wiki article, parted by blank lines: no templates, tables, lists, notes, files or headings.

    Raises SourceMissing with the pip command if mwparserfromhell is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise SourceMissing(
            "slimline/wikipedia needs mwparserfromhell; get it with `pip install mwparserfromhell`"
        ) from error
    return _tidy("".join(_plain(mwparserfromhell.parse(markup))))


def _plain(wikicode: Wikicode) -> Iterator[str]:
    """Text of the nodes in reading order, up to the first section of apparatus; headings become paragraph breaks."""
    from mwparserfromhell import nodes

    for node in wikicode.nodes:
        if isinstance(node, nodes.Heading):
            if _APPARATUS.match(str(node.title).strip()):
                return
            yield "\n\n"
        elif isinstance(node, nodes.Text):
            yield str(node.value)
        elif isinstance(node, nodes.HTMLEntity):
            yield str(node.normalize())
        elif isinstance(node, nodes.Wikilink):
            yield from () if _NAMESPACE.match(str(node.title)) else _plain(node.text or node.title)
        elif isinstance(node, nodes.ExternalLink):
            yield from _plain(node.title) if node.title else ()
        elif isinstance(node, nodes.Tag):
            yield from _plain_tag(node)
        elif isinstance(node, nodes.Template):
            yield from _plain_template(node)


def _plain_tag(tag: Tag) -> Iterator[str]:
    name = str(tag.tag).strip().lower()
    if name in _LIST_TAGS:
        yield _LIST_LINE
    elif name in _FORMULA_TAGS:
        yield _HOLE
    elif name == "br":
        yield " "
    elif name in _KEPT_TAGS and tag.contents is not None:
        yield from _plain(tag.contents)


def _plain_template(template: Template) -> Iterator[str]:
    name = str(template.name).strip()
    words = [parameter.value for parameter in template.params if not parameter.showkey]
    if name.lower() in {"convert", "cvt"} and len(words) > 1:
        yield f"{words[0]} {words[1]}"
    elif _WORDED_TEMPLATES.match(name) and words:
        yield from _plain(words[-1])
    elif not _CITATION_TEMPLATES.match(name):
        yield _HOLE


def _tidy(text: str) -> str:
    """Unbroken paragraphs that end like a sentence, without the empty brackets and doubled blanks left by removals."""
    kept = []
    for line in text.split("\n"):
        line = re.sub(r"\(\s*[;,:]?\s*\)|\[\s*\]", "", line.replace("\xa0", " "))
        line = re.sub(r"([(\[])[\s;,]+", r"\1", re.sub(r"\s+([,.;:)\]])", r"\1", re.sub(r"\s+", " ", line))).strip()
        if len(line) > 80 and line[-1] in ".!?\"'”)" and not _BROKEN.search(line):
            kept.append(line)
    return "\n\n".join(kept)


def _without(text: str, grams: set[str]) -> str:
    """Articles on one country repeat each other: drop the paragraphs that share a run of words with `grams`."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if grams.isdisjoint(word_grams(paragraph)))


def _pages(file: Path) -> Iterator[tuple[str, str]]:
    with bz2.open(file) as stream:
        for _, element in ElementTree.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            page = {child.tag.rpartition("}")[2]: child for child in element.iter()}
            if page["ns"].text == "0" and "redirect" not in page:
                yield page["title"].text or "", page["text"].text or ""
            element.clear()
