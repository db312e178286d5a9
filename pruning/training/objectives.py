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

from pruning.training.batches import (
    Batch,
    Examples,
    batches,
    count_predicted,
    predicted,
    rows_of,
    targets,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: positions whose logits are in float32 at once: few, so that they stay near the processor
_POSITIONS_AT_ONCE = 128
#: batches of a teacher between two saves
_SAVED_EVERY = 64
#: what is left beside the likeliest tokens is at least that probable
_LEAST = 1e-6

Look = Callable[[Batch, bool], "tuple[TeacherLogits | TopLogits, Sequence[Tensor]]"]
"""Of a batch, what the teacher says, and its residual streams if they are asked for."""

Part = Callable[[Tensor, slice], "tuple[Tensor, Tensor]"]
"""From the float32 logits of some predicted positions, and which they are, to the sum of a loss and its gradient."""


class Objective(Protocol):
    """Something to minimise."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Its sum over the predicted tokens of a batch, with gradients if the model has some."""
        ...


class CrossEntropy:
    """Minus the log-likelihood of the labels, in nats."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum over the predicted tokens."""
        return sum_over(forward(model, batch).logits, batch, _cross_entropy(targets(batch)))


@dataclass(frozen=True)
class Distillation:
    """KL divergence of the model's next-token distribution from the teacher's (Hinton et al., arXiv 1503.02531).

    Per token: (1 - hard_weight) * T^2 * KL(teacher || model), both softened by the temperature T, plus hard_weight
    times the cross entropy, plus hidden_weight times the mean over pairs of layers of the squared distance of their
    residual streams, relative to the teacher's mean square (intermediate states as in Minitron, arXiv 2407.14679,
    section 3). look: what the teacher says of a batch. layers: pairs (of the model, of the teacher) of indices into
    `hidden_states`. teacher: if it lies in memory.
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
        hard, soft = _cross_entropy(targets(batch)), teacher.divergence(self.temperature)

        def both(logits_PV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            loss, gradient_PV = logits_PV.new_zeros(()), torch.zeros_like(logits_PV)
            for weight, term in ((self.hard_weight, hard), ((1 - self.hard_weight) * self.temperature**2, soft)):
                if weight:
                    value, slope_PV = term(logits_PV, part)
                    loss, gradient_PV = loss + weight * value, gradient_PV.add_(slope_PV, alpha=weight)
            return loss, gradient_PV

        loss = sum_over(outputs.logits, batch, both if self.hard_weight or self.temperature != 1 else soft)
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
    """A teacher's whole distributions. rows_P: where in them the predicted positions are."""

    logits_RV: Tensor
    rows_P: Tensor

    def divergence(self, temperature: float) -> Part:
        """KL(teacher || model), both softened."""

        def part(logits_PV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            theirs_PV = F.log_softmax(self.logits_RV[self.rows_P[part]].float() / temperature, -1)
            mine_PV = F.log_softmax(logits_PV / temperature, -1)
            probability_PV = theirs_PV.exp()
            loss = torch.sum(probability_PV * theirs_PV.sub_(mine_PV))
            return loss, mine_PV.exp_().sub_(probability_PV).div_(temperature)

        return part


@dataclass(frozen=True)
class TopLogits:
    """A teacher's K most likely tokens at its temperature, and all others as one outcome.

    The divergence between the two grouped distributions is a lower bound of the exact one, and equal to it where K is
    the vocabulary.
    """

    ids_PK: Tensor
    log_probs_PK: Tensor

    def divergence(self, temperature: float) -> Part:
        """KL(teacher || model) of K + 1 outcomes, both softened."""

        def part(logits_PV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            theirs_PK, ids_PK = self.log_probs_PK[part].float(), self.ids_PK[part].long()
            mine_PV = F.log_softmax(logits_PV / temperature, -1)
            mine_PK, rest_P, my_rest_P = mine_PV.gather(-1, ids_PK), _rest(theirs_PK), _rest(mine_PV.gather(-1, ids_PK))
            left_P = rest_P.exp()
            loss = torch.sum(theirs_PK.exp() * (theirs_PK - mine_PK)) + torch.sum(left_P * (rest_P - my_rest_P))
            # of the model's own probabilities q: those kept have q - p, all others q times what is too much of them
            probability_PV = mine_PV.exp_()
            kept_PK = probability_PV.gather(-1, ids_PK) - theirs_PK.exp()
            gradient_PV = probability_PV.mul_((1 - left_P / my_rest_P.exp())[:, None])
            return loss, gradient_PV.scatter_(-1, ids_PK, kept_PK).div_(temperature)

        return part


def _rest(log_probs_PK: Tensor) -> Tensor:
    """Log of the probability that is left to all other tokens: (P,)."""
    return (-torch.expm1(torch.logsumexp(log_probs_PK, -1))).clamp_min(_LEAST).log()


def _cross_entropy(target_P: Tensor) -> Part:
    def part(logits_PV: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        labels_P1 = target_P[part, None]
        log_probs_PV = F.log_softmax(logits_PV, -1)
        loss = -log_probs_PV.gather(-1, labels_P1).sum()
        ones_P1 = torch.ones_like(labels_P1, dtype=logits_PV.dtype)
        return loss, log_probs_PV.exp_().scatter_add_(-1, labels_P1, -ones_P1)

    return part


class _Summed(torch.autograd.Function):
    """A loss over some rows of logits, part by part: beside the logits only their gradient is kept, in their dtype."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, rows_P: Tensor, part_of: Part, wants_gradient: bool) -> Tensor:
        """The sum."""
        total = logits_RV.new_zeros((), dtype=torch.float32)
        gradient_RV = torch.zeros_like(logits_RV) if wants_gradient else None
        for start in range(0, len(rows_P), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            loss, slope_PV = part_of(logits_RV[rows_P[part]].float(), part)
            total += loss
            if gradient_RV is not None:
                gradient_RV[rows_P[part]] = slope_PV.to(gradient_RV.dtype)
        ctx.gradient_RV = gradient_RV
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Of the logits; it can be asked for once."""
        gradient_RV, ctx.gradient_RV = ctx.gradient_RV, None
        return gradient_RV.mul_(outer[0]), None, None, None


def sum_over(logits_BLV: Tensor, batch: Batch, part_of: Part) -> Tensor:
    """A loss summed over the predicted positions of a batch."""
    wants_gradient = torch.is_grad_enabled() and logits_BLV.requires_grad
    total: Tensor = _Summed.apply(logits_BLV.flatten(0, 1), rows_of(batch), part_of, wants_gradient)  # type: ignore[no-untyped-call]
    return total


def forward(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's outputs on a batch; labels stay here, the loss is ours."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return model(**inputs, use_cache=False, **options)


def in_memory(teacher: PreTrainedModel, *, autocast: bool) -> Look:
    """Ask the teacher, which lies on the batch's device, for every batch."""

    def look(batch: Batch, hidden: bool) -> tuple[TeacherLogits, Sequence[Tensor]]:
        with torch.no_grad(), precision(teacher.device, autocast):
            outputs = forward(teacher, batch, output_hidden_states=hidden)
        return TeacherLogits(outputs.logits.flatten(0, 1), rows_of(batch)), outputs.hidden_states or ()

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
