"""The model that a finished walk leaves, one layer at a time: the next walk begins with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning.checkpoints.decoder import Decoder
from pruning.families.forward import SubLayerKind

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pruning.walk.state import WalkState


class FinishedDecoder(Decoder):
    """Layers with the weights and widths of a walk state whose layers are all finished.

    The layers keep the numbers of the dense model; of those that have lost a sub-layer `present` says which is there,
    and only a layer of which something is there can be asked for. All else is the dense model's.
    """

    def __init__(self, dense: Decoder, walk_state: WalkState) -> None:
        self.skeleton, self.family = dense.skeleton, dense.family
        self._dense, self._walk_state = dense, walk_state
        assert walk_state.layers_done == dense.num_layers, (walk_state.layers_done, dense.num_layers)

    def layer(self, index: int, device: torch.device) -> nn.Module:
        """The dense model's, cut, with the weights after the walk."""
        layer = self._dense.layer(index, device)
        self._walk_state.finish_(layer, index, self.family)
        return layer

    def present(self, index: int) -> tuple[SubLayerKind, ...]:
        """The sub-layers of a layer that are there."""
        plan = self._walk_state.entries[index].plan
        if plan is None:
            return ()
        kept: dict[SubLayerKind, tuple[int, ...]] = {"attention": plan.kept_kv_heads, "mlp": plan.kept_channels}
        return tuple(kind for kind, units in kept.items() if units)
