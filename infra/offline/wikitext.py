"""Plain prose out of Wikipedia's markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from infra.errors import SourceMissing

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Tag, Template
    from mwparserfromhell.wikicode import Wikicode


def _starting(*names: str) -> re.Pattern[str]:
    return re.compile(rf"({'|'.join(' '.join(names).split())})".replace("_", " "), re.IGNORECASE)


# Sections that hold pointers, not prose: the first of them ends an article.
_APPARATUS = _starting(
    r"(see_also|references?|notes|footnotes|further_reading|external_links|bibliography|sources|works_cited|gallery)\b"
)
# Links that are not words of the text: files, categories, other languages.
_NAMESPACE = _starting(r":?(file|image|category|media|template|wikipedia|portal|help|[a-z]{2,3}(-[a-z]+)*):")
_KEPT_TAGS = {"b", "i", "u", "s", "q", "em", "strong", "small", "big", "span", "sup", "sub", "cite", "abbr"}
_KEPT_TAGS |= {"blockquote", "nowiki"}
_LIST_TAGS = {"li", "dt", "dd"}
_FORMULA_TAGS = {"math", "code", "chem", "ce", "score", "hiero"}
# Templates whose last argument is a word of the text.
_WORDED = _starting(r"lang([-|].*)?$ transl$ transliteration$ nowrap$ nobr$ small$ smallcaps$ sc$ em$ abbr$")
# Templates that stand beside the text (notes, citations, banners): without them a sentence is still whole.
_BESIDE = _starting(
    "cite citation citation_needed cn fact sfn harv refn efn r$ rp$ ref note page full not_in verify failed dead_link",
    "dubious clarify who when why where which by_whom according_to specify vague weasel better primary original",
    "undue synthesis update anchor main see_also further refimprove clear portal multiple_image infobox use_",
    "nbsp ndash spaced dot",
)

# In the text on its way: a line of a list, and a hole where a formula or an unknown inline template was.
_LIST_LINE, _HOLE = "\x00", "\x01"
_BROKEN = re.compile(r"[\x00\x01]|\{\{|\}\}|\[\[|''|<[a-z/]")  # those, and markup its author left unclosed


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
    elif _WORDED.match(name) and words:
        yield from _plain(words[-1])
    elif not _BESIDE.match(name):
        yield _HOLE


def _tidy(text: str) -> str:
    """Unbroken paragraphs that end like a sentence, without the empty brackets and doubled blanks left by removals."""
    paragraphs = [_closed(line) for line in text.split("\n") if not _BROKEN.search(line)]
    return "\n\n".join(line for line in paragraphs if len(line) > 80 and line[-1] in ".!?\"'”)")


def _closed(line: str) -> str:
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"\([\s;,:]*\)|\[[\s;,]*\]", "", line)  # nothing left inside
    line = re.sub(r"(?<=[(\[])[\s;,]+|[\s;,]+(?=[)\]])", "", line)  # only separators left on one side
    return re.sub(r"\s+(?=[,.;: ])", "", line).strip()
