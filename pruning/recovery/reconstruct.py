"""What can be rescued from the calibration windows alone: the dense model's outputs on the very tokens that pruning
used, fitted block by block, end to end, or one after the other.

End to end it is distillation (arXiv 1503.02531) that the held-out windows stop. Block by block each layer's output is
fitted to the dense model's at that depth, from the inputs that the pruned layers before it give (as in OmniQuant, arXiv
2308.13137, section 3.1), with a look ahead: the divergence of the vocabulary's distribution after the next layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError
from pruning.recovery import RecoveryInputs, RecoveryReport
from pruning.training.data import TrainingData
from pruning.training.options import TrainingConfig, TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1


class Config(TrainingConfig):
    """Reconstruction, with the options of every training for its end-to-end part.

    num_heldout: windows to judge by, of those that the calibration holds out. temperature, hidden_weight: as of
    distillation. parameters: which are trained.
    """

    epochs: Real = Field(4.0, gt=0, le=1e6)
    learning_rate: Real = Field(2e-4, gt=0)
    warmup_steps: Amount = 4
    weight_decay: Real = Field(0.0, ge=0)
    batch_size: Count = 4
    micro_batch_size: Count = 1
    final_learning_rate: Real = Field(0.1, ge=0, le=1)
    num_heldout: Count = 4
    keep: Literal["last", "best"] = "best"
    patience: Count | None = 3
    temperature: Real = Field(1.0, gt=0, le=100)
    hidden_weight: Real = Field(0.0, ge=0)
    parameters: Literal["layers", "all"] = "layers"


def reads(config: Config) -> tuple[TrainingData, ...]:
    """Nothing but the calibration windows."""
    return ()


def needs_teacher(config: Config) -> bool:
    """Always."""
    return True


def needs_calibration(config: Config) -> bool:
    """Always."""
    return True


def check_model(config: Config, hidden_size: int, context: int | None) -> None:
    """The windows fitted into the context when the model was pruned with them."""


def check_calibration(config: Config, num_heldout: int) -> None:
    """Raise PruningError if the calibration holds out fewer windows than are to be judged by."""
    if num_heldout < config.num_heldout:
        raise PruningError(
            f"reconstruct: num_heldout is {config.num_heldout}, and the calibration holds out {num_heldout} windows: "
            "raise calibration.num_heldout, or lower it"
        )


def scratch_bytes(config: Config, num_parameters: int, num_layers: int, hidden_size: int, intermediate: int) -> int:
    """What the checkpoints of a training in progress take on the disk at most."""
    return config.checkpoint_bytes(num_parameters)


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    """Train the model towards inputs.teacher on inputs.calibration, in place; class, shapes and dtype stay.

    The model is left on run.device. Raises PruningError for too few held-out windows, a device that cannot be used, too
    little memory, or a loss that is not finite.
    """
    from pruning.families import family_of
    from pruning.recovery._session import distillation, fit_all
    from pruning.training.example_sets import window_examples

    assert inputs.calibration is not None, "it has the calibration windows"
    check_calibration(config, len(inputs.calibration.heldout_ids_ML))
    examples = window_examples(inputs.calibration, config)
    layers = f"{family_of(model).layers_path}."
    with distillation(model, tokenizer, inputs, examples, config, run) as objective:
        return fit_all(
            model,
            tokenizer,
            objective,
            examples,
            config,
            run,
            trained=lambda name: config.parameters == "all" or name.startswith(layers),
        )
