"""One training of a model, from what a recovery reads to what it reports."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pruning.errors import PruningError
from pruning.families import family_of
from pruning.recovery import RecoveryInputs, RecoveryReport
from pruning.sharding import in_pieces, put_together_
from pruning.training.adapters import AdapterConfig, check_finite, merged_adapters, training_state
from pruning.training.batches import pad_id_of
from pruning.training.durable import identity_of
from pruning.training.example_sets import Data
from pruning.training.memory import check_memory
from pruning.training.objectives import CrossEntropy, Distillation, Objective, fill_cache, forward, in_memory
from pruning.training.options import TextConfig, TrainingConfig, TrainingRun
from pruning.training.trainer import Outcome, check_device, seeded, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: of the largest logit: what rounding may change, in bfloat16 too
_SAME = 0.05


def fit_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective | None,
    data: Data,
    config: TrainingConfig,
    adapters: AdapterConfig,
    run: TrainingRun,
) -> RecoveryReport:
    """Train adapters and merge them. objective: None for the cross entropy."""
    check_device(run)
    identity = identity_of(model, data.identity, config.model_dump_json())
    with seeded(config.seed), merged_adapters(model, adapters, run.beside if run.leads else None) as adapted:
        check_memory(adapted, model.config, config, data.longest, run, _beside(objective))
        outcome = _fit(adapted, model, tokenizer, objective, data, config, run, identity)
    return _report(outcome, data, adapter=run.beside is not None)


def fit_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective | None,
    data: Data,
    config: TrainingConfig,
    run: TrainingRun,
    *,
    trained: Callable[[str], bool] = lambda name: True,
) -> RecoveryReport:
    """Train all parameters whose names `trained` accepts, in float32; the model gets its dtype back. In pieces over the
    processes where it does not fit otherwise: the model stays where it was meanwhile."""
    check_device(run)
    identity = identity_of(model, data.identity, config.model_dump_json())
    dtype, layers = model.dtype, family_of(model).layers(model)
    with training_state(model), seeded(config.seed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained(name))
        if check_memory(model, model.config, config, data.longest, run, _beside(objective), layers=layers):
            pieces = in_pieces(model, family_of(model).layers, torch.device(run.device), run.num_processes)
            outcome = _fit(pieces, model, tokenizer, objective, data, config, run, f"{identity} in pieces")
            put_together_(model, pieces)
            check_finite(model)
            return _report(outcome, data)
        model.float()
        try:
            outcome = _fit(model, model, tokenizer, objective, data, config, run, identity)
            check_finite(model)
        finally:
            model.to(dtype)
    return _report(outcome, data)


def _fit(
    trained: nn.Module,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective | None,
    data: Data,
    config: TrainingConfig,
    run: TrainingRun,
    identity: str,
) -> Outcome:
    eos, embeddings = tokenizer.eos_token_id, model.get_input_embeddings().weight.shape[0]
    pad_id = pad_id_of(tokenizer.pad_token_id, eos, embeddings)
    numbered = data.numbered
    return train(
        trained,
        objective or CrossEntropy(),
        numbered.train,
        numbered.heldout,
        config,
        run,
        pad_id=pad_id,
        identity=identity,
        watched=data.watched,
    )


def _beside(objective: Objective | None) -> nn.Module | None:
    """A teacher in memory."""
    return objective.teacher if isinstance(objective, Distillation) else None


def _report(outcome: Outcome, data: Data, *, adapter: bool = False) -> RecoveryReport:
    return RecoveryReport(
        curves=outcome.curves,
        num_steps=outcome.num_steps,
        num_examples=len(data.train),
        num_tokens=data.num_tokens,
        kept_step=outcome.kept_step,
        final_loss=outcome.final_loss,
        adapter=adapter,
    )


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel, config: TextConfig) -> None:
    """Raise PruningError if this model would let packed documents see each other, and the config does not want it.

    Asked of the model itself, since it depends on how its family makes its masks.
    """
    if config.cross_document_attention:
        return
    ids_1L = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    batch = {"input_ids": ids_1L, "position_ids": torch.arange(4, device=model.device).repeat(2)[None]}
    together_4V = forward(model, batch).logits[0, 4:]
    alone_4V = forward(model, {"input_ids": ids_1L[:, 4:]}).logits[0]
    if (together_4V - alone_4V).abs().max() > _SAME * alone_4V.abs().max():
        raise PruningError(
            f"a {model.config.model_type} model does not keep packed documents apart: set "
            "cross_document_attention: true"
        )


def check_tokenizers(own: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase) -> None:
    """Raise PruningError, naming a token, for a teacher whose tokens mean something else."""
    mine, theirs = own.get_vocab(), teachers.get_vocab()
    if mine != theirs:
        token = min((token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)), key=str)
        raise PruningError(
            f"the teacher has another tokenizer: {token!r} is token {theirs.get(token)} there and {mine.get(token)} "
            "here; distil from a model of the same family"
        )


def layer_pairs(inputs: RecoveryInputs, num_own: int, num_teacher: int) -> tuple[tuple[int, int], ...]:
    """Which of the model's residual streams should be which of the teacher's, as indices into `hidden_states`: what a
    layer puts out should be what the teacher's next layer that the model still has is given.

    Raises PruningError where layers do not correspond.
    """
    kept = range(num_teacher)
    if inputs.plan is not None and len(inputs.plan.source) == num_teacher:
        kept = [layer.layer for layer in inputs.plan.layers]  # type: ignore[assignment]
    if len(kept) != num_own:
        raise PruningError(
            f"hidden_weight compares layer by layer, and the model has {num_own} layers, the teacher {num_teacher}: "
            "leave it out"
        )
    return tuple((index + 1, after) for index, after in enumerate([*list(kept)[1:], num_teacher]))


@contextmanager
def distillation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    data: Data,
    config: Any,
    run: TrainingRun,
) -> Iterator[Distillation]:
    """The objective that a distillation's Config asks for; the teacher lasts as long as the block."""
    assert inputs.teacher is not None, "it has a teacher"
    if inputs.teacher_tokenizer is not None:
        check_tokenizers(tokenizer, inputs.teacher_tokenizer())
    device, autocast = torch.device(run.device), config.dtype == "bfloat16"
    layers: tuple[tuple[int, int], ...] = ()
    teacher = None
    if getattr(config, "teacher_logits", "memory") == "cache":
        look = _cached(model, tokenizer, inputs, data, config, run)
    else:
        teacher = inputs.teacher().to(device).eval().requires_grad_(False)
        if config.hidden_weight:
            layers = layer_pairs(inputs, model.config.num_hidden_layers, teacher.config.num_hidden_layers)
        look = in_memory(teacher, autocast=autocast)
    yield Distillation(
        look, getattr(config, "hard_weight", 0.0), config.hidden_weight, config.temperature, layers, teacher
    )


def _cached(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    data: Data,
    config: Any,
    run: TrainingRun,
) -> Any:
    assert inputs.teacher is not None, "it has a teacher"
    if config.top_k > model.config.vocab_size:
        raise PruningError(
            f"top_k {config.top_k} is more than the {model.config.vocab_size} tokens there are: lower it"
        )
    pad_id = pad_id_of(tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.vocab_size)
    if run.num_processes > 1 and not run.leads:
        dist.barrier()
    cache = fill_cache(
        inputs.teacher,
        data.joined,
        top_k=config.top_k,
        temperature=config.temperature,
        batch_size=config.micro_batch_size,
        pad_id=pad_id,
        device=torch.device(run.device),
        autocast=config.dtype == "bfloat16",
        folder=run.scratch,
        identity=hashlib.sha256(repr(data.identity).encode()).hexdigest(),
        progress=lambda share, words: run.progress(0.0, words),
    )
    if run.num_processes > 1 and run.leads:
        dist.barrier()
    return cache.look
