"""A tokenizer in the words of GGUF: tokens with their kinds, merges or scores, special tokens, the chat template.

llama.cpp splits texts by rules that it knows by name, so that a tokenizer with other rules is refused: a file that
splits otherwise would be another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import SourceInvalid
from infra.models.import_model import load_tokenizer

#: kinds of tokens (github.com/ggml-org/ggml, docs/gguf.md)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: rules by the pattern of a Split, as they stand in tokenizer.json
_PATTERNS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}


@dataclass(frozen=True)
class Vocabulary:
    """model: "gpt2" (bytes and merges) or "llama" (SentencePiece: scores). pre: the name of the splitting rules."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint folder, filled up to `size` tokens, the rows of the embedding.

    Raises SourceInvalid, naming what is not like anything that llama.cpp knows.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SourceInvalid(f"{folder} has no tokenizer.json, from which a GGUF vocabulary is made: export it as hf")
    content = json.loads(file.read_bytes())
    model = content["model"]
    if model.get("type") != "BPE":
        raise SourceInvalid(
            f"the tokenizer is a {model.get('type')}, and GGUF vocabularies are made of BPE alone: export it as hf"
        )
    tokens, kinds = _tokens(content, size)
    by_bytes = not model.get("byte_fallback")
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("a").input_ids
    return Vocabulary(
        model="gpt2" if by_bytes else "llama",
        pre=_rules(content.get("pre_tokenizer")) if by_bytes else "default",
        tokens=tokens,
        kinds=kinds,
        merges=tuple(" ".join(pair) for pair in pairs) if by_bytes else (),
        scores=() if by_bytes else _scores(tokens, pairs),
        special=_special(folder, tokenizer),
        add_bos=len(ids) > 1 and ids[0] == tokenizer.bos_token_id,
        add_eos=len(ids) > 1 and ids[-1] == tokenizer.eos_token_id,
        add_space_prefix=None if by_bytes else _prefixes(content),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _tokens(content: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every token by its id; ids that the tokenizer does not have are unused ones."""
    found = {index: (text, _kind(text)) for text, index in content["model"]["vocab"].items()}
    for added in content.get("added_tokens", ()):
        found[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if unknown := content["model"].get("unk_token"):
        index = content["model"]["vocab"].get(unknown)
        if index is not None:
            found[index] = (unknown, UNKNOWN)
    if max(found) >= size:
        raise SourceInvalid(
            f"the tokenizer has token {max(found)} and the embedding {size} rows: import the model again, which leaves "
            "such tokens out"
        )
    filled = [found.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled)


def _kind(text: str) -> int:
    return BYTE if _BYTE.fullmatch(text) else NORMAL


def _rules(pre_tokenizer: Any) -> str:
    """llama.cpp's name for how a byte-level BPE splits a text before it merges."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    *before, last = steps or [{}]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not before and last.get("use_regex", True):
            return "gpt-2"
        if len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits"):
            return "smollm"
        pattern = before[0].get("pattern", {}).get("Regex") if len(before) == 1 else None
        if pattern in _PATTERNS and not last.get("use_regex", True):
            return _PATTERNS[pattern]
    raise SourceInvalid(
        f"the tokenizer splits texts by rules that none of llama.cpp's is known to be ({str(pre_tokenizer)[:160]}): "
        "export it as hf, and convert it with llama.cpp's own script"
    )


def _scores(tokens: tuple[str, ...], pairs: list[tuple[str, ...]]) -> tuple[float, ...]:
    """SentencePiece merges what scores highest first: the earlier a merge stands, the higher."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks.get(token, len(pairs) + index)) for index, token in enumerate(tokens))


def _prefixes(content: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of every text."""
    normalizer = content.get("normalizer") or {}
    if any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer])):
        return True
    pre = content.get("pre_tokenizer") or {}
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in pre.get("pretokenizers", [pre])
    )


def _special(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens by GGUF's words; of several that end a text the second one ends a turn."""
    found = {word: getattr(tokenizer, f"{word}_token_id") for word in ("bos", "eos", "unk", "pad")}
    generation = folder / "generation_config.json"
    ends = json.loads(generation.read_bytes()).get("eos_token_id") if generation.is_file() else None
    others = [each for each in ends if each != found["eos"]] if isinstance(ends, list) else []
    if others:
        found["eot"] = others[0]
    return {word: index for word, index in found.items() if isinstance(index, int)}
