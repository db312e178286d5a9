"""Gradients of the loss with one layer on the device at a time: forwards keeping each layer's inputs, then backwards.

Neither the whole model nor its activations need be there; the gradients are those of `loss.backward()` on the whole
model, with the loss averaged over all predicted tokens of all processes.

Shapes: N samples, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.activations.tiers import ActivationStore
from pruning.errors import PruningError
from pruning.families.forward import KINDS, SubLayerKind, layer_output
from pruning.walk.embedding import enter, spans
from pruning.walk.loss import token_losses
from pruning.walk.options import free_on_device

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.walk.options import WalkOptions

#: sums of the loss of a batch over some tokens each, see walk.loss
Losses = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Iterator[Tensor]]

#: bytes of layer, float32 gradients and the activations that autograd keeps, per parameter and per token x hidden size
_GRADIENT_BYTES = 4
_KEPT_PER_TOKEN = 24

#: what such a walk costs, in forwards: one keeps the streams, one is repeated backwards, and the gradients
FORWARDS = 3

Found = TypeVar("Found")


@dataclass(frozen=True)
class LayerGradients:
    """layer: index. module: the layer as it is. gradients: of the mean loss (nats per token), float32, by the names of
    the layer's parameters; summed over all processes."""

    layer: int
    module: nn.Module
    gradients: dict[str, Tensor]


def walk_backwards(
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    *,
    present: Callable[[int], Collection[SubLayerKind]] = lambda layer: KINDS,
    progress: Callable[[float], None] = lambda share: None,
) -> Iterator[LayerGradients]:
    """Yield the gradients of each layer's parameters, last layer first.

    present: the sub-layers that are there; a layer without any is left out of the walk. A layer in float16, where
    gradients would underflow, is computed in float32. progress: called with the share that is done.

    Raises PruningError if one layer with its gradients does not fit the device, or a gradient is not finite.
    """
    return walk_back(_Gradients, decoder, input_ids_NL, options, token_losses, present, progress)


def walk_back(
    walk_of: Callable[[Decoder, WalkOptions, ActivationStore, Tensor], Backward[Found]],
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    losses: Losses,
    present: Callable[[int], Collection[SubLayerKind]],
    progress: Callable[[float], None],
) -> Iterator[Found]:
    """Yield what a walk finds in each layer, last layer first: forwards once, then back from the loss."""
    ids_NL = options.process_group.share(input_ids_NL)
    layers = [index for index in range(decoder.num_layers) if present(index)]
    num_tokens, needed = _predicted_tokens(decoder, ids_NL, options)
    with options.activation_store(needed) as store:
        walk = walk_of(decoder, options, store, ids_NL)
        inputs = walk.forwards(layers, present, lambda done: progress(done / (FORWARDS * len(layers))))
        gradient = walk.of_loss(inputs.pop(), num_tokens, losses)
        for done, index in enumerate(reversed(layers)):
            found, gradient = walk.through(index, present(index), inputs.pop(), gradient, num_tokens)
            yield found
            del found  # before what is found in the next layer is there
            progress((len(layers) + 2 * (done + 1)) / (FORWARDS * len(layers)))


def _predicted_tokens(decoder: Decoder, ids_NL: Tensor, options: WalkOptions) -> tuple[float, int]:
    """Tokens that the samples of all processes predict, and bytes of the device that are needed beside activations of
    other batches. Raises PruningError if there are no tokens, or a layer with its gradients does not fit the device."""
    (num_tokens,) = options.process_group.sum_of(len(ids_NL) * (ids_NL.shape[1] - 1))
    if num_tokens < 1:
        raise PruningError("gradients need samples of two tokens at least; raise num_samples or seq_len")
    return num_tokens, _checked_needs(decoder, options, ids_NL.shape[1])


