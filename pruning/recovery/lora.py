"""LoRA on the pruned model's linears, merged afterwards (LoRA: arXiv 2106.09685; as recovery: SlimGPT 2412.18110).

The defaults are SlimGPT's: rank 8, one epoch of cleaned Alpaca, AdamW, cosine after 10 warm-up steps, loss on the
response only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pruning.bounds import Amount, Count, Real, Seed
from pruning.errors import PruningError
from pruning.recovery import RecordData, RecoveryReport

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

VERSION = 1

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


#: two are kept while a third is written
_CHECKPOINTS_AT_ONCE = 3


class Config(BaseModel):
    """LoRA training. batch_size: examples per optimizer step; micro_batch_size: per forward pass, a divisor of it.

    num_examples: a seeded subset of the records, None for all. max_steps: None for `epochs`. dtype: of the forward and
    backward pass (autocast; adapters and optimizer stay float32). max_length: tokens per example. save_steps: between
    resumable checkpoints, None for every tenth of the run and at least every 25 steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: RecordData = RecordData()
    num_examples: Count | None = None
    targets: tuple[Target, ...] = Field(("q", "k", "v", "o", "gate", "up", "down"), min_length=1)
    rank: Count = 8
    alpha: Real = Field(16.0, gt=0)
    dropout: Real = Field(0.05, ge=0, lt=1)
    epochs: Real = Field(1.0, gt=0, le=1e6)
    max_steps: Count | None = None
    learning_rate: Real = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Amount = 10
    weight_decay: Real = Field(0.0, ge=0)
    batch_size: Count = 64
    micro_batch_size: Count = 4
    max_length: Count = 256
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    save_steps: Count | None = None
    seed: Seed = Field(0, ge=0, lt=2**32)  # what numpy takes

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        if self.batch_size % self.micro_batch_size:
            raise PruningError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


def check_model(config: Config, hidden_size: int) -> None:
    """Raise PruningError for adapters that are larger than what they adapt."""
    if config.rank > hidden_size:
        raise PruningError(
            f"rank {config.rank} is more than the {hidden_size} that the model's layers are wide, where nothing is "
            "left to learn; lower it"
        )


def scratch_bytes(config: Config, num_layers: int, hidden_size: int, intermediate_size: int) -> int:
    """What the checkpoints of a training in progress take on the disk at most: adapters and two moments of each."""
    sides = {"q": 2 * hidden_size, "k": 2 * hidden_size, "v": 2 * hidden_size, "o": 2 * hidden_size}
    widths = (sides.get(target, hidden_size + intermediate_size) for target in config.targets)
    adapters = num_layers * config.rank * sum(widths)
    return _CHECKPOINTS_AT_ONCE * 3 * 4 * adapters


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: Config,
    *,
    scratch: Path,
    device: torch.device | str = "cpu",
    progress: Callable[[float, str], None] = lambda share, message: None,
) -> RecoveryReport:
    """Train adapters on the records and merge them into the model, in place; its class and shapes stay.

    records: mappings with the text columns that config.data names. scratch: a folder for checkpoints; a run killed at
    any moment goes on there when called again with the same arguments, and ends with the same weights. device: "cpu" or
    "cuda" (the Trainer uses all visible GPUs). The model is left on that device. progress: called with the share done;
    what it raises ends the training after that step, with a checkpoint, and passes on.

    Raises PruningError for unusable records, a device the Trainer cannot use, or a loss that is not finite; the model
    is then as it was.
    """
    from pruning.recovery import _records, _resumable

    chosen = _records.choose(records, config.num_examples, config.seed)
    examples = _records.encode(tokenizer, chosen, config.data, config.max_length)
    identity = _resumable.identity_of(model, examples, config.model_dump_json())
    arguments = _arguments(config, len(examples), scratch, device)
    # masked, but embedded all the same: many tokenizers have a pad token that the model has no embedding for
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= model.get_input_embeddings().weight.shape[0]:
        pad_id = tokenizer.eos_token_id
    with _resumable.seeded(config.seed), _merged_adapters(model, config) as adapted:
        losses = _resumable.train(
            adapted,
            examples,
            arguments,
            batch_size=config.batch_size,
            pad_id=pad_id,
            identity=identity,
            progress=progress,
        )
    return RecoveryReport(
        losses=losses,
        num_steps=losses[-1][0],
        num_examples=len(examples),
        num_tokens=sum(len(example.ids) for example in examples),
        final_loss=losses[-1][1],
    )


@contextmanager
def _merged_adapters(model: PreTrainedModel, config: Config) -> Iterator[nn.Module]:
    """Adapters on the model: merged into it at the end, or taken off again if the training fails."""
    from peft import LoraConfig, get_peft_model

    with _training_state(model):
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_target_names(model, config),
            bias="none",
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(model, lora)
        # with a name (or None, which is replaced by one) peft asks the hub for that model's config at every checkpoint
        adapted.peft_config["default"].base_model_name_or_path = ""
        try:
            yield adapted
            _check_finite(adapted)
        except BaseException:
            adapted.unload()
            raise
        adapted.merge_and_unload()


@contextmanager
def _training_state(model: PreTrainedModel) -> Iterator[None]:
    """What training switches on a model (frozen weights, mode, KV cache) is put back."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, use_cache = model.training, model.config.use_cache
    try:
        yield
    finally:
        model.train(training)
        model.config.use_cache = use_cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _target_names(model: PreTrainedModel, config: Config) -> list[str]:
    """Dotted names of the linears to adapt; a family may have no gate, a pruned MLP no channels."""
    from pruning.families import family_of

    family = family_of(model)
    names = family.linear_names()
    wanted = {names[target] for target in config.targets if target in names}
    found = [
        f"{family.layers_path}.{name}"
        for name, module in family.layers(model).named_modules()
        if name.rpartition(".")[2] in wanted and next(module.parameters()).numel()
    ]
    if not found:
        raise PruningError(f"the targets {config.targets} have no weights left in this model: name others")
    return found


def _check_finite(adapted: nn.Module) -> None:
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise PruningError(f"after training, {name} is not finite: lower learning_rate or train in float32")


def _arguments(config: Config, num_examples: int, scratch: Path, device: torch.device | str) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    from pruning.recovery._resumable import count_steps

    device = torch.device(device)
    if device.type not in ("cpu", "cuda") or device.index:
        raise PruningError(f"cannot train on {device}: use cpu or cuda, and choose GPUs with CUDA_VISIBLE_DEVICES")
    num_steps = count_steps(num_examples, config.batch_size, config.epochs, config.max_steps)
    return TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.micro_batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        optim="adamw_torch",
        bf16=config.dtype == "bfloat16",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        save_steps=config.save_steps or min(25, max(1, num_steps // 10)),
        save_total_limit=_CHECKPOINTS_AT_ONCE - 1,  # the last may be half-written when the run is killed
        logging_steps=1,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
    )
