"""The layer walk: the only loop over decoder layers in the project.

Every sub-layer is computed once. For attention and then the MLP of each layer the walk captures the inputs of the
output linear (o_proj, down_proj) for all calibration tokens, hands the linear and its Hessian to the caller, who may
change the weight in place, and lets the linear's output, with whatever weight it now has, join the residual stream. In
the same pass over the samples the inputs of the next one are captured: the stream is read and written once for each.
Where a layer ends and the next begins that takes both in memory, so that a stream that costs nothing to read is read
once more instead. Experts in the place of the MLP are handed out one by one, and computed a second time.

Shapes: N samples, M held-out samples, B samples of one batch, L tokens per sample, I input features of the linear.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruning.activations.activations import Activations
from pruning.activations.tiers import ActivationStore
from pruning.errors import memory_for
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
from pruning.walk.embedding import embed, enter, moved, spans
from pruning.walk.experts import ExpertStatistics, Few, sentence_about
from pruning.walk.options import WalkOptions
from pruning.walk.state import WalkedLayer, WalkState
from pruning.walk.step import Step, linear_as_pruned, offered_experts
from pruning.walk.sub_layer import SubLayer

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.statistics.hessian import Statistics


log = logging.getLogger("slimline")


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
    statistic up (default: Hessians). statistics: Hessians captured earlier, given instead of the ones that the stream
    would give; only the held-out samples are then walked. heldout_hessians: whether these have Hessians of their own.
    walk_state: takes each finished layer, and says where an interrupted walk goes on.

    Returns (as the generator's value) this process's held-out samples after the last layer, (M, L, C), before the norm.
    """
    calibration_NL, heldout_ML = input_ids_NL.tensor_split([len(input_ids_NL) - num_heldout])
    if statistics is not None:
        calibration_NL = calibration_NL[:0]
    calibration_NL, heldout_ML = options.process_group.share(calibration_NL), options.process_group.share(heldout_ML)
    folder = walk_state.folder if walk_state else None
    with options.walk_store(decoder, input_ids_NL.shape[1], folder) as activations:
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
        before: Step | None = None
        for index in range(walk_state.layers_done if walk_state else 0, decoder.num_layers):
            if before and walk.reads_for_nothing:  # the layer before goes first
                walk.end_layer(before, walk_state)
                before = None
            layer = decoder.layer(index, options.device)
            for kind in KINDS:
                given = wanted(index, kind)
                step = Step(layer, index, kind, captures=given and statistics is None)
                walk.advance(before, step)
                if walk_state and before and kind == "attention":
                    walk_state.layer_done(walk.walked(before))
                before = step
                yield from walk.offered(step, statistics if given else None)
            del layer, step
        if before:
            walk.end_layer(before, walk_state)
        if walk_state:
            walk_state.flush()
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
        self._num_layers = decoder.num_layers
        self._ids_NL = torch.cat([calibration_NL, heldout_ML])
        self._num_calibration = len(calibration_NL)
        size, end = options.batch_size, len(self._ids_NL)
        self._spans = spans(0, self._num_calibration, size) + spans(self._num_calibration, end, size)
        self._stream: Activations
        self._before: Activations | None = None
        self._kwargs: list[dict[str, Any]] = []
        self.few: list[Few] = []

    @torch.no_grad()
    def start(self, walk_state: WalkState | None) -> None:
        """The stream before the first layer that is not done yet, and the layers' keyword arguments."""
        self._stream = self._new_stream()
        model, family, device = self._model, self._family, self._options.device
        if not (walk_state and walk_state.layers_done):
            self._kwargs = enter(model, family, self._ids_NL, self._spans, self._stream, device)
            return
        for start, stop in self._spans:
            self._stream.put(start, walk_state.resumed(start, stop))
        self._kwargs = moved(embed(model, family, self._ids_NL[:1])[1], device) if self._spans else []

    @property
    def reads_for_nothing(self) -> bool:
        """Whether the stream may be read once more without a transfer."""
        return self._stream.resident

    def end_layer(self, step: Step, walk_state: WalkState | None) -> None:
        """The last sub-layer of a layer joins the stream, and the layer is finished."""
        self.advance(step, None)
        if walk_state:
            walk_state.layer_done(self.walked(step))

    @memory_for("the forward")
    def advance(self, joining: Step | None, following: Step | None) -> None:
        """One pass over all samples: the output of one sub-layer joins the stream, and of what is then the stream the
        next one's inputs are captured, while the batch is there."""
        capturing = following if following and following.captures else None
        beside = joining is not None and joining.kind == "attention" and self._family.parallel_residual
        stays = beside and capturing is None  # an MLP whose inputs are not kept will read the stream before the layer
        after = self._new_stream(instead_of=None if stays else self._stream) if joining else None
        if capturing:
            self._begin_capture(capturing, instead_of=joining.kept if joining else None)
        output_of = self._output_of(joining) if joining else None
        for start, stop in self._spans if joining or capturing else ():
            stream_BLC = self._stream.get(start, stop)
            read_BLC = stream_BLC
            if joining and after and output_of:
                output_BLC = output_of(stream_BLC, start, stop)
                joined_BLC = join(self._family, joining.layer, joining.kind, stream_BLC, output_BLC)
                after.put(start, joined_BLC)
                read_BLC = stream_BLC if beside else joined_BLC
                if not stays:
                    self._stream.drop(start)
            if capturing:
                self._capture(capturing, read_BLC, start)
        if joining and after:
            self._end_join(joining, after, stays=stays)

    def offered(self, step: Step, statistics: Statistics | None) -> Iterator[SubLayer]:
        """The sub-layer with what was captured of it, now or earlier, or with nothing; of experts one after another."""
        if self._mixes(step):
            yield from offered_experts(self._family, step, statistics, self._options, self.few)
            return
        family, process_group = self._family, self._options.process_group
        linear, name = output_linear(family, step.layer, step.kind), output_name(family, step.index, step.kind)
        statistic = heldout = None
        if statistics is not None:
            statistic, heldout = statistics.load(name, self._options.device)
        elif step.seen is not None:
            statistic = step.seen.finish(name, process_group)
            heldout = step.held.finish(name, process_group) if step.held else None
            step.seen = step.held = None
        scale_O = output_scale(family, step.layer, step.kind)
        offered = SubLayer(step.index, step.kind, name, linear, statistic, heldout, scale_O)
        keep_heads = partial(mask_head_norms_, family, step.layer)
        offered = replace(offered, keep_heads=keep_heads) if self._inputs_change(step) else offered
        del statistic, heldout
        yield offered

    def walked(self, step: Step) -> WalkedLayer:
        """The layer of a step that has joined the stream."""
        is_last = step.index == self._num_layers - 1
        return WalkedLayer(step.index, step.layer, self._family, self._stream, self._spans, is_last)

    def heldout_stream(self) -> Tensor:
        """The stream of the held-out samples, (M, L, C), on the host."""
        held = [span for span in self._spans if span[0] >= self._num_calibration]
        nothing = torch.empty(0, self._ids_NL.shape[1], self._model.config.hidden_size)
        return torch.cat([self._stream.on_host(*span) for span in held]) if held else nothing

    def _mixes(self, step: Step) -> bool:
        return step.kind == "mlp" and self._family.has_experts(step.layer)

    def _begin_capture(self, step: Step, instead_of: Activations | None) -> None:
        device = self._options.device
        if self._mixes(step):  # nothing is kept of their inputs: a token goes to several
            experts = experts_module(self._family, step.layer)
            step.experts_seen = ExpertStatistics(experts, self._accumulator, device)
            step.experts_held = ExpertStatistics(experts, self._accumulator, device) if self._sees_heldout else None
            return
        linear = output_linear(self._family, step.layer, step.kind)
        step.seen = self._accumulator(linear.in_features, device)
        step.held = self._accumulator(linear.in_features, device) if self._sees_heldout else None
        if not self._inputs_change(step):
            step.kept = self._allocate(linear.in_features, linear.weight.dtype, instead_of)

    def _capture(self, step: Step, read_BLC: Tensor, start: int) -> None:
        is_heldout = start >= self._num_calibration
        if self._mixes(step):
            statistics = step.experts_held if is_heldout else step.experts_seen
            if statistics:
                statistics.add(read_by(self._family, step.layer, "mlp", read_BLC))
            return
        inputs_BLI = output_inputs(self._family, step.layer, step.kind, read_BLC, self._kwargs[step.index])
        accumulator = step.held if is_heldout else step.seen
        if accumulator:
            accumulator.add(inputs_BLI, token_weights(self._family, step.layer, step.kind, inputs_BLI))
        if step.kept is not None:
            step.kept.put(start, inputs_BLI)

    def _output_of(self, step: Step) -> Callable[[Tensor, int, int], Tensor]:
        """What a sub-layer as it is now gives for a batch of the stream, to be joined."""
        if self._mixes(step):
            return lambda stream_BLC, start, stop: sub_layer_output(
                self._family, step.layer, step.kind, self._read(stream_BLC, start, stop), self._kwargs[step.index]
            )
        output_of = linear_as_pruned(self._family, step)
        return lambda stream_BLC, start, stop: output_of(self._inputs(step, stream_BLC, start, stop))

    def _inputs(self, step: Step, stream_BLC: Tensor, start: int, stop: int) -> Tensor:
        """What was kept of the inputs of a batch, which goes, or what they are now."""
        if step.kept is not None:
            inputs_BLI = step.kept.get(start, stop)
            step.kept.drop(start)
            return inputs_BLI
        read_BLC = self._read(stream_BLC, start, stop)
        return output_inputs(self._family, step.layer, step.kind, read_BLC, self._kwargs[step.index])

    def _read(self, stream_BLC: Tensor, start: int, stop: int) -> Tensor:
        return stream_BLC if self._before is None else self._before.get(start, stop)

    def _inputs_change(self, step: Step) -> bool:
        """Where a norm spans all heads, those that stay give something else without the others."""
        return step.kind == "attention" and self._family.head_norms_span_heads

    def _end_join(self, step: Step, after: Activations, *, stays: bool) -> None:
        """The next stream becomes the stream, and what nobody reads any more is freed."""
        if step.kept is not None:
            self._store.free(step.kept)
            step.kept = None
        if self._before is not None:
            self._store.free(self._before)
        self._before = self._stream if stays else None
        if not stays:
            self._store.free(self._stream)
        self._stream = after

    def _new_stream(self, instead_of: Activations | None = None) -> Activations:
        dtype = self._family.embeddings(self._model).weight.dtype
        return self._allocate(self._model.config.hidden_size, dtype, instead_of)

    def _allocate(self, num_features: int, dtype: torch.dtype, instead_of: Activations | None) -> Activations:
        shape = (self._ids_NL.shape[1], num_features)
        return self._store.allocate(len(self._ids_NL), shape, dtype, instead_of=instead_of)
