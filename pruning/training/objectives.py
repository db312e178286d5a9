"""What a training minimises, as a sum over the predicted tokens of a batch, and the dense model that it may learn from:
in memory, or asked once and its likeliest tokens kept.

Shapes: B examples, L tokens each, V vocabulary, P predicted tokens of the batch (labels other than IGNORED, the first
of each example left out), K most likely tokens of a teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.training.batches import IGNORED, Batch, Examples, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: positions whose logits are compared at once: bounds what float32 copies of them take
_POSITIONS_AT_ONCE = 512
#: batches of a teacher between two saves
_SAVED_EVERY = 64


Look = Callable[[Batch, bool], "tuple[TeacherLogits | TopLogits, Sequence[Tensor]]"]
"""Of a batch, what the teacher says, and its residual streams if they are asked for."""


class Objective(Protocol):
    """Something to minimise."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Its sum over the predicted tokens of a batch, with gradients if the model has some."""
        ...


class Teacher(Protocol):
    """What a dense model says about a batch."""

    def divergence(self, student_PV: Tensor, positions: Tensor) -> Tensor:
        """Sum over those rows of KL(teacher || student); positions: their numbers among the batch's predicted ones."""
        ...


class CrossEntropy:
    """Minus the log-likelihood of the labels, in nats."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over the predicted tokens."""
        logits_PV = predicted(forward(model, batch).logits, batch)
        return F.cross_entropy(logits_PV.float(), targets(batch), reduction="sum")


@dataclass(frozen=True)
class Distillation:
    """KL divergence of the model's next-token distribution from the teacher's (Hinton et al., arXiv 1503.02531).

    Per token: (1 - hard_weight) * T^2 * KL(teacher || model), both softened by the temperature T, plus hard_weight
    times the cross entropy, plus hidden_weight times the mean over pairs of layers of the squared distance of their
    residual streams, relative to the teacher's mean square (as in MiniLLM-style pruning, NVIDIA Minitron arXiv
    2407.14679, section 3). look: gives the Teacher of a batch. layers: pairs (of the model, of the teacher) of indices
    into `hidden_states`. teacher: if it lies in memory.
    """

    look: Look
    hard_weight: float = 0.0
    hidden_weight: float = 0.0
    temperature: float = 1.0
    layers: tuple[tuple[int, int], ...] = ()
    teacher: nn.Module | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over the predicted tokens."""
        wants_hidden = self.hidden_weight > 0
        teacher, teachers_streams = self.look(batch, wants_hidden)
        outputs = forward(model, batch, output_hidden_states=wants_hidden)
        student_PV, target_P = predicted(outputs.logits, batch), targets(batch)
        loss = student_PV.new_zeros((), dtype=torch.float32)
        for rows in torch.split(torch.arange(len(target_P), device=target_P.device), _POSITIONS_AT_ONCE):
            logits = student_PV[rows].float()
            if self.hard_weight < 1:
                soft = teacher.divergence(logits / self.temperature, rows)
                loss = loss + (1 - self.hard_weight) * self.temperature**2 * soft
            if self.hard_weight > 0:
                loss = loss + self.hard_weight * F.cross_entropy(logits, target_P[rows], reduction="sum")
        if wants_hidden:
            loss = loss + self.hidden_weight * self._stream_distance(outputs.hidden_states, teachers_streams, batch)
        return loss

    def _stream_distance(self, own: Sequence[Tensor], teachers: Sequence[Tensor], batch: Batch) -> Tensor:
        distance = own[0].new_zeros((), dtype=torch.float32)
        for mine, theirs in self.layers:
            a, b = predicted(own[mine], batch).float(), predicted(teachers[theirs], batch).float()
            distance = distance + ((a - b).square().mean(-1) / b.square().mean()).sum()
        return distance / len(self.layers)


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's whole distributions, already divided by the temperature: (P, V)."""

    logits_PV: Tensor

    def divergence(self, student_PV: Tensor, positions: Tensor) -> Tensor:
        """Exact."""
        theirs = F.log_softmax(self.logits_PV[positions].float(), -1)
        return F.kl_div(F.log_softmax(student_PV, -1), theirs, log_target=True, reduction="sum")


