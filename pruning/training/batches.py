"""Examples as batches of tensors, whatever they were made from.

An example is {"input_ids": (L,), "labels": (L,)} int64, perhaps with "position_ids" (L,) where documents are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100  # label that torch's cross entropy leaves out

Batch = dict[str, Tensor]


class Examples(Protocol):
    """A sequence of examples that can be looked at in any order."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Batch:
        """One of them."""
        ...


class Numbered:
    """Examples that carry their own number, from `first` on, so that what was computed of them before is found."""

    def __init__(self, examples: Examples, first: int = 0) -> None:
        self._examples, self._first = examples, first

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        return {**self._examples[index], "index": torch.tensor(self._first + index)}


def collate(pad_id: int) -> Callable[[Sequence[Batch]], Batch]:
    """A function from examples to a right-padded batch: input_ids, labels, each (batch, longest); attention_mask where
    there is padding or may be, position_ids and index where the examples have them."""

    def batch(examples: Sequence[Batch]) -> Batch:
        packed = "position_ids" in examples[0]
        longest = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), longest), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length], labels[row, :length] = example["input_ids"], example["labels"]
            mask[row, :length] = 1
        made = {"input_ids": ids, "labels": labels}
        if packed:  # from positions that begin anew transformers sees which tokens belong together
            made["position_ids"] = torch.stack([example["position_ids"] for example in examples])
        else:
            made["attention_mask"] = mask
        if "index" in examples[0]:
            made["index"] = torch.stack([example["index"] for example in examples])
        return made

    return batch


def batches(examples: Examples, indices: Sequence[int], size: int, pad_id: int) -> Iterator[Batch]:
    """Those examples in batches, in that order."""
    together = collate(pad_id)
    for start in range(0, len(indices), size):
        yield together([examples[index] for index in indices[start : start + size]])


def pad_id_of(tokenizer_pad: int | None, eos: int, num_embeddings: int) -> int:
    """What is masked but embedded all the same: a tokenizer may have a pad token without an embedding."""
    return eos if tokenizer_pad is None or tokenizer_pad >= num_embeddings else tokenizer_pad


def rows_of(batch: Batch) -> Tensor:
    """Where in (B * L, X) a label is predicted from: (P,)."""
    wanted_BL = torch.zeros_like(batch["labels"], dtype=torch.bool)
    wanted_BL[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return wanted_BL.flatten().nonzero().flatten()


def predicted(values_BLX: Tensor, batch: Batch) -> Tensor:
    """Rows of (B, L, X) from which a label is predicted: (P, X)."""
    return values_BLX[:, :-1][batch["labels"][:, 1:] != IGNORED]


def targets(batch: Batch) -> Tensor:
    """Their labels: (P,)."""
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORED]


def count_predicted(batch: Batch) -> int:
    """P."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
