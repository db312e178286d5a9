"""What a training takes in memory, estimated before it starts, and which options would make it fit.

Counted per process: weights, gradients, the optimizer's moments (or its pieces of them), what the backward pass keeps
of a micro batch, logits, and a teacher. An estimate from the shapes; what the device's libraries take themselves is
left out. Peaks measured on a CPU (SmolLM2-135M less 20 %, GiB estimated / measured): all weights, float32, 2,048 tokens
at a time 5.1 / 5.3; LoRA, 1,200 tokens, float32 4.3 / 4.2, bfloat16 3.7 / 3.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from pruning.errors import PruningError
from pruning.modeling import config_shapes

if TYPE_CHECKING:
    from pruning.training.options import Optimizer, TrainingConfig, TrainingRun

_GIB = 2**30
#: bytes of an optimizer's state per trained parameter
_MOMENTS: Mapping[Optimizer, float] = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0.1}
#: copies of the logits that a loss and its gradient hold, in float32, and those of a divergence beside a teacher's
_LOGIT_COPIES, _DIVERGENCE_COPIES = 3, 6
_LORA_SHARE = 0.01
_FLOAT_BYTES = 4
#: layers that are whole at once where weights lie in pieces: one computes, the next comes, the last one's gradients go
_WHOLE_LAYERS = 3
#: bytes that an adapter keeps of each of its inputs: cast to float32, dropped out, and what was dropped
_ADAPTER_BYTES = 3 * 4


@dataclass(frozen=True)
class Training:
    """What the size of a training follows from; widths are sums over layers.

    weights: bytes. trained: parameters with gradients. tokens: of one micro batch. width, attention, channels: hidden
    size, q + k + v + output, and MLP channels. adapted: inputs of linears that have adapters. teacher: bytes of a dense
    model beside it. item: bytes of an activation. processes: over which weights, gradients and moments lie in pieces.
    together: parameters that are whole at once all the same: what is outside of the layers, and three layers.
    """

    weights: int
    trained: int
    tokens: int
    num_layers: int
    width: int
    attention: int
    channels: int
    vocabulary: int
    item: int
    optimizer: Optimizer
    checkpointing: bool
    adapted: int = 0
    teacher: int = 0
    processes: int = 1
    together: int = 0

    @property
    def bytes(self) -> int:
        """Of all together."""
        states = self.trained * (_FLOAT_BYTES + _MOMENTS[self.optimizer])
        kept = (self.weights + states) / self.processes
        if self.processes > 1:  # with their gradients
            kept += 2 * _FLOAT_BYTES * self.together
        # inputs of norms in float32, of the linears, and of gate * up
        per_token = self.num_layers * self.width * (2 * 4 + 2 * self.item)
        per_token += (2 * self.attention + 4 * self.channels) * self.item + self.adapted * _ADAPTER_BYTES
        if self.checkpointing:
            per_token = self.num_layers * self.width * self.item + per_token // max(1, self.num_layers)
        copies = _DIVERGENCE_COPIES if self.teacher else _LOGIT_COPIES
        logits = self.tokens * self.vocabulary * 4 * copies
        return int(kept + self.tokens * per_token + logits + self.teacher)


def check_memory(
    trained: nn.Module,
    model_config: Any,
    config: TrainingConfig,
    longest: int,
    run: TrainingRun,
    teacher: nn.Module | None = None,
    *,
    layers: nn.Module | None = None,
) -> bool:
    """Whether the weights must lie in pieces over the processes, or shall (run.sharded).

    trained: the model as it is trained. longest: tokens of the longest example. teacher: if it lies beside it. layers:
    those of the model, if all its weights are trained, in float32 whatever they are now; None: they stay whole. Raises
    PruningError, naming options that would, if the training does not fit into what is free now, and for an optimizer
    that knows no pieces.
    """
    device = torch.device(run.device)
    training = _training(trained, model_config, config, longest, teacher)
    if layers is not None:
        training = replace(training, weights=_FLOAT_BYTES * _count(trained))
    # what lies on the device already is not free, and not needed again
    own, beside = _bytes_on(device, trained), _bytes_on(device, teacher) if teacher is not None else 0
    there, free = own + beside, _free(device)
    may = layers is not None and config.may_be_sharded(run.num_processes, run.sharded)
    if layers is not None and may and (run.sharded or not _all_agree(training.bytes - there <= free, device)):
        # the model stays where it is, and the pieces are a copy
        training, there = _in_pieces(training, trained, layers, run.num_processes), beside
    needed = training.bytes - there
    if needed <= free:
        return training.processes > 1
    ways = [words for words, smaller in _smaller(training, config, longest) if smaller.bytes - there <= free]
    way_out = f"this would: {'; or '.join(ways)}" if ways else "take a larger device, or a smaller model"
    raise PruningError(
        f"training takes about {needed / _GIB:.1f} GiB on {device} and {free / _GIB:.1f} GiB are free "
        f"({training.trained / 1e6:.0f} M trained parameters, {training.tokens} tokens at a time): {way_out}"
    )


def _all_agree(fits: bool, device: torch.device) -> bool:
    """Whether it is so in all processes of the group."""
    answer = torch.tensor(int(fits), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


def _in_pieces(training: Training, trained: nn.Module, layers: nn.Module, num_processes: int) -> Training:
    outside = _count(trained) - _count(layers)
    largest = max(map(_count, layers.children()), default=0)
    return replace(training, processes=num_processes, together=outside + _WHOLE_LAYERS * largest)


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _training(
    trained: nn.Module, model_config: Any, config: TrainingConfig, longest: int, teacher: nn.Module | None
) -> Training:
    shapes, head_dim = config_shapes(model_config), getattr(model_config, "head_dim", None)
    head_dim = head_dim or model_config.hidden_size // model_config.num_attention_heads
    parameters, per_token = list(trained.parameters()), getattr(model_config, "num_experts_per_tok", 1)
    return Training(
        weights=sum(each.numel() * each.element_size() for each in parameters),
        trained=sum(each.numel() for each in parameters if each.requires_grad),
        tokens=config.micro_batch_size * longest,
        num_layers=len(shapes),
        width=model_config.hidden_size,
        attention=sum((2 * shape.num_heads + 2 * shape.num_kv_heads) * head_dim for shape in shapes),
        # of experts those that a token goes to
        channels=sum(shape.intermediate_size * max(1, min(shape.num_experts, per_token)) for shape in shapes),
        vocabulary=model_config.vocab_size,
        item=2 if config.dtype == "bfloat16" else 4,
        optimizer=config.optimizer,
        checkpointing=config.gradient_checkpointing,
        adapted=_adapted(trained),
        teacher=sum(each.numel() * each.element_size() for each in teacher.parameters()) if teacher else 0,
    )


def _adapted(trained: nn.Module) -> int:
    """Inputs of all linears that have adapters."""
    with_adapters: list[Any] = [module for module in trained.modules() if hasattr(module, "lora_A")]
    return sum(int(module.in_features) for module in with_adapters)


def _smaller(training: Training, config: TrainingConfig, longest: int) -> list[tuple[str, Training]]:
    """Options that take less, one by one and then together, in words."""
    ways: list[tuple[str, dict[str, object]]] = []
    if config.micro_batch_size > 1:
        ways.append(("micro_batch_size: 1", {"tokens": longest}))
    if not config.gradient_checkpointing:
        ways.append(("gradient_checkpointing: true", {"checkpointing": True}))
    if config.optimizer == "adamw":
        ways.append(("optimizer: adamw_8bit (on a GPU, needs bitsandbytes)", {"optimizer": "adamw_8bit"}))
        ways.append(("optimizer: adafactor", {"optimizer": "adafactor"}))
    single = [(words, replace(training, **changes)) for words, changes in ways]  # type: ignore[arg-type]
    light = [(words, changes) for words, changes in ways if "optimizer" not in changes or "adafactor" in words]
    if len(light) > 1:
        together = {name: value for _, changes in light for name, value in changes.items()}
        single.append((" and ".join(words for words, _ in light), replace(training, **together)))  # type: ignore[arg-type]
    adapters = replace(
        training,
        trained=int(training.trained * _LORA_SHARE),
        tokens=longest,
        checkpointing=True,
        optimizer="adamw",
        # q, k, v, gate and up read the stream, o and down the heads and the channels
        adapted=5 * training.num_layers * training.width + training.attention // 2 + training.channels,
    )
    if training.trained * 2 > training.weights / 4:
        single.append(("adapters (LoRA) with micro_batch_size: 1 and gradient_checkpointing: true", adapters))
    return single


def _bytes_on(device: torch.device, model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters() if each.device.type == device.type)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
