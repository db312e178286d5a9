"""What can be rescued from the calibration windows alone: the dense model's outputs on the very tokens that pruning
used, fitted block by block, end to end, or one after the other.

End to end it is distillation (arXiv 1503.02531) that the held-out windows stop. Block by block each layer's output is
fitted to the dense model's at that depth, from the inputs that the pruned layers before it give (as in OmniQuant, arXiv
2308.13137, section 3.1), with a look ahead: the divergence of the vocabulary's distribution after the next layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pruning.bounds import Amount, Count, Real
from pruning.errors import PruningError
from pruning.recovery import Need, RecoveryInputs, RecoveryReport
from pruning.recovery._block_options import BlockOptions
from pruning.training.data import TrainingData
from pruning.training.options import TrainingConfig, TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
#: what it reads beside its own data
NEEDS: frozenset[Need] = frozenset(("teacher", "calibration"))

#: options that fitting block by block reads too
_SHARED = ("mode", "blocks", "num_heldout", "dtype", "seed")
_FLOAT_BYTES = 4


class Config(TrainingConfig):
    """Reconstruction, with the options of every training for its end-to-end part.

    mode: end_to_end, blocks, or both, blocks first. num_heldout: windows to judge by, of those that the calibration
    holds out. temperature, hidden_weight: as of distillation. parameters: which are trained end to end; blocks are
    trained whole.

    blocks: {passes: 15, learning_rate: 1e-4, batch_size: 4, micro_batch_size: 1, lookahead_weight: 0.05,
    probe_positions: 64, patience: 3}, of each block: passes over the windows, at most; windows per step of AdamW, and
    per forward pass; weight of the divergence from the dense model's next-token distribution after the next block, and
    at how many tokens of each window it is measured; passes without a better held-out loss that end it (null: none).
    """

    mode: Literal["end_to_end", "blocks", "both"] = "end_to_end"
    blocks: BlockOptions = BlockOptions()
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

    @model_validator(mode="after")
    def _of_this_mode(self) -> Config:
        if self.mode == "end_to_end" and self.blocks != BlockOptions():
            raise PruningError("blocks is for mode: blocks or both, and mode is end_to_end: set mode, or leave it out")
        others = (name for name in type(self).model_fields if self.mode == "blocks" and name not in _SHARED)
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PruningError(
                    f"{name} is of the end-to-end part, and mode is blocks: leave it out, set mode: both, or give it "
                    "below blocks if it is an option there"
                )
        return self


def reads(config: Config) -> tuple[TrainingData, ...]:
    """Nothing but the calibration windows."""
    return ()


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
    """What fitted blocks and the checkpoints of a training in progress take on the disk at most."""
    blocks = 0 if config.mode == "end_to_end" else _FLOAT_BYTES * num_parameters
    return blocks + (0 if config.mode == "blocks" else config.checkpoint_bytes(num_parameters))


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    """Train the model towards inputs.teacher on inputs.calibration, in place; class, shapes and dtype stay.

    The report of mode both is the end-to-end part's, with the curves of the blocks. The model is left on run.device.
    Raises PruningError for too few held-out windows, layers that do not correspond to the dense model's, a device that
    cannot be used, too little memory, or a loss that is not finite.
    """
    assert inputs.calibration is not None, "it has the calibration windows"
    check_calibration(config, len(inputs.calibration.heldout_ids_ML))
    if config.mode == "end_to_end":
        return _end_to_end(model, tokenizer, inputs, config, run)
    if config.mode == "blocks":
        return _block_by_block(model, tokenizer, inputs, config, run)

    def first(share: float, words: str) -> None:
        run.progress(share / 2, words)

    def then(share: float, words: str) -> None:
        run.progress((1 + share) / 2, words)

    blocks = _block_by_block(model, tokenizer, inputs, config, replace(run, progress=first))
    report = _end_to_end(model, tokenizer, inputs, config, replace(run, progress=then))
    return report.model_copy(update={"curves": {**blocks.curves, **report.curves}})


def _block_by_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    from pruning.recovery._blocks import block_curves, fit_blocks_
    from pruning.recovery._session import check_tokenizers

    assert inputs.calibration is not None, "it has the calibration windows"
    if inputs.teacher_tokenizer is not None:
        check_tokenizers(tokenizer, inputs.teacher_tokenizer())
    fitted = fit_blocks_(model, inputs, config.blocks, config, run)
    model.to(run.device)
    return RecoveryReport(
        curves=block_curves(fitted),
        num_steps=sum(block.num_steps for block in fitted),
        num_examples=len(inputs.calibration.input_ids_NL),
        num_tokens=inputs.calibration.input_ids_NL.numel(),
        kept_step=sum(block.num_steps for block in fitted),
        final_loss=sum(block.after for block in fitted) / len(fitted),
    )


def _end_to_end(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: RecoveryInputs,
    config: Config,
    run: TrainingRun,
) -> RecoveryReport:
    from pruning.families import family_of
    from pruning.recovery._session import distillation, fit_all
    from pruning.training.example_sets import window_examples

    assert inputs.calibration is not None, "it has the calibration windows"
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