@dataclass(frozen=True)
class TopLogits:
    """A teacher's K most likely tokens, and all others as one outcome.

    ids_PK; log_probs_PK: their log-probabilities at the temperature. The divergence between the two grouped
    distributions is a lower bound of the exact one, and equal to it where K is the vocabulary.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor

    def divergence(self, student_PV: Tensor, positions: Tensor) -> Tensor:
        """Of K + 1 outcomes."""
        theirs_PK = self.log_probs_PK[positions].float()
        mine_PK = F.log_softmax(student_PV, -1).gather(-1, self.ids_PK[positions].long())
        kept = (theirs_PK.exp() * (theirs_PK - mine_PK)).sum()
        rest, my_rest = _rest(theirs_PK), _rest(mine_PK)
        return kept + (rest.exp() * (rest - my_rest)).sum()


def _rest(log_probs_PK: Tensor) -> Tensor:
    """Log of the probability that is left to all other tokens."""
    left = -torch.expm1(torch.logsumexp(log_probs_PK, -1))
    return left.clamp_min(1e-6).log()


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's outputs on a batch; labels stay here, the loss is ours."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return model(**inputs, use_cache=False, **options)


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


def in_memory(teacher: PreTrainedModel, temperature: float, *, autocast: bool) -> Look:
    """Ask the teacher, which lies on the batch's device, for every batch."""

    def look(batch: Batch, hidden: bool) -> tuple[TeacherLogits, Sequence[Tensor]]:
        with torch.no_grad(), precision(teacher.device, autocast):
            outputs = forward(teacher, batch, output_hidden_states=hidden)
        return TeacherLogits(predicted(outputs.logits, batch) / temperature), outputs.hidden_states or ()

    return look


@dataclass(frozen=True)
class TopCache:
    """The K likeliest tokens of every predicted position of numbered examples, in two files.

    offsets: where each example's positions begin, and their number at the end.
    """

    ids: numpy.ndarray
    log_probs: numpy.ndarray
    offsets: numpy.ndarray

    def look(self, batch: Batch, hidden: bool) -> tuple[TopLogits, Sequence[Tensor]]:
        """Of the examples of a batch, by their `index`; hidden states are not kept."""
        assert not hidden, "the options refuse hidden states from a cache"
        rows = [numpy.arange(self.offsets[index], self.offsets[index + 1]) for index in batch["index"].tolist()]
        where, device = numpy.concatenate(rows), batch["labels"].device
        ids = torch.from_numpy(self.ids[where]).to(device)
        return TopLogits(ids, torch.from_numpy(self.log_probs[where]).to(device)), ()


def fill_cache(
    teacher: Callable[[], PreTrainedModel],
    examples: Examples,
    *,
    top_k: int,
    temperature: float,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    autocast: bool,
    folder: Path,
    identity: str,
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> TopCache:
    """Run the teacher over all examples once; what a killed call had written is not computed again.

    The teacher is loaded only if something is missing.
    """
    per_example = [count_predicted(batch) for batch in batches(examples, range(len(examples)), 1, pad_id)]
    offsets = numpy.concatenate([[0], numpy.cumsum(per_example)]).astype(numpy.int64)
    shape = (int(offsets[-1]), top_k)
    facts = [identity, top_k, temperature, shape[0], autocast]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    target = folder / f"teacher-{name}"
    target.mkdir(parents=True, exist_ok=True)
    state = target / "done.json"
    done = json.loads(state.read_text(encoding="utf-8")) if state.exists() else 0
    mode: Literal["r+", "w+"] = "r+" if done else "w+"
    ids = numpy.memmap(target / "ids", dtype=numpy.int32, mode=mode, shape=shape)
    log_probs = numpy.memmap(target / "log_probs", dtype=numpy.float16, mode=mode, shape=shape)
    if done < len(examples):
        model = teacher().to(device).eval()
        missing = range(done, len(examples))
        for number, batch in enumerate(batches(examples, missing, batch_size, pad_id), start=1):
            here = {key: value.to(device) for key, value in batch.items()}
            with torch.no_grad(), precision(device, autocast):
                logits_PV = predicted(forward(model, here).logits, here)
            top = F.log_softmax(logits_PV.float() / temperature, -1).topk(top_k, -1)
            until = min(len(examples), done + batch_size)
            rows = slice(int(offsets[done]), int(offsets[until]))
            ids[rows] = top.indices.to("cpu", torch.int32).numpy()
            log_probs[rows] = top.values.to("cpu", torch.float16).numpy()
            done = until
            if number % _SAVED_EVERY == 0 or done == len(examples):
                _save(state, done, ids, log_probs)
            progress(done / len(examples), f"teacher, {done} of {len(examples)} examples")
    return TopCache(ids, log_probs, offsets)


def precision(device: torch.device, autocast: bool) -> AbstractContextManager[object]:
    """bfloat16 where that is faster and harmless, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()


def _save(state: Path, done: int, *files: numpy.memmap) -> None:
    for file in files:
        file.flush()
    aside = state.with_name("done.aside")
    aside.write_text(json.dumps(done), encoding="utf-8")
    os.replace(aside, state)
