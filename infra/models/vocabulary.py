"""Tokens that a tokenizer has and its model has no embedding for: left out at import, or the reason to refuse.

Many fine-tunings of old models added `[PAD]` to a tokenizer and never made the embedding longer. Nobody wants that
token, but a text that has the word in it would yield it, and a batch padded with it would index beyond the embedding.
So the imported tokenizer does not know it: there the word is split like any other, and padding takes another token.
What a text or the model's own conventions yield (the vocabulary proper, words that were added, BOS, EOS) cannot be left
out: then tokenizer and model do not belong together.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import hub
from infra.errors import SourceInvalid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from infra.sources.located import Located

log = logging.getLogger("slimline")

_SPECIAL_MAPS = ("tokenizer_config.json", "special_tokens_map.json")
_CONFIGS = ("config.json", "generation_config.json")
_CONFIG_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_YIELDED = ("bos", "eos", "unk")


def fit_to_embedding_(folder: Path, repo_id: str, load: Callable[[Path], PreTrainedTokenizerBase]) -> None:
    """Leave out of an imported checkpoint special tokens, and ids in its configs, that lie beyond its embedding.

    What was left out is said once. repo_id: the model as the user calls it. load: the tokenizer of a folder.
    Raises SourceInvalid, naming a token, if text or the model's conventions yield one that has no embedding.
    """
    rows = _read(folder / "config.json").get("vocab_size")
    tokenizer = load(folder)
    if not isinstance(rows, int):
        return
    if ids := _drop_ids_(folder, rows):
        log.warning("%s: left out of its config, beyond its %d embeddings: %s", repo_id, rows, ", ".join(ids))
    beyond = _beyond(tokenizer, rows)
    if not beyond:
        return
    _refuse_yielded(tokenizer, beyond, rows, repo_id)
    template = writes(tokenizer.chat_template, beyond)
    _leave_out_(folder, set(beyond), rows, template=template)
    if left := _beyond(load(folder), rows):
        raise SourceInvalid(f"{_mismatch(tokenizer, rows, repo_id)}: {_some(left)} cannot be left out; {_WAY_OUT}")
    log.warning(
        "%s: the model has %d embeddings and none for the tokenizer's %s%s: left out, such words are split like others",
        repo_id,
        rows,
        _some(beyond),
        ", which its chat template writes (left out too)" if template else "",
    )


def tokenizer_content(located: Located) -> dict[str, Any] | None:
    """What the tokenizer.json of a model says, without loading it; None where there is none."""
    if located.folder is None:
        file = hub.download_file(located.repo_id, "tokenizer.json", located.revision)
    else:
        file = located.folder / "tokenizer.json"
    return None if file is None else _read(file) or None


def tokens_of(located: Located) -> dict[str, int] | None:
    """What a tokenizer's tokens are called and their ids, without loading it; None where no tokenizer.json says."""
    content = tokenizer_content(located)
    if content is None:
        return None
    vocabulary = (content.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):  # of a unigram model: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    return None if vocabulary is None else {**vocabulary, **added}


def writes(template: Any, tokens: Mapping[str, int]) -> bool:
    """Whether a chat template (a text, several by name or in a list, or None) writes one of the tokens."""
    text = template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
    return any(token in text for token in tokens)