class Backward(ABC, Generic[Found]):
    """The way to the loss, and the gradient that comes back from it; what is found on the way is the subclass's."""

    def __init__(self, decoder: Decoder, options: WalkOptions, store: ActivationStore, ids_NL: Tensor) -> None:
        self._decoder, self._options, self._store, self._ids_NL = decoder, options, store, ids_NL
        self._batches = spans(0, len(ids_NL), options.batch_size)
        self._dtype = _computing(decoder.family.embeddings(decoder.skeleton).weight.dtype)
        self._kwargs: list[dict[str, Any]] = []

    @torch.no_grad()
    def forwards(
        self,
        layers: Sequence[int],
        present: Callable[[int], Collection[SubLayerKind]],
        progress: Callable[[int], None],
    ) -> list[Activations]:
        """The stream before each of the layers, and after the last one."""
        streams = [self._allocate()]
        model, family, device = self._decoder.skeleton, self._decoder.family, self._options.device
        self._kwargs = enter(model, family, self._ids_NL, self._batches, streams[0], device)
        for done, index in enumerate(layers):
            layer, after = self._layer(index), self._allocate()
            for start, stop in self._batches:
                before_BLC = streams[-1].get(start, stop).to(device, self._dtype)
                after.put(start, layer_output(family, layer, before_BLC, self._kwargs[index], present(index)))
            streams.append(after)
            del layer
            progress(done + 1)
        return streams

    def of_loss(self, stream: Activations, num_tokens: float, losses: Losses) -> Activations:
        """The gradient at the stream after the last layer, which is freed; of the summed losses over num_tokens."""
        gradient, device = self._allocate(), self._options.device
        logits_of = self._decoder.logits_of(device, self._dtype)
        for start, stop in self._batches:
            stream_BLC = stream.get(start, stop).to(device, copy=True).requires_grad_()
            with torch.enable_grad():
                for loss in losses(logits_of, stream_BLC, self._ids_NL[start:stop]):
                    torch.autograd.backward(loss / num_tokens, inputs=[stream_BLC])
            assert stream_BLC.grad is not None
            gradient.put(start, stream_BLC.grad)
        self._store.free(stream)
        return gradient

    @abstractmethod
    def through(
        self,
        index: int,
        kinds: Collection[SubLayerKind],
        inputs: Activations,
        gradient: Activations,
        num_tokens: float,
    ) -> tuple[Found, Activations]:
        """What is found in a layer, and the gradient at its inputs; what was at its outputs is freed. gradient: of the
        losses over num_tokens."""

    def _layer(self, index: int) -> nn.Module:
        return self._decoder.layer(index, self._options.device).to(self._dtype)

    def _allocate(self) -> Activations:
        hidden_size = self._decoder.skeleton.config.hidden_size
        return self._store.allocate(len(self._ids_NL), (self._ids_NL.shape[1], hidden_size), self._dtype)


class _Gradients(Backward[LayerGradients]):
    """The gradients of all parameters."""

    def through(
        self,
        index: int,
        kinds: Collection[SubLayerKind],
        inputs: Activations,
        gradient: Activations,
        num_tokens: float,
    ) -> tuple[LayerGradients, Activations]:
        """The gradients of a layer's parameters, and at its inputs."""
        family, device, group = self._decoder.family, self._options.device, self._options.process_group
        layer = self._layer(index).requires_grad_(True)
        parameters = dict(layer.named_parameters())
        sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
        before = self._allocate()
        for start, stop in self._batches:
            inputs_BLC = inputs.get(start, stop).to(device, self._dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                output_BLC = layer_output(family, layer, inputs_BLC, self._kwargs[index], kinds)
            upstream_BLC = gradient.get(start, stop).to(device, self._dtype)
            wanted = (inputs_BLC, *parameters.values())
            at_inputs, *found = torch.autograd.grad(output_BLC, wanted, upstream_BLC, allow_unused=True)
            before.put(start, at_inputs)
            for name, part in zip(parameters, found, strict=True):
                if part is not None:  # of a sub-layer that is there
                    sums[name] += part
        for name, total in sums.items():
            group.sum_(total)
            if not bool(torch.isfinite(total).all()):
                raise PruningError(
                    f"the gradient of layer {index}, {name}, is not finite: the model's outputs contain NaN or "
                    "infinity; load it in another dtype (float32 or bfloat16) or check its weights"
                )
        self._store.free(inputs)
        self._store.free(gradient)
        return LayerGradients(index, layer.requires_grad_(False), sums), before


def needed_bytes(num_parameters: int, dtype: torch.dtype, num_tokens: int, hidden_size: int) -> int:
    """About what a backward walk takes on its device at once: one layer and its float32 gradients, and what autograd
    keeps of `num_tokens` tokens of one batch."""
    weights = num_parameters * (_computing(dtype).itemsize + _GRADIENT_BYTES)
    return weights + num_tokens * hidden_size * _KEPT_PER_TOKEN * _computing(dtype).itemsize


def _checked_needs(decoder: Decoder, options: WalkOptions, seq_len: int) -> int:
    """Bytes of the device, which has them, beside activations of other batches."""
    layers, dtype = decoder.family.layers(decoder.skeleton), decoder.family.embeddings(decoder.skeleton).weight.dtype
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    needed = needed_bytes(largest, dtype, options.batch_size * seq_len, decoder.skeleton.config.hidden_size)
    free = free_on_device(options.device)
    if free is not None and needed > free:
        raise PruningError(
            f"gradients of one layer need about {needed / 2**30:.1f} GiB on {options.device} (weights, float32 "
            f"gradients, activations of {options.batch_size} samples) and {free / 2**30:.1f} GiB are free; lower "
            "SLIMLINE_WALK_BATCH_SIZE or calibration.seq_len, or take a method without gradients"
        )
    return needed


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
