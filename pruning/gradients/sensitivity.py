"""How much the loss minds an error of each sub-layer's output, and what its output linear is given: one walk backwards.

The gradient of the loss at the residual stream just after a sub-layer's output has joined it is the gradient at what
the sub-layer adds. With e the error of that and g the gradient of the summed loss, the loss per token rises to second
order by half the mean of (g · e)² (Fisher information; LLM Surgeon, arXiv 2312.17244, section 3). Only the mean squares
of g are kept, one per output, so that an Optimal Brain Surgeon whose rows are scaled by their roots counts in nats.

Shapes: N samples, B samples of one batch, L tokens per sample, C residual stream, I inputs of an output linear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.errors import PruningError
from pruning.families.forward import KINDS, SubLayerKind, join, output_inputs, output_linear, token_weights
from pruning.gradients.backward import Backward, walk_back
from pruning.statistics.hessian import Hessian, HessianAccumulator
from pruning.walk.loss import sampled_losses, token_losses

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.walk.options import WalkOptions

Labels = Literal["text", "sampled"]
"""Of the loss: the tokens of the text (empirical Fisher), or tokens that the model draws (true Fisher)."""


@dataclass(frozen=True)
class SubLayerSensitivity:
    """hessian: of the inputs of the output linear. gradient_C: mean over the predicted tokens of the squared gradient
    of the summed loss at the sub-layer's output, float32; both over all processes."""

    hessian: Hessian
    gradient_C: Tensor


@dataclass(frozen=True)
class LayerSensitivity:
    """layer: index. module: the layer as it is. sub_layers: those that are there."""

    layer: int
    module: nn.Module
    sub_layers: dict[SubLayerKind, SubLayerSensitivity]


def walk_sensitivities(
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    *,
    labels: Labels = "text",
    name_of: Callable[[int, SubLayerKind], str],
    present: Callable[[int], Collection[SubLayerKind]] = lambda layer: KINDS,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[LayerSensitivity]:
    """Yield how sensitive the loss is to each layer's sub-layers, last layer first, one layer on the device at a time.

    name_of: what an output linear is called in errors. present, progress: as of `walk_backwards`.

    Raises PruningError if one layer with its activations does not fit the device, or a value is not finite.
    """
    walk_of = partial(_Sensitivities, name_of)
    losses = token_losses if labels == "text" else sampled_losses
    return walk_back(walk_of, decoder, input_ids_NL, options, losses, present, progress)


class _Sensitivities(Backward[LayerSensitivity]):
    """Sums over what passes, and no gradients of weights."""

    def __init__(self, name_of: Callable[[int, SubLayerKind], str], *of_walk: Any) -> None:
        super().__init__(*of_walk)
        self._name_of = name_of

    def through(
        self,
        index: int,
        kinds: Collection[SubLayerKind],
        inputs: Activations,
        gradient: Activations,
        num_tokens: float,
    ) -> tuple[LayerSensitivity, Activations]:
        """Of one layer, and the gradient at its inputs; what was at its outputs is freed.

        gradient: of the mean loss, hence the factor num_tokens squared to that of the sum, once for the mean.
        """
        family, device, group = self._decoder.family, self._options.device, self._options.process_group
        layer, there = self._layer(index), [kind for kind in KINDS if kind in kinds]
        linears = {kind: output_linear(family, layer, kind) for kind in there}
        sums = {kind: HessianAccumulator(linear.in_features, device) for kind, linear in linears.items()}
        squares = {kind: torch.zeros(linear.out_features, device=device) for kind, linear in linears.items()}
        before = self._allocate()
        for start, stop in self._batches:
            stream_BLC = inputs.get(start, stop).to(device, self._dtype, copy=True).requires_grad_()
            after: list[Tensor] = [stream_BLC]
            with torch.enable_grad():
                for kind in there:
                    read_BLC = stream_BLC if family.parallel_residual else after[-1]
                    inputs_BLI = output_inputs(family, layer, kind, read_BLC, self._kwargs[index])
                    weights_BL = token_weights(family, layer, kind, inputs_BLI)
                    sums[kind].add(inputs_BLI.detach(), weights_BL)
                    after.append(join(family, layer, kind, after[-1], linears[kind](inputs_BLI)))
            upstream_BLC = gradient.get(start, stop).to(device, self._dtype)
            found = [*torch.autograd.grad(after[-1], after[:-1], upstream_BLC), upstream_BLC]
            before.put(start, found[0])
            for kind, at_output_BLC in zip(there, found[1:], strict=True):
                squares[kind] += at_output_BLC.float().square().sum((0, 1))
        self._store.free(inputs)
        self._store.free(gradient)
        sub_layers = {}
        for kind, square_C in squares.items():
            name = self._name_of(index, kind)
            group.sum_(square_C)
            square_C *= num_tokens
            if not bool(torch.isfinite(square_C).all()):
                raise PruningError(
                    f"the gradient at the output of {name} is not finite: the model's outputs contain NaN or infinity; "
                    "load it in another dtype (float32 or bfloat16) or check its weights"
                )
            sub_layers[kind] = SubLayerSensitivity(sums[kind].finish(name, group), square_C)
        return LayerSensitivity(index, layer, sub_layers), before
