"""Distillation from the dense model: KL divergence of next-token distributions (arXiv 1503.02531; for pruned LLMs
Minitron, arXiv 2407.14679, section 3), on running text or on instruction records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError
from pruning.recovery import Need, RecoveryInputs, RecoveryReport
from pruning.training.adapters import AdapterConfig, check_rank
from pruning.training.adapters import num_parameters as adapter_parameters
from pruning.training.data import PlainText, RecordData, TextsOrRecords, TrainingData
from pruning.training.options import TextConfig, TrainingRun, WatchingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
#: what it reads beside its own data
NEEDS: frozenset[Need] = frozenset(("teacher",))


class Config(TextConfig, WatchingConfig):
    """Distillation, with the options of every training.

    data: text (c4, fineweb-edu, redpajama, slimpajama), records (alpaca, stanford-alpaca, gpt4-alpaca), or a mapping
    that names a data set. num_examples, max_length: of records; num_tokens, seq_len: of text. teacher: a model with the
    same tokenizer, by default the one that the run began with. teacher_logits: "memory" keeps the teacher beside the
    model; "cache" asks it once and keeps its `top_k` likeliest tokens on disk. temperature; hard_weight: share of the
    ordinary loss; hidden_weight: of the distance between residual streams, layer by layer. adapters: LoRA instead of
    all parameters.
    """

    data: TextsOrRecords = PlainText(dataset="cerebras/SlimPajama-627B")
    num_examples: Count | None = None
    max_length: Count = 512
    teacher: str | None = None
    teacher_logits: Literal["memory", "cache"] = "memory"
    top_k: Count = 64
    temperature: Real = Field(1.0, gt=0, le=100)
    hard_weight: Real = Field(0.0, ge=0, le=1)
    hidden_weight: Real = Field(0.0, ge=0)
    adapters: AdapterConfig | None = None
    warmup_steps: Amount = 100
    weight_decay: Real = Field(0.01, ge=0)
    final_learning_rate: Real = Field(0.1, ge=0, le=1)
    num_heldout: Amount = 16
    batch_size: Count = 64
    micro_batch_size: Count = 1
    keep: Literal["last", "best"] = "best"

    @model_validator(mode="after")
    def _one_teacher(self) -> Config:
        if self.hidden_weight and self.teacher_logits == "cache":
            raise PruningError(
                f"hidden_weight {self.hidden_weight:g} needs the teacher's residual streams, and teacher_logits: cache "
                "keeps its likeliest tokens only: take memory, or leave hidden_weight out"
            )
        return self


def reads(config: Config) -> tuple[TrainingData, ...]:
    """The text, or the records."""
    return (config.data,)


def check_model(config: Config, hidden_size: int, context: int | None) -> None:
    """Raise PruningError for examples longer than the model's context, or adapters larger than what they adapt."""
    length = ("max_length", config.max_length) if isinstance(config.data, RecordData) else ("seq_len", config.seq_len)
    config.check_context(*length, context)
    config.check_watched(context)
    if config.adapters:
        check_rank(config.adapters, hidden_size)


def scratch_bytes(config: Config, num_parameters: int, num_layers: int, hidden_size: int, intermediate: int) -> int:
    """What checkpoints, packed tokens and cached logits take on the disk at most; records are counted as text."""
    trained = num_parameters
    if config.adapters:
        trained = adapter_parameters(config.adapters, num_parameters, num_layers, hidden_size, intermediate)
    cached = 6 * config.top_k * config.num_tokens if config.teacher_logits == "cache" else 0
    return config.checkpoint_bytes(trained) + config.packed_bytes + cached


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    """Train the model towards inputs.teacher, in place; class, shapes and dtype stay.

    The model is left on run.device. Raises PruningError for a teacher with another tokenizer, unusable data, a device
    that cannot be used, too little memory, or a loss that is not finite.
    """
    from pruning.recovery._session import check_documents_apart, distillation, fit_adapters, fit_all
    from pruning.training.example_sets import record_examples, text_examples, with_watched

    if isinstance(config.data, RecordData):
        assert inputs.records is not None, "it reads records"
        examples = record_examples(
            tokenizer, inputs.records, config.data, config, config.num_examples, config.max_length
        )
    else:
        assert inputs.texts is not None, "it reads texts"
        check_documents_apart(model, config)
        examples = text_examples(tokenizer, inputs.texts, inputs.identity, config, run)
    examples = with_watched(examples, tokenizer, inputs.watched, config)
    with distillation(model, tokenizer, inputs, examples, config, run) as objective:
        if config.adapters:
            return fit_adapters(model, tokenizer, objective, examples, config, config.adapters, run)
        return fit_all(model, tokenizer, objective, examples, config, run)
