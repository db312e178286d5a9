"""Instruction records as token ids: prompt, response, EOS, and the loss on the response only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.instructions import prompt_of, text_of
from pruning.training.batches import IGNORED
from pruning.training.data import RecordData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
log = logging.getLogger("slimline")


@dataclass(frozen=True)
class Example:
    """One tokenised record: the ids of prompt, response and EOS; the first `num_prompt` carry no loss."""

    ids: tuple[int, ...]
    num_prompt: int

    def tensors(self) -> dict[str, Tensor]:
        """input_ids and labels, each (len(ids),) int64."""
        ids = torch.tensor(self.ids)
        labels = ids.clone()
        labels[: self.num_prompt] = IGNORED
        return {"input_ids": ids, "labels": labels}


def choose(records: Sequence[Mapping[str, str]], count: int | None, seed: int) -> list[Mapping[str, str]]:
    """`count` records drawn without replacement, all of them in their order if None.

    Raises PruningError for no records or fewer than asked.
    """
    if not records:
        raise PruningError("there are no training records: the data set is empty")
    if count is None:
        return list(records)
    if count > len(records):
        raise PruningError(f"num_examples is {count}, but the data set has {len(records)} records: lower it")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    return [records[index] for index in order[:count].tolist()]


def encode(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]], data: RecordData, max_length: int
) -> list[Example]:
    """Tokenise records, cut to max_length; those whose whole response is cut away are left out.

    Raises PruningError for missing columns, a tokenizer without EOS, or if nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise PruningError("the tokenizer has no EOS token, without which a model cannot learn to stop: set eos_token")
    for index, record in enumerate(records):
        if missing := [name for name in data.columns if not isinstance(record.get(name), str)]:
            raise PruningError(f"training record {index} has no text in column {missing[0]!r}; it has {sorted(record)}")
    if empty := sum(not record[data.output].strip() for record in records):
        if empty == len(records):
            raise PruningError(f"all {empty} training records are empty in column {data.output!r}: name another column")
        log.warning("%d of %d training records have an empty %s and are left out", empty, len(records), data.output)
        records = [record for record in records if record[data.output].strip()]
    pairs = zip(*_prompts_and_texts(tokenizer, records, data), strict=True)
    examples = [_example(prompt, full, tokenizer.eos_token_id, max_length) for prompt, full in pairs]
    left = [example for example in examples if len(example.ids) > example.num_prompt]
    if not left:
        raise PruningError(
            f"none of the {len(records)} training records has a response within max_length={max_length} tokens: "
            "raise it"
        )
    return left


def _prompts_and_texts(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]], data: RecordData
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of every prompt, and of prompt and response as one text."""
    if data.template == "alpaca":
        prompts = [prompt_of(record, data) for record in records]
        texts = [text_of(record, data) for record in records]
        return _tokens(tokenizer, prompts), _tokens(tokenizer, texts)
    if not tokenizer.chat_template:
        raise PruningError(
            "data.template is chat and the tokenizer has no chat template: take alpaca, or an instruct model"
        )

    def templated(record: Mapping[str, str], answered: bool) -> str:
        asked = "\n\n".join(filter(None, (record[data.instruction], record[data.input] if data.input else "")))
        turns = [{"role": "user", "content": asked}]
        if answered:
            turns.append({"role": "assistant", "content": record[data.output]})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered))

    # the template writes all special tokens itself
    prompts, texts = ([templated(record, answered) for record in records] for answered in (False, True))
    return _tokens(tokenizer, prompts, special=False), _tokens(tokenizer, texts, special=False)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool = True) -> list[list[int]]:
    # truncation is ours; verbose=False: no warning about texts longer than the model's context
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]


def _example(prompt: list[int], full: list[int], eos_id: int, max_length: int) -> Example:
    # Prompt and response are tokenised as one text, as the model will meet them; where the tokens agree is the prompt.
    same = (a == b for a, b in zip(prompt, full, strict=False))
    num_prompt = next((index for index, equal in enumerate(same) if not equal), min(len(prompt), len(full)))
    # a chat template may write white space behind its end of turn, which is often EOS itself
    ends = eos_id in full[max(num_prompt, len(full) - 2) :]
    ids = full if ends else [*full, eos_id]
    return Example(tuple(ids[:max_length]), num_prompt)
