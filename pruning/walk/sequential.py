"""The layer walk: the only loop over decoder layers in the project.

Every sub-layer is computed once. For attention and then the MLP of each layer the walk captures the inputs of the
output linear (o_proj, down_proj) for all calibration tokens, hands the linear and its Hessian to the caller, who may
change the weight in place, and adds the linear's output, with whatever weight it now has, to the residual stream.

Shapes: N samples, M held-out samples, B samples of one batch, L tokens per sample, I input features of the linear.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pruning.distributed import ProcessGroup
from pruning.families.forward import KINDS, SubLayerKind, output_inputs, output_linear, output_name
from pruning.obs.hessian import Hessian, HessianAccumulator
from pruning.walk.activations import Activations, ActivationStore
from pruning.walk.state import WalkedLayer, WalkState

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.families import ModelFamily
    from pruning.obs.hessian import Statistics


@dataclass(frozen=True)
class SubLayer:
    """What the walk yields: change `linear.weight` in place before the walk goes on, or leave it.

    layer: index. kind: which half of the layer. name: dotted name of the linear. hessian: of the linear's inputs,
    as the layers before it now give them, None if not wanted. heldout: the same over the held-out samples, if any.
    """

    layer: int
    kind: SubLayerKind
    name: str
    linear: nn.Linear
    hessian: Hessian | None
    heldout: Hessian | None = None


@dataclass(frozen=True)
class WalkOptions:
    """How to run the walk; nothing here changes the answer beyond rounding.

    device: where a layer computes; one layer at a time is there. batch_size: samples per forward.
    activation_budget_bytes: host memory that the activations of all samples may take; what goes beyond it lies in
    files. None: no limit. process_group: the processes that share the samples.
    """

    device: torch.device
    batch_size: int = 8
    activation_budget_bytes: int | None = None
    process_group: ProcessGroup = field(default_factory=ProcessGroup)


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
    statistics: Statistics | None = None,
    heldout_hessians: bool = True,
    walk_state: WalkState | None = None,
) -> Generator[SubLayer, None, Tensor]:
    """Walk all decoder layers over the calibration tokens, yielding attention then MLP of each (see SubLayer).

    input_ids_NL: (N, L) int64; the last `num_heldout` samples take part in the forward but in no Hessian. The weights
    of the model itself never change: `linear` belongs to a copy of the layer. If the caller changes it, later layers
    see the changed outputs (error propagation).

    wanted: the sub-layers whose Hessian is needed; the others are yielded without. statistics: Hessians captured
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
    with ActivationStore(options.activation_budget_bytes, walk_state.folder if walk_state else None) as activations:
        walk = _Walk(
            decoder, options, activations, calibration_NL, heldout_ML, sees_heldout=heldout_hessians and num_heldout > 0
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
        sees_heldout: bool,
    ) -> None:
        self._sees_heldout = sees_heldout
        self._family, self._model, self._options, self._store = decoder.family, decoder.skeleton, options, activations
        self._ids_NL = torch.cat([calibration_NL, heldout_ML])
        self._num_calibration = len(calibration_NL)
        self.spans = _spans(0, self._num_calibration, options.batch_size)
        self.spans += _spans(self._num_calibration, len(self._ids_NL), options.batch_size)
        self.stream: Activations
        self._next: Activations
        self._before: Activations | None = None
        self._kwargs: list[dict[str, Any]] = []

    @torch.no_grad()
    def start(self, walk_state: WalkState | None) -> None:
        """The stream before the first layer that is not done yet, and the layers' keyword arguments."""
        self.stream = self._new_stream()
        for start, stop in self.spans:
            if walk_state and walk_state.layers_done:
                self.stream.put(start, walk_state.resumed(start, stop))
            else:
                samples = [embed(self._model, self._family, self._ids_NL[n : n + 1])[0] for n in range(start, stop)]
                self.stream.put(start, torch.cat(samples))
        if self.spans:
            _, kwargs = embed(self._model, self._family, self._ids_NL[:1])
            self._kwargs = [_to_device(layer_kwargs, self._options.device) for layer_kwargs in kwargs]

    def capture(self, layer: nn.Module, index: int, kind: SubLayerKind) -> Iterator[SubLayer]:
        """Capture, yield, add: one forward of the sub-layer."""
        linear, name = output_linear(self._family, layer, kind), output_name(self._family, index, kind)
        device, process_group = self._options.device, self._options.process_group
        seen = HessianAccumulator(linear.in_features, device=device)
        held = HessianAccumulator(linear.in_features, device=device) if self._sees_heldout else None
        kept = self._allocate(linear.in_features, linear.weight.dtype)
        for start, stop in self.spans:
            inputs_BLI = self._inputs(layer, index, kind, start, stop)
            accumulator = seen if start < self._num_calibration else held
            if accumulator:
                accumulator.add(inputs_BLI)
            kept.put(start, inputs_BLI)
        hessians = seen.finish(name, process_group), held.finish(name, process_group) if held else None
        del seen, held
        yield SubLayer(index, kind, name, linear, *hessians)
        del hessians
        self._next = self._new_stream()
        output_of = _without_zero_columns(linear)
        for start, stop in self.spans:
            inputs_BLI = kept.get(start, stop).to(device)
            kept.drop(start)
            self._add(start, stop, output_of(inputs_BLI))
        self._store.free(kept)
        self._advance_stream(kind)

    def pass_on(
        self, layer: nn.Module, index: int, kind: SubLayerKind, statistics: Statistics | None
    ) -> Iterator[SubLayer]:
        """Yield with what was captured earlier, or with nothing; then compute and add."""
        linear, name = output_linear(self._family, layer, kind), output_name(self._family, index, kind)
        hessians = statistics.load(name, self._options.device) if statistics else (None, None)
        yield SubLayer(index, kind, name, linear, *hessians)
        del hessians
        self._next = self._new_stream()
        for start, stop in self.spans:
            self._add(start, stop, linear(self._inputs(layer, index, kind, start, stop)))
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

    def _inputs(self, layer: nn.Module, index: int, kind: SubLayerKind, start: int, stop: int) -> Tensor:
        stream = self.stream if self._before is None else self._before
        batch_BLC = stream.get(start, stop).to(self._options.device)
        return output_inputs(self._family, layer, kind, batch_BLC, self._kwargs[index])

    def _add(self, start: int, stop: int, output_BLC: Tensor) -> None:
        """Put stream + output into the next stream."""
        self._next.put(start, self.stream.get(start, stop).to(output_BLC.device) + output_BLC)
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


