"""Offline texts from gensim's test data: Australian news to calibrate on, English Wikipedia to measure perplexity on.

The two differ in source and domain and share no passage, so a perplexity measured on the second is out of the
calibration's domain.
"""

from __future__ import annotations

import bz2
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from infra.offline.repository import installed, text_table, write_dataset
from infra.offline.wikitext import prose
from infra.overlap.words import word_grams

_NEWS_ABOUT = (
    "Short articles of the Australian Broadcasting Corporation, the corpus of Lee, Pincombe & Welsh (2005), as shipped "
    "in gensim's test data (lee_background.cor and lee.cor), one article per row."
)
_WIKIPEDIA_ABOUT = (
    "Articles of an English Wikipedia dump shipped in gensim's test data (CC BY-SA), markup, tables, lists, references "
    "and headings removed, one article per row. Every fifth article is in test, the others in train; no 13 words in a "
    "row are in both."
)
_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_TEST_EVERY = 5
_MIN_CHARACTERS = 1500  # shorter remains are disambiguation pages and stubs


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
