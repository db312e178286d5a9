"""Linear stand-ins for dropped layers (ReplaceMe, arXiv 2505.02819), merged into the down_proj before them.

A run of dropped layers would have added something to the residual stream. The down_proj of the layer before the run is
fitted to add it as well, from the inputs that it has: ridge regression towards its own weights, in closed form. The
model stays one of the stock class. (The authors fit a square matrix on the MLP's outputs and multiply it in; fitting
the weights themselves on the MLP's inputs contains that.) A norm behind the down_proj would rescale whatever is fitted:
families that have one are refused.

Shapes: O outputs, I inputs of a down_proj, B samples of one batch, L tokens per sample, C residual stream.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families.forward import join, output_name, residual_multiplier
from pruning.layerwise.drop import StandIn
from pruning.statistics.cross import CrossMoments, CrossMomentsAccumulator
from pruning.walk.state import SubLayerReport
from pruning.walk.streams import ResidualStreams

if TYPE_CHECKING:
    from collections.abc import Callable

    from pruning.activations.tiers import ActivationStore
    from pruning.calibration import CalibrationSet
    from pruning.checkpoints.decoder import Decoder
    from pruning.walk.options import WalkOptions

log = logging.getLogger("slimline")


@torch.no_grad()
def fit_stand_ins(
    decoder: Decoder,
    calibration: CalibrationSet,
    dropped: Collection[int],
    ridge: float,
    options: WalkOptions,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[int, StandIn]:
    """New down_proj weights by the layer before each run of dropped layers, fitted on the dense model's streams.

    ridge: weight of the penalty, as a share of the mean diagonal of the second moments. A fit that is worse than none
    on the held-out windows is left out, with a warning; so is one for a run that begins with the first layer.
    """
    runs = dict(_runs(dropped))
    stand_ins: dict[int, StandIn] = {}
    last = max(runs.values(), default=-1)
    with options.walk_store(decoder, calibration.input_ids_NL.shape[1]) as store:
        fitted, heldout = (
            _Fit(decoder, options, store, options.process_group.share(ids_NL))
            for ids_NL in (calibration.input_ids_NL, calibration.heldout_ids_ML)
        )
        for index in range(last + 1):
            layer = decoder.layer(index, options.device)
            for fit in (fitted, heldout):
                fit.advance(index, layer, host=index in runs)
            if index in runs:
                host, weight_OI = index, decoder.family.down_proj(layer).weight
            if index in runs.values():
                moments, judged = fitted.finish(), heldout.finish()
                assert moments is not None, "calibration has no tokens"
                name = output_name(decoder.family, host, "mlp")
                stand_in = _stand_in(name, host, weight_OI, moments, judged, ridge)
                worse = judged is not None and judged.error(stand_in.weight_OI) > judged.error(weight_OI)
                if options.process_group.decide(lambda worse=worse: worse):  # type: ignore[misc]
                    log.warning(
                        "no stand-in for layers %d to %d: on the held-out windows it is worse than none; raise ridge "
                        "(now %g) or num_samples",
                        *(host + 1, index, ridge),
                    )
                else:
                    stand_ins[host] = stand_in
            del layer  # before the next one is there
            progress((index + 1) / (last + 1))
    return stand_ins


def _stand_in(
    name: str, host: int, weight_OI: Tensor, moments: CrossMoments, judged: CrossMoments | None, ridge: float
) -> StandIn:
    """The fit, and what it leaves of what the run of layers did (output_energy), on both kinds of windows."""
    new_OI = moments.fit(weight_OI, ridge)
    report = SubLayerReport(
        layer=host,
        sub_layer="mlp",
        name=name,
        kept=weight_OI.shape[1],
        total=weight_OI.shape[1],
        predicted_error=None,
        measured_error=moments.error(new_OI),
        output_energy=moments.energy,
        heldout_error=judged.error(new_OI) if judged else None,
        num_tokens=moments.num_tokens,
    )
    return StandIn(new_OI, report)


def _runs(dropped: Collection[int]) -> Iterator[tuple[int, int]]:
    """The layer before each run of dropped layers, and the last one of the run."""
    for first in sorted(dropped):
        if first - 1 in dropped:
            continue
        if first == 0:
            log.warning("no stand-in for the dropped layers at the start: there is no down_proj before them")
            continue
        last = first
        while last + 1 in dropped:
            last += 1
        yield first - 1, last


class _Fit:
    """The dense stream of some samples, and for the run that is being walked what its host had."""

    def __init__(self, decoder: Decoder, options: WalkOptions, store: ActivationStore, ids_NL: Tensor) -> None:
        self._decoder, self._options, self._store = decoder, options, store
        self._streams = ResidualStreams(decoder, options, store, ids_NL)
        self._num_samples, self._seq_len = ids_NL.shape

    def advance(self, index: int, layer: torch.nn.Module, *, host: bool) -> None:
        """Take the stream through a layer; of a host keep what its down_proj reads, and what its output joins."""
        linear = self._decoder.family.down_proj(layer)
        if host:
            dtype = linear.weight.dtype
            self._joined = self._streams.allocate()
            self._inputs = self._store.allocate(self._num_samples, (self._seq_len, linear.in_features), dtype)
            self._bias, self._multiplier = linear.bias, residual_multiplier(self._decoder.family, layer)
        for start, before_BLC in self._streams.read():
            if not host:
                self._streams.common.put(start, self._streams.through(layer, index, before_BLC))
                continue
            joined_BLC, inputs_BLI = self._streams.mlp_inputs(layer, index, before_BLC)
            self._joined.put(start, joined_BLC)
            self._inputs.put(start, inputs_BLI)
            after_BLC = join(self._decoder.family, layer, "mlp", joined_BLC, linear(inputs_BLI))
            self._streams.common.put(start, after_BLC)

    def finish(self) -> CrossMoments | None:
        """Moments of the host's inputs and of what its down_proj would have to give for the stream to be as it is now,
        after the run; None without samples. What was kept of the host is freed."""
        device, hidden_size = self._options.device, self._decoder.skeleton.config.hidden_size
        moments = CrossMomentsAccumulator(self._inputs.sample_shape[1], hidden_size, device)
        for start, after_BLC in self._streams.read():
            stop = start + len(after_BLC)
            wanted_BLO = after_BLC - self._joined.get(start, stop).to(device)
            inputs_BLI = self._inputs.get(start, stop).to(device)
            bias_O: Tensor | None = self._bias
            if self._multiplier is not None:  # of outputs: the same as of inputs and bias
                inputs_BLI = inputs_BLI * self._multiplier
                bias_O = None if bias_O is None else bias_O * self._multiplier
            moments.add(inputs_BLI, wanted_BLO if bias_O is None else wanted_BLO - bias_O)
        self._store.free(self._joined)
        self._store.free(self._inputs)
        return moments.finish(self._options.process_group)
