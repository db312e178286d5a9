"""What the methods share that train while they prune: all that the project asks of such a method.

It is a Config, made of TrainedOptions, and one function that makes what decides about groups (`Pruner`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.gradual.options import TrainedOptions
from pruning.training.adapters import check_rank, num_parameters
from pruning.training.data import PlainText, RecordData, TrainingData
from pruning.training.options import TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pruning.families import LayerCost, ModelFamily
    from pruning.gradual.session import Make, TrainedPruning
    from pruning.plan import LayerShape
    from pruning.recovery import RecoveryInputs


@dataclass(frozen=True)
class Trained:
    """The functions that a method module offers, for one that prunes while it trains. make: from its Config, what makes
    what decides, which is imported only then."""

    make: Callable[[Any], Make]

    def needs_statistics(self, config: TrainedOptions) -> bool:
        """No."""
        return False

    def order_config(self, config: TrainedOptions) -> None:
        """There is no ranking that would serve several sparsities."""
        return

    def reads(self, config: TrainedOptions) -> tuple[TrainingData, ...]:
        """The text, or the records."""
        return (config.data,)

    def check_model(
        self, config: TrainedOptions, layers: Sequence[LayerShape], cost: LayerCost, family: ModelFamily
    ) -> None:
        """Raise PruningError if a model of these layers cannot be pruned so."""
        config.check_layers(layers, cost, family)

    def check_training(self, config: TrainedOptions, hidden_size: int, context: int | None) -> None:
        """Raise PruningError for adapters larger than what they adapt, or examples longer than the model's context."""
        check_rank(config, hidden_size)
        if isinstance(config.data, RecordData):
            config.check_context("max_length", config.max_length, context)
        else:
            config.check_context("seq_len", config.seq_len, context)

    def scratch_bytes(
        self, config: TrainedOptions, num_all: int, num_layers: int, hidden_size: int, intermediate: int
    ) -> int:
        """What checkpoints of a training in progress and packed tokens take on the disk at most."""
        trained = num_parameters(config, num_all, num_layers, hidden_size, intermediate)
        # moving averages, or gates with their moments: at most three numbers of eight bytes per head and channel
        along = num_layers * (hidden_size + intermediate)
        packed = config.packed_bytes if isinstance(config.data, PlainText) else 0
        return config.checkpoint_bytes(trained) + 3 * 24 * along + packed

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: RecoveryInputs,
        config: Any,
        run: TrainingRun,
    ) -> TrainedPruning:
        """Train and prune the model in place: adapters merged, columns of what goes zeroed, shapes as they were.

        The model is left on run.device, as it was if it fails. Raises PruningError for a sparsity that cannot be
        reached, unusable data, a device that cannot be used, too little memory, or a loss that is not finite.
        """
        from pruning.gradual.session import prune_while_training

        return prune_while_training(model, tokenizer, inputs, config, run, self.make(config))
