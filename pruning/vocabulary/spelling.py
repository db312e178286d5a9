"""What a BPE writes in the place of a token that it does not have.

A BPE begins with the characters of a word (those that it does not have as bytes, if it falls back on them) and makes
the pair of neighbours that stands first in the list of merges one token, again and again. The merges inside the stretch
of text that ends as one token are the same whatever stands around it: those of the token's own text. So without a token
its text is what the last of them joined, and a text whose merges all stay is split as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """The tokens (ids) that stand in the place of another one.

    merged: the last merge makes the token of these two, so that there is no token without them. Else the token is a
    character that falls back on bytes, or one that only a whole word can be (`ignore_merges`): it needs none of them.
    """

    pieces: tuple[int, ...]
    merged: bool


def spellings(model: Mapping[str, Any]) -> dict[int, Spelling]:
    """By token, for all that can be spelled with others. model: of a tokenizer.json, a BPE without affixes of pieces.

    A token that is not in the answer cannot be written without itself: a character without bytes to fall back on, and
    the bytes.
    """
    vocabulary: Mapping[str, int] = model["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
    bytes_ = byte_tokens(model)
    found: dict[int, Spelling] = {}
    for token, number in vocabulary.items():
        if token in bytes_.values():
            continue
        spelling = _spelling(token, vocabulary, ranks, bytes_)
        if spelling is not None:
            found[number] = spelling
    return found


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in their order; older files join the two by a space."""
    return [_pair(merge) for merge in model["merges"]]


def byte_tokens(model: Mapping[str, Any]) -> dict[int, str]:
    """By byte, the token that a character falls back on; empty where there is no falling back."""
    if not model.get("byte_fallback"):
        return {}
    named = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return {byte: token for byte, token in named.items() if token in model["vocab"]}


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _spelling(
    token: str, vocabulary: Mapping[str, int], ranks: Mapping[tuple[str, str], int], bytes_: Mapping[int, str]
) -> Spelling | None:
    if len(token) == 1:
        pieces = _as_bytes(token, bytes_)
        return None if pieces is None else Spelling(tuple(vocabulary[piece] for piece in pieces), merged=False)
    symbols: list[str] = []
    for character in token:
        pieces = [character] if character in vocabulary else _as_bytes(character, bytes_)
        if pieces is None:
            return None
        symbols += pieces
    last: tuple[str, str] | None = None
    while len(symbols) > 1:
        places = [ranks.get(pair, math.inf) for pair in pairwise(symbols)]
        first = min(places)
        if first == math.inf:
            break
        place = places.index(first)
        last = symbols[place], symbols[place + 1]
        symbols[place : place + 2] = ["".join(last)]
    if symbols == [token]:
        assert last is not None, token
        return Spelling((vocabulary[last[0]], vocabulary[last[1]]), merged=True)
    return Spelling(tuple(vocabulary[symbol] for symbol in symbols), merged=False)


def _as_bytes(character: str, bytes_: Mapping[int, str]) -> list[str] | None:
    encoded = character.encode("utf-8", "surrogatepass")
    return [bytes_[byte] for byte in encoded] if all(byte in bytes_ for byte in encoded) else None
