"""What one layer of a walk moves, in bytes, counted on the pretended device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.families import family_of
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers
from tests.pretended.counts import Counts, counted
from tests.pretended.device import pretended

#: budgets in bytes of device and host, by where the activations then lie
PLACES: dict[str, tuple[int | None, int | None]] = {"device": (None, None), "host": (0, None), "files": (0, 0)}


@dataclass(frozen=True)
class LayerTransfers:
    """Of the second layer, its weights left out. to_device, from_device: bytes. stream: bytes of the residual stream of
    all samples. kept: of the inputs of both output linears. blocking: copies of activations that the host waited for.
    """

    to_device: int
    from_device: int
    stream: int
    kept: int
    blocking: int

    @property
    def streams_in(self) -> float:
        """Residual streams to the device; what was kept of a layer's inputs is not of them."""
        return max(0, self.to_device - self.kept) / self.stream

    @property
    def streams_out(self) -> float:
        return max(0, self.from_device - self.kept) / self.stream


def layer_transfers(model: PreTrainedModel, ids_NL: Tensor, place: str, batch_size: int) -> LayerTransfers:
    """Walk two layers; what happens from one layer's last sub-layer to the next one's is that layer's."""
    device_budget, host_budget = PLACES[place]
    with pretended() as device:
        options = WalkOptions(device, batch_size, host_budget, device_budget)
        with counted() as counts:
            walk = walk_layers(ResidentDecoder(model), ids_NL, options)
            before, after = Counts(), Counts()
            for sub_layer in walk:
                if sub_layer.kind == "mlp" and sub_layer.layer < 2:
                    before, after = after, replace(counts, waits=counts.waits.copy())
            del sub_layer
    family, layer = family_of(model), family_of(model).layers(model)[1]
    weights = list(layer.parameters())
    inputs = sum(linear.in_features for linear in (family.o_proj(layer), family.down_proj(layer)))
    item = torch.finfo(weights[0].dtype).bits // 8
    blocking = {way: after.waits[way] - before.waits[way] for way in ("copy to the device", "copy from the device")}
    return LayerTransfers(
        after.to_device - before.to_device - sum(weight.numel() * item for weight in weights),
        after.from_device - before.from_device,
        ids_NL.numel() * model.config.hidden_size * item,
        ids_NL.numel() * inputs * item,
        sum(blocking.values()) - len(weights),
    )
