"""The layer walk: the only loop over decoder layers in the project.

Every sub-layer is computed once. For attention and then the MLP of each layer the walk captures the inputs of the
output linear (o_proj, down_proj) for all calibration tokens, hands the linear and its Hessian to the caller, who may
change the weight in place, and lets the linear's output, with whatever weight it now has, join the residual stream.
Experts in the place of the MLP are handed out one by one, and computed a second time.

Shapes: N samples, M held-out samples, B samples of one batch, L tokens per sample, I input features of the linear.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.families.experts import experts_module
from pruning.families.forward import (
    KINDS,
    SubLayerKind,
    join,
    output_inputs,
    output_linear,
    output_name,
    output_scale,
    read_by,
    sub_layer_output,
    token_weights,
)
from pruning.families.head_norms import mask_head_norms_
from pruning.statistics.accumulator import MakeAccumulator
from pruning.statistics.hessian import HessianAccumulator
from pruning.walk.activations import Activations, ActivationStore
from pruning.walk.embedding import embed, enter, spans, to_device
from pruning.walk.experts import ExpertStatistics, Few, sentence_about
from pruning.walk.state import WalkedLayer, WalkState
from pruning.walk.sub_layer import SubLayer, WalkOptions

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.statistics.hessian import Statistics


__all__ = ["SubLayer", "WalkOptions", "walk_layers"]

log = logging.getLogger("slimline")

#: share of a linear's inputs above which computing with all of them is cheaper than gathering the kept ones
_GATHER_SHARE = 0.7


# Not under torch.no_grad: its wrapper of a generator keeps each sub-layer with its Hessian until the next one is there.
# Layers come without gradients, and so does the stream.
def walk_layers(
    decoder: Decoder,
    input_ids_NL: Tensor,
    options: WalkOptions,
    *,
    num_heldout: int = 0,
    wanted: Callable[[int, SubLayerKind], bool] = lambda layer, kind: True,
    accumulator: MakeAccumulator | None = None,
    statistics: Statistics | None = None,
    heldout_hessians: bool = True,
    walk_state: WalkState | None = None,
) -> Generator[SubLayer, None, Tensor]:
    """Walk all decoder layers over the calibration tokens, yielding attention then MLP of each (see SubLayer).

    input_ids_NL: (N, L) int64; the last `num_heldout` samples take part in the forward but in no Hessian. The weights
    of the model itself never change: `linear` belongs to a copy of the layer. If the caller changes it, later layers
    see the changed outputs (error propagation).

    wanted: the sub-layers whose statistic is needed; the others are yielded without. accumulator: makes what adds the
    statistic up (default: Hessians). statistics: Hessians captured
    earlier, given instead of the ones that the stream would give; only the held-out samples are then walked.
    heldout_hessians: whether the held-out samples have Hessians of their own. walk_state: takes each finished layer,
    and says where an interrupted walk goes on.

    Returns (as the generator's value) the residual stream of this process's held-out samples after the last layer,
    (M, L, C), before the final norm.
    """
    calibration_NL, heldout_ML = input_ids_NL.tensor_split([len(input_ids_NL) - num_heldout])
    if statistics is not None:
        calibration_NL = calibration_NL[:0]
    calibration_NL, heldout_ML = options.process_group.share(calibration_NL), options.process_group.share(heldout_ML)
    with options.activation_store(walk_state.folder if walk_state else None) as activations:
        walk = _Walk(
            decoder,
            options,
            activations,
            calibration_NL,
            heldout_ML,
            accumulator=accumulator or HessianAccumulator,
            sees_heldout=heldout_hessians and num_heldout > 0,
        )
        walk.start(walk_state)
        for index in range(walk_state.layers_done if walk_state else 0, decoder.num_layers):
            layer = decoder.layer(index, options.device)
            for kind in KINDS:
                if statistics is not None and wanted(index, kind):
                    yield from walk.pass_on(layer, index, kind, statistics)
                elif wanted(index, kind):
                    yield from walk.capture(layer, index, kind)
                else:
                    yield from walk.pass_on(layer, index, kind, None)
            walk.finish_layer()
            if walk_state:
                walk_state.layer_done(WalkedLayer(index, layer, decoder.family, walk.stream, walk.spans))
            del layer  # before the next one is there
        if walk.few:
            log.warning(sentence_about(walk.few))
        return walk.heldout_stream()


class _Walk:
    """The state between sub-layers: the residual stream, and the stream before the layer while some still read it."""

    def __init__(
        self,
        decoder: Decoder,
        options: WalkOptions,
        activations: ActivationStore,
        calibration_NL: Tensor,
        heldout_ML: Tensor,
        *,
        accumulator: MakeAccumulator,
        sees_heldout: bool,
    ) -> None:
        self._accumulator, self._sees_heldout = accumulator, sees_heldout
        self._family, self._model, self._options, self._store = decoder.family, decoder.skeleton, options, activations
        self._ids_NL = torch.cat([calibration_NL, heldout_ML])
        self._num_calibration = len(calibration_NL)
        self.spans = spans(0, self._num_calibration, options.batch_size)
        self.spans += spans(self._num_calibration, len(self._ids_NL), options.batch_size)
        self.stream: Activations
        self._next: Activations
        self._before: Activations | None = None
        self._kwargs: list[dict[str, Any]] = []
        self.few: list[Few] = []

    @torch.no_grad()
    def start(self, walk_state: WalkState | None) -> None:
        """The stream before the first layer that is not done yet, and the layers' keyword arguments."""
        self.stream = self._new_stream()
        device = self._options.device
        if not (walk_state and walk_state.layers_done):
            self._kwargs = enter(self._model, self._family, self._ids_NL, self.spans, self.stream, device)
            return
        for start, stop in self.spans:
            self.stream.put(start, walk_state.resumed(start, stop))
        if self.spans:
            _, kwargs = embed(self._model, self._family, self._ids_NL[:1])
            self._kwargs = [to_device(layer_kwargs, device) for layer_kwargs in kwargs]

    def capture(self, layer: nn.Module, index: int, kind: SubLayerKind) -> Iterator[SubLayer]:
        """Capture, yield, add: one forward of the sub-layer, of experts a second one."""
        if kind == "mlp" and self._family.has_experts(layer):
            yield from self._capture_experts(layer, index)
            return
        linear, name = output_linear(self._family, layer, kind), output_name(self._family, index, kind)
        device, process_group = self._options.device, self._options.process_group
        seen = self._accumulator(linear.in_features, device)
        held = self._accumulator(linear.in_features, device) if self._sees_heldout else None
        # where a norm spans all heads, those that stay give something else without the others
        anew = kind == "attention" and self._family.head_norms_span_heads
        kept = None if anew else self._allocate(linear.in_features, linear.weight.dtype)
        for start, stop in self.spans:
            inputs_BLI = self._inputs(layer, index, kind, start, stop)
            accumulator = seen if start < self._num_calibration else held
            if accumulator:
                accumulator.add(inputs_BLI, token_weights(self._family, layer, kind, inputs_BLI))
            if kept is not None:
                kept.put(start, inputs_BLI)
        found = seen.finish(name, process_group), held.finish(name, process_group) if held else None
        del seen, held
        yield self._offered(layer, index, kind, *found)
        del found
        self._next = self._new_stream()
        output_of = _without_zero_columns(linear)
        for start, stop in self.spans:
            if kept is None:
                inputs_BLI = self._inputs(layer, index, kind, start, stop)
            else:
                inputs_BLI = kept.get(start, stop).to(device)
                kept.drop(start)
            self._join(layer, kind, start, stop, output_of(inputs_BLI))
        if kept is not None:
            self._store.free(kept)
        self._advance_stream(kind)

    def pass_on(
        self, layer: nn.Module, index: int, kind: SubLayerKind, statistics: Statistics | None
    ) -> Iterator[SubLayer]:
        """Yield with what was captured earlier, or with nothing; then compute and add."""
        mixture = kind == "mlp" and self._family.has_experts(layer)
        experts = range(experts_module(self._family, layer).num_experts) if mixture else (None,)
        for expert in experts:
            name = output_name(self._family, index, kind, expert)
            hessians = statistics.load(name, self._options.device) if statistics else (None, None)
            yield self._offered(layer, index, kind, hessians[0], hessians[1], expert)
            del hessians
        self._through(layer, index, kind)

    def _capture_experts(self, layer: nn.Module, index: int) -> Iterator[SubLayer]:
        """All experts in one pass, since a token goes to several; nothing is kept of their inputs."""
        device, experts = self._options.device, experts_module(self._family, layer)
        seen, held = (ExpertStatistics(experts, self._accumulator, device) for _ in range(2))
        for start, stop in self.spans:
            is_heldout = start >= self._num_calibration
            if self._sees_heldout or not is_heldout:
                stream_BLC = self.stream.get(start, stop).to(device)
                (held if is_heldout else seen).add(read_by(self._family, layer, "mlp", stream_BLC))
        name_of, group = partial(output_name, self._family, index, "mlp"), self._options.process_group
        found, few = seen.finish(name_of, group)
        heldout = held.finish(name_of, group, complete=False)[0] if self._sees_heldout else [None] * len(found)
        self.few += few
        del seen, held
        for expert in range(experts.num_experts):
            yield self._offered(layer, index, "mlp", found.pop(0), heldout.pop(0), expert)
        self._through(layer, index, "mlp")

    def _through(self, layer: nn.Module, index: int, kind: SubLayerKind) -> None:
        """Compute a sub-layer as it is now and let its output join the stream."""
        self._next = self._new_stream()
        for start, stop in self.spans:
            output_BLC = sub_layer_output(self._family, layer, kind, self._read(start, stop), self._kwargs[index])
            self._join(layer, kind, start, stop, output_BLC)
        self._advance_stream(kind)

    def finish_layer(self) -> None:
        """Free the stream before the layer."""
        if self._before is not None:
            self._store.free(self._before)
        self._before = None

    def heldout_stream(self) -> Tensor:
        """The stream of the held-out samples, (M, L, C)."""
        batches = [self.stream.get(start, stop) for start, stop in self.spans if start >= self._num_calibration]
        nothing = torch.empty(0, self._ids_NL.shape[1], self._model.config.hidden_size)
        return torch.cat(batches) if batches else nothing

    def _offered(
        self, layer: nn.Module, index: int, kind: SubLayerKind, statistic: Any, heldout: Any, expert: int | None = None
    ) -> SubLayer:
        family = self._family
        linear, name = output_linear(family, layer, kind, expert), output_name(family, index, kind, expert)
        if expert is not None:
            num_experts = experts_module(family, layer).num_experts
            return SubLayer(index, kind, name, linear, statistic, heldout, expert=expert, num_experts=num_experts)
        offered = SubLayer(index, kind, name, linear, statistic, heldout, output_scale(family, layer, kind))
        if not (kind == "attention" and family.head_norms_span_heads):
            return offered
        return replace(offered, keep_heads=partial(mask_head_norms_, family, layer))

    def _inputs(self, layer: nn.Module, index: int, kind: SubLayerKind, start: int, stop: int) -> Tensor:
        return output_inputs(self._family, layer, kind, self._read(start, stop), self._kwargs[index])

    def _read(self, start: int, stop: int) -> Tensor:
        stream = self.stream if self._before is None else self._before
        return stream.get(start, stop).to(self._options.device)

    def _join(self, layer: nn.Module, kind: SubLayerKind, start: int, stop: int, output_BLC: Tensor) -> None:
        """Put the stream with the output in it into the next stream."""
        stream_BLC = self.stream.get(start, stop).to(output_BLC.device)
        self._next.put(start, join(self._family, layer, kind, stream_BLC, output_BLC))
        if not self._family.parallel_residual:
            self.stream.drop(start)

    def _advance_stream(self, kind: SubLayerKind) -> None:
        """The next stream becomes the stream; with parallel residuals the MLP still reads the one before the layer."""
        if self._family.parallel_residual and kind == "attention":
            self._before = self.stream
        else:
            self._store.free(self.stream)
        self.stream = self._next

    def _new_stream(self) -> Activations:
        return self._allocate(self._model.config.hidden_size, self._family.embeddings(self._model).weight.dtype)

    def _allocate(self, num_features: int, dtype: torch.dtype) -> Activations:
        return self._store.allocate(len(self._ids_NL), (self._ids_NL.shape[1], num_features), dtype)


def _without_zero_columns(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The linear as a function that saves the work for removed inputs, where that is worth gathering the others."""
    kept_K = linear.weight.any(0).nonzero().squeeze(1)
    if len(kept_K) > _GATHER_SHARE * linear.in_features:
        return linear
    weight_OK = linear.weight[:, kept_K].contiguous()
    return lambda inputs_BLI: nn.functional.linear(inputs_BLI[..., kept_K], weight_OK, linear.bias)