def _spans(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the keyword arguments the model gives it and passes the stream on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.first_input: Tensor | None = None
        # model code reads e.g. `decoder_layer.attention_type` to choose the mask
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs, self.first_input = kwargs, hidden_states
        return hidden_states


def embed(model: nn.Module, family: ModelFamily, input_ids_1L: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The residual stream of one sample before layer 0 (1, L, C), and the keyword arguments of each layer.

    Runs the model's own forward with recorders for layers, so masks and rotary tables are the model's, not ours;
    all samples have the same length and no padding, so one sample's arguments serve every batch.
    """
    decoder, layers = family.decoder(model), family.layers(model)
    layers_name = family.layers_path.rpartition(".")[2]
    recorders = [_Recorder(layer) for layer in layers]
    device = family.embeddings(model).weight.device
    setattr(decoder, layers_name, nn.ModuleList(recorders))
    training = [module for module in decoder.modules() if module.training]
    try:
        decoder.eval()  # dropout would be calibration noise
        decoder(input_ids=input_ids_1L.to(device), use_cache=False)
    finally:
        for module in training:
            module.training = True
        setattr(decoder, layers_name, layers)
    first_1LC = recorders[0].first_input
    assert first_1LC is not None
    return first_1LC, [recorder.kwargs for recorder in recorders]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return value
