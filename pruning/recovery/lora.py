"""LoRA on the pruned model's linears, merged afterwards (LoRA: arXiv 2106.09685; as recovery: SlimGPT 2412.18110).

The defaults are SlimGPT's: rank 8, one epoch of cleaned Alpaca, AdamW, cosine after 10 warm-up steps, loss on the
response only. `preset: shortened-llama` is that paper's (arXiv 2402.02834, section 4): two epochs, 100 warm-up steps.
Of a mixture of experts `targets: [q, k, v, o, experts]` with `dropout: 0` adapts the experts as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from pruning.bounds import Count
from pruning.recovery import Need, RecoveryInputs, RecoveryReport
from pruning.training.adapters import AdapterConfig, check_rank, num_parameters
from pruning.training.data import RecordData, Records, TrainingData
from pruning.training.options import TrainingRun, WatchingConfig, with_preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 2  # 2: micro batches are summed in another order
#: what it reads beside its own data
NEEDS: frozenset[Need] = frozenset()

PRESETS: dict[str, dict[str, Any]] = {"slimgpt": {}, "shortened-llama": {"epochs": 2.0, "warmup_steps": 100}}


class Config(WatchingConfig, AdapterConfig):
    """LoRA training, with the options of every training.

    preset: a paper's settings (slimgpt, shortened-llama), of which others that are given replace single ones.
    num_examples: a seeded subset of the records, None for all. max_length: tokens per example.
    """

    data: Records = RecordData()
    num_examples: Count | None = None
    max_length: Count = 256

    _preset = model_validator(mode="before")(with_preset(PRESETS))


def reads(config: Config) -> tuple[TrainingData, ...]:
    """The records."""
    return (config.data,)


def check_model(config: Config, hidden_size: int, context: int | None) -> None:
    """Raise PruningError for adapters larger than what they adapt, or records longer than the model's context."""
    check_rank(config, hidden_size)
    config.check_context("max_length", config.max_length, context)
    config.check_watched(context)


def scratch_bytes(config: Config, num_all: int, num_layers: int, hidden_size: int, intermediate: int) -> int:
    """What the checkpoints of a training in progress take on the disk at most."""
    return config.checkpoint_bytes(num_parameters(config, num_all, num_layers, hidden_size, intermediate))


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    """Train adapters on inputs.records and merge them into the model, in place; its class and shapes stay.

    The model is left on run.device. Raises PruningError for unusable records, a device that cannot be used, too little
    memory, or a loss that is not finite; the model is then as it was.
    """
    from pruning.recovery._session import fit_adapters
    from pruning.training.example_sets import record_examples, with_watched

    assert inputs.records is not None, "it reads records"
    examples = record_examples(tokenizer, inputs.records, config.data, config, config.num_examples, config.max_length)
    examples = with_watched(examples, tokenizer, inputs.watched, config)
    return fit_adapters(model, tokenizer, None, examples, config, config, run)
