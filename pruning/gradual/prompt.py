"""A text in front of every example that is trained on, which tells the model what is being done to it (the
collaborative prompt of Compresso, arXiv 2310.05015, in words of our own)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pruning.training.batches import IGNORED, Batch, Examples
from pruning.training.example_sets import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = (
    "Parts of you, attention heads and channels that contribute little, are being removed while you read this. Use "
    "what remains as well as you can: stay accurate and fluent, and answer as if nothing were missing.\n\n"
)


def with_prompt(data: Data, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The same examples behind the prompt, which is read and not predicted."""
    ids = torch.tensor(tokenizer(PROMPT, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    bos = tokenizer.bos_token_id
    heldout = data.heldout and Prompted(data.heldout, ids, bos)
    return replace(
        data,
        train=Prompted(data.train, ids, bos),
        heldout=heldout,
        identity=(*data.identity, PROMPT),
        num_tokens=data.num_tokens + len(ids) * len(data.train),
        longest=data.longest + len(ids),
    )


class Prompted:
    """Examples with token ids in front of them, but behind the token that begins every text, if there is one."""

    def __init__(self, examples: Examples, prompt_P: torch.Tensor, bos: int | None) -> None:
        self._examples, self._prompt_P, self._bos = examples, prompt_P, bos

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        example = self._examples[index]
        ids, labels = example["input_ids"], example["labels"]
        begin = int(self._bos is not None and len(ids) > 0 and int(ids[0]) == self._bos)
        unread = torch.full_like(self._prompt_P, IGNORED)
        return {
            "input_ids": torch.cat([ids[:begin], self._prompt_P, ids[begin:]]),
            "labels": torch.cat([labels[:begin], unread, labels[begin:]]),
        }
