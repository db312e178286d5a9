"""tokenizer.json with fewer tokens: what must stay whatever a corpus says, and the file without the rest.

Normaliser, splitting rules, decoder, templates and the text of the chat template stay to the letter; what names ids
names the new ones. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.errors import PruningError
from pruning.vocabulary.selection import with_parts
from pruning.vocabulary.spelling import Spelling, merge_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
#: the same tokens once more, with their old ids; whoever finds tokenizer.json reads none of them
_DOUBLES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
#: what writes characters of its own, or reads them
_RULES = ("normalizer", "pre_tokenizer", "decoder")
#: white space as it is, as SentencePiece and as the alphabet of bytes write it
_SPACES = frozenset(" \t\n\r▁ĠĊĉč")
#: of any script, with bytes that are no text, to see that nothing is lost
PROBES = (
    "It's 1.5 % of 12,345; see https://example.org/a_b?c=d#e\n\n\tdef f(x): return x**2  # ok\r\n",
    "Zażółć gęślą jaźń, ÀÉÎÕÜ ß ø, \u00a0\u200b\ufeff nothing, ﬁ ﬂ ½ ²",
    "中文分词 日本語のテキスト 한국어 ไทย العربية עברית हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \x00\x07\x7f",
    "          " + "=" * 70 + "aaaaaaaaaaaaaaaaaaaaaaa supercalifragilisticexpialidocious",
)


def check_content(content: Mapping[str, Any]) -> None:
    """Raise PruningError unless the tokenizer of a tokenizer.json is one from which tokens can be taken."""
    model = content.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise PruningError(
            f"the tokenizer is a {kind}, and a smaller vocabulary is made of a BPE alone (bytes or byte fallback): "
            "leave the step vocabulary out, or take a model with such a tokenizer"
        )
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if affixes:
        raise PruningError(
            f"the tokenizer marks pieces of words ({affixes[0]} {model[affixes[0]]!r}), and a smaller vocabulary is "
            "made of a BPE without such marks: leave the step vocabulary out"
        )


def all_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json by its text."""
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    return {**content["model"]["vocab"], **added}


def required_tokens(
    content: Mapping[str, Any], spelled: Mapping[int, Spelling], named: Iterable[int] = ()
) -> frozenset[int]:
    """Ids that stay, with all that they are made of.

    These are added tokens, those that cannot be spelled without themselves (not in `spelled`), the unknown token, what
    post-processor and padding put around a text, characters that the rules write, `named`, which configs name, and runs
    of white space: a corpus of documents does not show what stands between them, and often not how they were laid out.
    """
    model = content["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    rules = set(json.dumps([content.get(name) for name in _RULES], ensure_ascii=False))
    ids = {entry["id"] for entry in content.get("added_tokens") or ()} | set(named)
    ids |= set(vocabulary.values()) - spelled.keys()
    ids |= {number for text, number in vocabulary.items() if _SPACES.issuperset(text)}
    ids |= {vocabulary[text] for text in (*rules, model.get("unk_token")) if text in vocabulary}
    ids |= _ids_of_processor(content.get("post_processor"))
    if isinstance(content.get("padding"), dict):
        ids.add(content["padding"]["pad_id"])
    return with_parts(ids, spelled)


def cut_content(content: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The tokenizer.json with the tokens that have a new id, by their old ones; merges stay whose two parts and result
    all do."""
    model = content["model"]
    vocabulary = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
    merges = [
        merge
        for merge, pair in zip(model["merges"], merge_pairs(model), strict=True)
        if {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    added = [entry | {"id": new_ids[entry["id"]]} for entry in content.get("added_tokens") or ()]
    cut = {**content, "added_tokens": added, "model": {**model, "vocab": vocabulary, "merges": merges}}
    cut["post_processor"] = _with_new_ids(content.get("post_processor"), new_ids)
    if isinstance(content.get("padding"), dict):
        cut["padding"] = content["padding"] | {"pad_id": new_ids[content["padding"]["pad_id"]]}
    return cut


def cut_tokenizer_(folder: Path, new_ids: Mapping[int, int]) -> None:
    """Take the tokens without a new id from the tokenizer's files in a folder."""
    content = json.loads((folder / FILE).read_bytes())
    (folder / FILE).write_text(
        json.dumps(cut_content(content, new_ids), ensure_ascii=False, indent=2), encoding="utf-8"
    )
    path = folder / CONFIG
    if path.is_file():
        config = json.loads(path.read_bytes())
        if decoder := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {str(new_ids[int(number)]): entry for number, entry in decoder.items()}
            path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for name in _DOUBLES:
        (folder / name).unlink(missing_ok=True)


def check_tokenizer(
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    new_ids: Mapping[int, int],
    texts: Iterable[str],
) -> None:
    """Raise PruningError unless the smaller tokenizer has just the tokens with new ids, and gives back of every text
    what the one before gives."""
    expected = {token: new_ids[number] for token, number in before.get_vocab().items() if number in new_ids}
    found = after.get_vocab()
    if found != expected:
        token = min(token for token in found.keys() | expected.keys() if found.get(token) != expected.get(token))
        raise PruningError(
            f"the tokenizer has {token!r} as {found.get(token)} once its vocabulary is smaller, and not as "
            f"{expected.get(token)}: leave the step vocabulary out"
        )
    for text in texts:
        was, now = (_there_and_back(tokenizer, text) for tokenizer in (before, after))
        if was != now:
            raise PruningError(
                f"the smaller tokenizer gives back {now[:80]!r} where the one before gives {was[:80]!r}: leave the "
                "step vocabulary out"
            )


def _there_and_back(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids_of_processor(processor: Any) -> set[int]:
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _map_processor(processor, note)
    return found


def _with_new_ids(processor: Any, new_ids: Mapping[int, int]) -> Any:
    return _map_processor(processor, new_ids.__getitem__)


def _map_processor(processor: Any, change: Callable[[int], int]) -> Any:
    """A post-processor with other ids: special tokens of a template, [token, id] of a Bert or a Roberta, several."""
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_map_processor(each, change) for each in processor["processors"]]
    if processor.get("type") == "TemplateProcessing":
        special: Mapping[str, Any] = processor.get("special_tokens") or {}
        changed["special_tokens"] = {
            token: entry | {"ids": [change(number) for number in entry["ids"]]} for token, entry in special.items()
        }
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            token, number = processor[name]
            changed[name] = [token, change(number)]
    return changed


def named_ids(values: Mapping[str, Any]) -> frozenset[int]:
    """The token ids that a config names under keys such as bos_token_id."""
    return frozenset(number for key, value in values.items() if _is_id(key) for number in _numbers(value))


def with_new_ids(values: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The config with new ids; what is no id of a row (-1) stays."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(each) for each in value]
        return new_ids.get(value, value) if isinstance(value, int) else value

    return {key: change(value) if _is_id(key) else value for key, value in values.items()}


def _is_id(key: str) -> bool:
    return key.endswith("_token_id")


def _numbers(value: Any) -> Collection[int]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and number >= 0]
