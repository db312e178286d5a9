"""Running text as windows of equal length, packed document after document without padding.

Each document is followed by EOS. Its tokens attend to nothing before it, unless that is asked for: positions begin anew
with each document, from which transformers sees which tokens belong together. Tokens lie in a file, so that a budget of
billions takes no memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch

from pruning.errors import PruningError
from pruning.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_PER_CALL = 256
_TOKENS, _FACTS = "tokens.bin", "tokens.json"


@dataclass(frozen=True)
class Windows:
    """Windows `first` to `last` of a packed text.

    ids: all tokens, int32. starts: where documents begin, rising, the first at 0. seq_len: tokens per window.
    across: whether tokens see the documents before their own.
    """

    ids: numpy.ndarray
    starts: numpy.ndarray
    seq_len: int
    across: bool
    first: int
    last: int
    digest: str

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = (self.first + index) * self.seq_len
        ids = torch.from_numpy(self.ids[begin : begin + self.seq_len].astype(numpy.int64))
        labels = ids.clone()
        if self.across:
            return {"input_ids": ids, "labels": labels}
        where = numpy.arange(begin, begin + self.seq_len)
        began = self.starts[numpy.searchsorted(self.starts, where, side="right") - 1]
        positions = torch.from_numpy(where - numpy.maximum(began, begin))
        labels[positions == 0] = IGNORED  # nothing before it tells what a document begins with
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def __repr__(self) -> str:
        return f"Windows({self.digest}, {self.seq_len}, {self.across}, {self.first}, {self.last})"


def pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Callable[[], Iterator[str]],
    *,
    num_tokens: int,
    seq_len: int,
    num_heldout: int,
    across: bool,
    folder: Path,
    identity: str,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Windows, Windows]:
    """Windows to train on, num_tokens in all, and the `num_heldout` held-out ones before them, of other documents.

    documents: in the order in which they are read, up to as many as are needed. folder: where the tokens lie; they are
    made once for one `identity`. Raises PruningError for a budget below one window, too little text, or a tokenizer
    without EOS.
    """
    num_windows = num_tokens // seq_len
    if not num_windows:
        raise PruningError(f"num_tokens {num_tokens} is less than one window of seq_len {seq_len}: raise it")
    if tokenizer.eos_token_id is None:
        raise PruningError("the tokenizer has no EOS token, without which documents run into each other: set eos_token")
    facts = {"identity": identity, "num_windows": num_windows, "num_heldout": num_heldout, "seq_len": seq_len}
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    target = folder / f"packed-{name}"
    if not (target / _FACTS).exists():
        _write(tokenizer, documents, num_windows, num_heldout, seq_len, target, progress)
    read = json.loads((target / _FACTS).read_text(encoding="utf-8"))
    ids = numpy.memmap(target / _TOKENS, dtype=numpy.int32, mode="r")
    starts = numpy.asarray(read["starts"], dtype=numpy.int64)

    def windows(first: int, last: int) -> Windows:
        return Windows(ids, starts, seq_len, across, first, last, read["digest"])

    return windows(num_heldout, num_heldout + num_windows), windows(0, num_heldout)


def _write(
    tokenizer: PreTrainedTokenizerBase,
    documents: Callable[[], Iterator[str]],
    num_windows: int,
    num_heldout: int,
    seq_len: int,
    target: Path,
    progress: Callable[[float], None],
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    heldout, wanted = num_heldout * seq_len, (num_heldout + num_windows) * seq_len
    starts, written, digest, texts = [], 0, hashlib.sha256(), iter(documents())
    with (target / _TOKENS).open("wb") as file:
        while written < wanted and (some := list(islice(texts, _DOCUMENTS_PER_CALL))):
            for tokens in tokenizer(some, verbose=False)["input_ids"]:
                ended = tokens if tokens[-1:] == [tokenizer.eos_token_id] else [*tokens, tokenizer.eos_token_id]
                ids = numpy.asarray(ended, dtype=numpy.int32)
                # what is left of a document when the last held-out window is full is not trained on
                ids = ids[: (heldout if written < heldout else wanted) - written]
                if len(ids) > 1:
                    starts.append(written)
                    written += len(ids)
                    digest.update(ids.tobytes())
                    file.write(ids.tobytes())
            progress(min(1.0, written / wanted))
        file.flush()
        os.fsync(file.fileno())
    if written < wanted:
        raise PruningError(
            f"the training text has {written} tokens, fewer than the {num_windows} windows and {num_heldout} held-out "
            f"ones of seq_len {seq_len} that are asked for ({wanted}): lower num_tokens (and raise epochs), or name a "
            "larger data set"
        )
    aside = target / f"{_FACTS}.aside"
    aside.write_text(json.dumps({"starts": starts, "digest": digest.hexdigest()}), encoding="utf-8")
    os.replace(aside, target / _FACTS)
