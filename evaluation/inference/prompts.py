"""Prompts cut to what a model can read: at their beginning, as lm-eval does, or in their middle, as LongBench does.

Imports neither torch nor transformers: a run is planned with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evaluation.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["left", "middle"]

LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the length of an answer; of several the first counts, as in lm-eval."""

_MAX_GEN_TOKS = 256
"""lm-eval's default."""


@dataclass(frozen=True)
class PromptRule:
    """How the text of a prompt becomes the tokens that a model reads.

    context: most tokens of prompt and answer together. truncation: `left` keeps the end of a prompt, chat template and
    all; `middle` keeps its two ends, and puts it into the chat template afterwards. The other fields are for `middle`:
    prompt_length: most tokens of a prompt before it is put into the chat template; None for as many as leave room for
    template and answer. chat_template: whether to do that. add_special_tokens: None for what the tokenizer does itself.
    """

    context: int
    truncation: Truncation = "left"
    prompt_length: int | None = None
    chat_template: bool = False
    add_special_tokens: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """What the model reads: token ids, and the text they stand for. truncated: some of it was left out."""

    input_ids: tuple[int, ...]
    text: str
    truncated: bool


def fit_prompt(tokenizer: PreTrainedTokenizerBase, text: str, rule: PromptRule, *, max_gen_toks: int) -> Prompt:
    """Cut a prompt so that an answer of `max_gen_toks` tokens fits behind it.

    Raises EvaluationError if the context has no room for a prompt.
    """
    room = rule.context - max_gen_toks
    if room < 2:
        raise EvaluationError(
            f"an answer of {max_gen_toks} tokens leaves no room for a prompt in a context of {rule.context}; "
            "take a model of a longer context, or leave the task out"
        )
    if rule.truncation == "middle":
        return _fit_middle(tokenizer, text, rule, room)
    ids = _encode(tokenizer, text, rule)
    if len(ids) <= room:
        return Prompt(ids, text, truncated=False)
    return Prompt(ids[-room:], str(tokenizer.decode(list(ids[-room:]), skip_special_tokens=False)), truncated=True)


def cut_middle(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], length: int) -> str:
    """The text of the first and of the last half of `length` tokens, joined; special tokens are dropped.

    The procedure of LongBench's authors (arXiv 2308.14508, section 4.1 and their pred.py): of an odd length the two
    halves are one token short.
    """
    half = length // 2
    ends = (ids[:half], ids[len(ids) - half :])
    return "".join(str(tokenizer.decode(list(end), skip_special_tokens=True)) for end in ends)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text as the only message of a user, and the beginning of an answer."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _fit_middle(tokenizer: PreTrainedTokenizerBase, text: str, rule: PromptRule, room: int) -> Prompt:
    whole = _encode(tokenizer, text, rule)
    length = min(rule.prompt_length or room, room)
    truncated = len(whole) > length
    cut = cut_middle(tokenizer, whole, length) if truncated else text
    while True:
        asked = chat_prompt(tokenizer, cut) if rule.chat_template else cut
        ids = whole if asked == text else _encode(tokenizer, asked, rule)
        if len(ids) <= room:
            return Prompt(ids, asked, truncated)
        # The template, or two halves that meet in other tokens than they were cut from, need more room than was left.
        length = min(length, len(whole)) - (len(ids) - room)
        if length < 2:
            raise EvaluationError(
                f"the chat template alone fills a context of {rule.context} tokens; set chat_template: false"
            )
        truncated, cut = True, cut_middle(tokenizer, whole, length)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, rule: PromptRule) -> tuple[int, ...]:
    """As lm-eval does: no second BOS before a text that begins with one. verbose: a long text needs no warning."""
    special: dict[str, bool] = {}
    if tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token)):
        special["add_special_tokens"] = False
    elif rule.add_special_tokens is not None:
        special["add_special_tokens"] = rule.add_special_tokens
    return tuple(tokenizer(text, truncation=False, verbose=False, **special)["input_ids"])


def max_gen_toks(settings: Mapping[str, Any]) -> int:
    """Tokens of an answer by a task's generation settings."""
    given = (settings[key] for key in LENGTH_KEYS if settings.get(key) is not None)
    return int(next(given, _MAX_GEN_TOKS))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def check_chat_template(present: bool | None) -> None:
    """Raise EvaluationError if a chat template is asked for and absent; None: it is not known yet."""
    if present is False:
        raise EvaluationError(
            "chat_template: true, but the model's tokenizer has no chat template; "
            "set chat_template: false, or take the instruct or chat version of the model "
            "(a template that writes tokens without an embedding does not count)"
        )
