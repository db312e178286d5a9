"""What a training is given: examples to learn from, others to judge by, and what of them decides the outcome."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from pruning.errors import PruningError
from pruning.training.batches import Batch, Examples, Numbered
from pruning.training.data import RecordData
from pruning.training.options import TextConfig, TrainingConfig, TrainingRun, WatchingConfig
from pruning.training.packing import pack
from pruning.training.records import Example, choose, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pruning.calibration import CalibrationSet

#: of text for each token that is wanted; where they do not do, twice as many are taken
_CHARACTERS = 6


@dataclass(frozen=True)
class Data:
    """Examples to train on, held-out ones, and windows of another text, which decide nothing; identity: what of them
    decides the outcome. num_tokens: of one pass."""

    train: Examples
    heldout: Examples | None
    identity: tuple[object, ...] = field(repr=False)
    num_tokens: int
    longest: int
    watched: Examples | None = None

    @property
    def numbered(self) -> Data:
        """The same, held-out examples counted behind the others."""
        heldout = self.heldout and Numbered(self.heldout, len(self.train))
        return replace(self, train=Numbered(self.train), heldout=heldout)

    @property
    def joined(self) -> Examples:
        """All of them, in that order."""
        return Joined(self.train, self.heldout)


class Encoded:
    """Records as examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Batch:
        return self._examples[index].tensors()


def record_examples(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    data: RecordData,
    config: TrainingConfig,
    count: int | None,
    max_length: int,
) -> Data:
    """`count` records to train on (None: all but the held-out ones) and config.num_heldout others. Raises PruningError
    for unusable records, or too few."""
    heldout = config.num_heldout
    if not heldout:
        chosen = choose(records, count, config.seed)
        examples = encode(tokenizer, chosen, data, max_length)
        held: list[Example] = []
    else:
        wanted = len(records) if count is None else count + heldout
        if wanted <= heldout:
            raise PruningError(f"num_heldout is {heldout}, but the data set has {len(records)} records: lower it")
        drawn = encode(tokenizer, choose(records, wanted, config.seed), data, max_length)
        held, examples = drawn[:heldout], drawn[heldout:]
    identity = (*((each.ids, each.num_prompt) for each in examples), *((each.ids, "held out") for each in held))
    return Data(
        Encoded(examples),
        Encoded(held) if held else None,
        identity,
        sum(len(example.ids) for example in examples),
        max(len(example.ids) for example in examples),
    )


def text_examples(
    tokenizer: PreTrainedTokenizerBase,
    texts: Callable[[], Iterator[str]],
    identity: str,
    config: TextConfig,
    run: TrainingRun,
) -> Data:
    """Packed windows. The leading process writes the tokens, the others read them."""
    if run.num_processes > 1 and not run.leads:
        dist.barrier()
    windows, heldout = pack(
        tokenizer,
        texts,
        num_tokens=config.num_tokens,
        seq_len=config.seq_len,
        num_heldout=config.num_heldout,
        across=config.cross_document_attention,
        folder=run.scratch,
        identity=f"{identity} {config.seed}",
        progress=lambda share: run.progress(0.0, f"packing text, {share:.0%}"),
    )
    if run.num_processes > 1 and run.leads:
        dist.barrier()
    return Data(
        windows, heldout if len(heldout) else None, (windows, heldout), len(windows) * config.seq_len, config.seq_len
    )


class Joined:
    """Examples behind each other, so that numbers are the same for what is trained on and what is held out."""

    def __init__(self, first: Examples, then: Examples | None) -> None:
        self._first, self._then = first, then

    def __len__(self) -> int:
        return len(self._first) + (len(self._then) if self._then else 0)

    def __getitem__(self, index: int) -> Batch:
        if index < len(self._first) or self._then is None:
            return self._first[index]
        return self._then[index - len(self._first)]


class TokenWindows:
    """Rows of token ids as examples, all of them predicted but the first of each."""

    def __init__(self, ids_NL: Tensor) -> None:
        self._ids_NL = ids_NL

    def __len__(self) -> int:
        return len(self._ids_NL)

    def __getitem__(self, index: int) -> Batch:
        ids = self._ids_NL[index]
        # positions that count on: one document per window, no padding
        return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(len(ids))}


def with_watched(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    texts: Callable[[], Iterator[str]] | None,
    config: WatchingConfig,
) -> Data:
    """The data and the first windows of the text that the config watches: rows joined by an empty line, no special
    tokens. Raises PruningError where there is too little of it."""
    if (watch := config.watch) is None:
        return data
    assert texts is not None, "it has the text that it watches"
    wanted = watch.num_windows * watch.seq_len
    rows: list[str] = []
    ids: list[int] = []
    size, enough = 0, _CHARACTERS * wanted
    for text in texts():
        rows.append(text)
        size += len(text)
        if size >= enough:
            ids, enough = _plain_ids(tokenizer, rows), 2 * size
            if len(ids) >= wanted:
                break
    else:
        ids = _plain_ids(tokenizer, rows)
    if len(ids) < wanted:
        raise PruningError(
            f"watch: {watch.dataset} has {len(ids)} tokens, and {watch.num_windows} windows of {watch.seq_len} are "
            f"{wanted}: lower num_windows"
        )
    return replace(data, watched=TokenWindows(torch.tensor(ids[:wanted]).view(watch.num_windows, watch.seq_len)))


def _plain_ids(tokenizer: PreTrainedTokenizerBase, rows: Sequence[str]) -> list[int]:
    ids: list[int] = tokenizer("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def window_examples(calibration: CalibrationSet, config: TrainingConfig) -> Data:
    """The windows that the model was pruned with, and config.num_heldout held-out ones."""
    windows_NL, heldout_ML = calibration.input_ids_NL, calibration.heldout_ids_ML[: config.num_heldout]
    digest = hashlib.sha256(windows_NL.numpy().tobytes() + heldout_ML.numpy().tobytes()).hexdigest()
    length = windows_NL.shape[1]
    return Data(TokenWindows(windows_NL), TokenWindows(heldout_ML), (digest,), windows_NL.numel(), length)