def added_beyond(folder: Path, rows: Any) -> dict[str, int]:
    """The added tokens that the tokenizer's files name with an id beyond so many embeddings; no tokenizer is loaded."""
    if not isinstance(rows, int):
        return {}
    listed = _read(folder / "tokenizer.json").get("added_tokens") or []
    named = {str(entry["content"]): entry["id"] for entry in listed}
    for number, entry in (_read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        named[str(entry["content"])] = int(number)
    named |= _read(folder / "added_tokens.json")
    return {token: number for token, number in named.items() if number >= rows}


_WAY_OUT = (
    "take the tokenizer that was trained with this model, or a copy of the model with an embedding for each token"
)


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    found = {token: number for token, number in vocabulary.items() if number >= rows}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _refuse_yielded(tokenizer: PreTrainedTokenizerBase, beyond: Mapping[str, int], rows: int, repo_id: str) -> None:
    mismatch = _mismatch(tokenizer, rows, repo_id)
    for role in _YIELDED:
        token = getattr(tokenizer, f"{role}_token", None)
        if isinstance(token, str) and token in beyond:
            raise SourceInvalid(
                f"{mismatch}: its {role.upper()} token is {_some({token: beyond[token]})}; {_WAY_OUT}, or name another "
                f"{role}_token in tokenizer_config.json"
            )
    added = tokenizer.added_tokens_decoder
    words = {
        token: number
        for token, number in beyond.items()
        if token != tokenizer.pad_token and not (number in added and added[number].special)
    }
    if words:
        raise SourceInvalid(f"{mismatch}: text yields {_some(words)}; {_WAY_OUT}")
    always = {token: number for token, number in beyond.items() if number in tokenizer("a")["input_ids"]}
    if always:
        raise SourceInvalid(f"{mismatch}: it puts {_some(always)} around every text; {_WAY_OUT}")


def _mismatch(tokenizer: PreTrainedTokenizerBase, rows: int, repo_id: str) -> str:
    return f"the tokenizer of {repo_id} has {len(tokenizer)} tokens and the model {rows}"


def _some(tokens: Mapping[str, int]) -> str:
    """The first few by name."""
    named = [f"{token!r} (id {number})" for token, number in list(tokens.items())[:3]]
    more = len(tokens) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _drop_ids_(folder: Path, rows: int) -> list[str]:
    """Take ids beyond the embedding out of the configs: transformers cannot even build an embedding with such a pad id.

    Returns what was taken out. The model can neither be given such a token nor write one.
    """
    dropped: dict[str, None] = {}
    for path in (folder / name for name in _CONFIGS):
        config = _read(path)
        for key in _CONFIG_IDS:
            value = config.get(key)
            numbers = value if isinstance(value, list) else [value]
            kept = [number for number in numbers if not (isinstance(number, int) and number >= rows)]
            if len(kept) < len(numbers):
                dropped |= {f"{key} {number}": None for number in numbers if number not in kept}
                config[key] = kept or None
                _write(path, config)
    return list(dropped)


def _leave_out_(folder: Path, tokens: set[str], rows: int, *, template: bool) -> None:
    """Take tokens out of whichever of the tokenizer's files name them, and the chat template if it writes them."""
    for path in (folder / name for name in _SPECIAL_MAPS):
        if content := _read(path):
            kept = _without(content, tokens)
            if template:
                kept.pop("chat_template", None)
            _write(path, kept)
    if added := _read(folder / "added_tokens.json"):
        _write(folder / "added_tokens.json", {token: number for token, number in added.items() if token not in tokens})
    if fast := _read(folder / "tokenizer.json"):
        fast["added_tokens"] = [entry for entry in fast.get("added_tokens") or [] if entry["content"] not in tokens]
        if isinstance(fast.get("padding"), dict) and fast["padding"].get("pad_id", 0) >= rows:
            fast["padding"] = None
        vocabulary = fast.get("model", {}).get("vocab")
        if isinstance(vocabulary, dict):  # special tokens stand here too where a trainer was given them
            fast["model"]["vocab"] = {token: number for token, number in vocabulary.items() if token not in tokens}
        (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False, indent=2), encoding="utf-8")
    for name in ("chat_template.jinja", "chat_template.json") if template else ():
        (folder / name).unlink(missing_ok=True)


def _without(content: Any, tokens: set[str]) -> Any:
    """JSON without the entries that are one of the tokens, written as a word or as {"content": word}."""

    def named(value: Any) -> bool:
        word = value.get("content") if isinstance(value, dict) else value
        return isinstance(word, str) and word in tokens

    if isinstance(content, dict):
        return {key: _without(value, tokens) for key, value in content.items() if not named(value)}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_without(value, tokens) for value in content if not named(value)]
    return content


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file or it is something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
