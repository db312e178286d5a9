"""Instruction records as token ids: prompt, response, EOS, and the loss on the response only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.instructions import InstructionColumns, prompt_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One tokenised record: the ids of prompt, response and EOS; the first `num_prompt` carry no loss."""

    ids: tuple[int, ...]
    num_prompt: int


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
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]], data: InstructionColumns, max_length: int
) -> list[Example]:
    """Tokenise records, cut to max_length; those whose whole response is cut away are left out.

    Raises PruningError for missing columns, a tokenizer without EOS, or if nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise PruningError("the tokenizer has no EOS token, without which a model cannot learn to stop: set eos_token")
    for index, record in enumerate(records):
        if missing := [name for name in data.columns if not isinstance(record.get(name), str)]:
            raise PruningError(f"training record {index} has no text in column {missing[0]!r}; it has {sorted(record)}")
    prompts = [prompt_of(record, data) for record in records]
    texts = [text_of(record, data) for record in records]
    pairs = zip(_tokens(tokenizer, prompts), _tokens(tokenizer, texts), strict=True)
    examples = [_example(prompt, full, tokenizer.eos_token_id, max_length) for prompt, full in pairs]
    left = [example for example in examples if len(example.ids) > example.num_prompt]
    if not left:
        raise PruningError(
            f"none of the {len(records)} training records has a response within max_length={max_length} tokens: "
            "raise it"
        )
    return left


def collate(pad_id: int) -> Callable[[list[Example]], dict[str, Tensor]]:
    """A function from examples to a right-padded batch: input_ids, attention_mask, labels, each (batch, longest)."""

    def batch(examples: list[Example]) -> dict[str, Tensor]:
        longest = max(len(example.ids) for example in examples)
        ids = torch.full((len(examples), longest), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            length = len(example.ids)
            ids[row, :length] = torch.tensor(example.ids)
            mask[row, :length] = 1
            labels[row, example.num_prompt : length] = ids[row, example.num_prompt : length]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return batch


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # truncation is ours; verbose=False: no warning about texts longer than the model's context
    return [list(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _example(prompt: list[int], full: list[int], eos_id: int, max_length: int) -> Example:
    # Prompt and response are tokenised as one text, as the model will meet them; where the tokens agree is the prompt.
    same = (a == b for a, b in zip(prompt, full, strict=False))
    num_prompt = next((index for index, equal in enumerate(same) if not equal), min(len(prompt), len(full)))
    ids = full if full[num_prompt:] and full[-1] == eos_id else [*full, eos_id]
    return Example(tuple(ids[:max_length]), num_prompt)
