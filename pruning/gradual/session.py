"""One training that prunes: from what it reads to a masked model with its plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import ConfigDict

from pruning.errors import PruningError
from pruning.gradual.masks import Factors, fold_, masking
from pruning.gradual.prompt import with_prompt
from pruning.gradual.prunable import Choice, Prunable
from pruning.recovery._session import check_documents_apart
from pruning.training.adapters import merged_adapters
from pruning.training.batches import pad_id_of
from pruning.training.data import RecordData
from pruning.training.durable import identity_of
from pruning.training.example_sets import Data, record_examples, text_examples
from pruning.training.memory import check_memory
from pruning.training.objectives import Objective
from pruning.training.options import Curves, TrainingRun
from pruning.training.trainer import check_device, count_steps, seeded, train
from pruning.training.watching import Along
from pruning.walk.state import Pruned

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pruning.gradual.options import TrainedOptions
    from pruning.recovery import RecoveryInputs


class TrainedPruning(Pruned):
    """What a method that trains while it prunes returns; the weights are in the model that it was given.

    curves: as in a RecoveryReport, and of what was pruned meanwhile: sparsity (masked after that step),
    expected_sparsity and multiplier (of gates). num_tokens: of one pass over the examples. expected_sparsity: of the
    gates in the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    curves: Curves
    num_steps: int
    num_examples: int
    num_tokens: int
    final_loss: float
    expected_sparsity: float | None = None


class Pruner(Along, Protocol):
    """What decides about groups while the model trains."""

    @property
    def objective(self) -> Objective:
        """What the training minimises."""
        ...

    def factors(self) -> Factors:
        """What each group of each site is multiplied with now."""
        ...

    def outcome(self) -> tuple[Choice, Factors]:
        """What goes in the end, and what each group is multiplied with for good."""
        ...


Make = Callable[[Prunable, "PreTrainedModel", int, torch.device], Pruner]
"""From what may go, the model with its adapters, the number of steps, and the device."""


def prune_while_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: TrainedOptions,
    run: TrainingRun,
    make: Make,
) -> TrainedPruning:
    """Train adapters while groups are masked, merge them, and zero the columns of what goes, in place: `shrink_` by the
    plan then changes nothing that the model computes.

    The model is left on run.device, as it was if the training fails. Raises PruningError for a sparsity that cannot be
    reached, unusable data, a device that cannot be used, too little memory, or a loss that is not finite.
    """
    if run.num_processes > 1:
        raise PruningError(f"pruning while training runs in one process, not in {run.num_processes}")
    device = check_device(run)
    prunable = Prunable.of(model, config.allocation_(), config.measure, joint=config.joint)
    config.check_layers(prunable.widths, prunable.cost, prunable.family)
    data = _examples(model, tokenizer, inputs, config, run)
    identity = identity_of(model, data.identity, config.model_dump_json())
    with seeded(config.seed), merged_adapters(model, config) as adapted:
        pruner = make(prunable, model, count_steps(len(data.train), config), device)
        check_memory(adapted, model.config, config, data.longest, run)
        pad_id = pad_id_of(tokenizer.pad_token_id, tokenizer.eos_token_id, model.get_input_embeddings().weight.shape[0])
        with masking(model, prunable.sites, pruner.factors):
            outcome = train(
                adapted,
                pruner.objective,
                data.train,
                data.heldout,
                config,
                run,
                pad_id=pad_id,
                identity=identity,
                along=pruner,
            )
    choice, factors = pruner.outcome()
    fold_(model, prunable.sites, factors)
    return TrainedPruning(
        plan=choice.plan,
        layers=choice.reports,
        achieved_sparsity=choice.sparsity,
        curves=outcome.curves,
        num_steps=outcome.num_steps,
        num_examples=len(data.train),
        num_tokens=data.num_tokens,
        final_loss=outcome.final_loss,
        expected_sparsity=pruner.figures().get("expected_sparsity"),
    )


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: TrainedOptions,
    run: TrainingRun,
) -> Data:
    if not isinstance(config.data, RecordData):
        assert inputs.texts is not None, "it reads texts"
        check_documents_apart(model, config)
        return text_examples(tokenizer, inputs.texts, inputs.identity, config, run)
    assert inputs.records is not None, "it reads records"
    data = record_examples(tokenizer, inputs.records, config.data, config, config.num_examples, config.max_length)
    if not config.prompted:
        return data
    prompted, context = with_prompt(data, tokenizer), getattr(model.config, "max_position_embeddings", None)
    if context is not None and prompted.longest > context:
        raise PruningError(
            f"with the prompt in front of it an example has {prompted.longest} tokens, and the model's context is "
            f"{context}: lower max_length (now {config.max_length}), or leave prompt out"
        )
    return prompted
