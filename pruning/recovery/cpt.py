"""Continued pretraining: all parameters, next-token loss, running text (as recovery: Shortened LLaMA, arXiv 2402.02834,
section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pruning.bounds import Amount, Count, Real
from pruning.recovery import Need, RecoveryInputs, RecoveryReport
from pruning.training.data import PlainText, Texts, TrainingData
from pruning.training.options import TextConfig, TrainingRun, WatchingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
#: what it reads beside its own data
NEEDS: frozenset[Need] = frozenset()


class Config(TextConfig, WatchingConfig):
    """Continued pretraining, with the options of every training.

    data: a preset (c4, fineweb-edu, redpajama, slimpajama), or a mapping that names a data set.
    """

    data: Texts = PlainText(dataset="cerebras/SlimPajama-627B")
    warmup_steps: Amount = 100
    weight_decay: Real = Field(0.01, ge=0)
    final_learning_rate: Real = Field(0.1, ge=0, le=1)
    num_heldout: Amount = 16
    batch_size: Count = 64
    micro_batch_size: Count = 1
    keep: Literal["last", "best"] = "best"


def reads(config: Config) -> tuple[TrainingData, ...]:
    """The text."""
    return (config.data,)


def check_model(config: Config, hidden_size: int, context: int | None) -> None:
    """Raise PruningError for windows longer than the model's context."""
    config.check_context("seq_len", config.seq_len, context)
    config.check_watched(context)


def scratch_bytes(config: Config, num_parameters: int, num_layers: int, hidden_size: int, intermediate: int) -> int:
    """What the checkpoints of a training in progress and the packed tokens take on the disk at most."""
    return config.checkpoint_bytes(num_parameters) + config.packed_bytes


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    """Train all parameters on inputs.texts, in place; class, shapes and dtype stay.

    The model is left on run.device. Raises PruningError for too little text, a device that cannot be used, too little
    memory, or a loss that is not finite.
    """
    from pruning.recovery._session import check_documents_apart, fit_all
    from pruning.training.example_sets import text_examples, with_watched

    assert inputs.texts is not None, "it reads texts"
    check_documents_apart(model, config)
    examples = text_examples(tokenizer, inputs.texts, inputs.identity, config, run)
    return fit_all(model, tokenizer, None, with_watched(examples, tokenizer, inputs.watched, config), config, run)
