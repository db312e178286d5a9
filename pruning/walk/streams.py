"""Residual streams of all samples, taken through layers that the caller names: for walks that leave layers out.

Shapes: N samples, B samples of one batch, L tokens per sample, C residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pruning.activations.activations import Activations
from pruning.activations.tiers import ActivationStore
from pruning.families.forward import KINDS, SubLayerKind, layer_output, output_inputs
from pruning.walk.embedding import enter, spans
from pruning.walk.loss import token_losses

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.walk.options import WalkOptions


class ResidualStreams:
    """Residual streams of one process's samples; `common` is the one of the model as it stands."""

    def __init__(self, decoder: Decoder, options: WalkOptions, store: ActivationStore, ids_NL: Tensor) -> None:
        self._decoder, self._device, self._store, self._ids_NL = decoder, options.device, store, ids_NL
        self.batches = spans(0, len(ids_NL), options.batch_size)
        self.common = self.allocate()
        self._kwargs: list[dict[str, Any]] = enter(
            decoder.skeleton, decoder.family, ids_NL, self.batches, self.common, options.device
        )

    def allocate(self) -> Activations:
        """Room for one more stream."""
        embeddings = self._decoder.family.embeddings(self._decoder.skeleton)
        shape = (self._ids_NL.shape[1], self._decoder.skeleton.config.hidden_size)
        return self._store.allocate(len(self._ids_NL), shape, embeddings.weight.dtype)

    def advance(
        self, stream: Activations, layer: nn.Module, index: int, kinds: Sequence[SubLayerKind], *, into: Activations
    ) -> Activations:
        """Take a stream through those sub-layers of a layer."""
        for start, stop in self.batches:
            into.put(start, self.through(layer, index, stream.get(start, stop).to(self._device), kinds))
        return into

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """The common stream batch by batch on the device, each with the number of its first sample."""
        for start, stop in self.batches:
            yield start, self.common.get(start, stop).to(self._device)

    def around(
        self,
        layer: nn.Module,
        index: int,
        kind: SubLayerKind,
        before_BLC: Tensor,
        kinds: Sequence[SubLayerKind],
    ) -> tuple[Tensor, Tensor]:
        """The stream before and after one sub-layer of a layer. Where both sub-layers read the stream before the layer,
        that is what each is measured against."""
        if kind == "mlp" and "attention" in kinds and not self._decoder.family.parallel_residual:
            before_BLC = self.through(layer, index, before_BLC, ("attention",))
        return before_BLC, self.through(layer, index, before_BLC, (kind,))

    def summed_loss(self, stream: Activations) -> float:
        """Of a stream after the last layer, over all predicted tokens."""
        logits_of = self._decoder.logits_of(self._device)
        return sum(
            float(loss)
            for start, stop in self.batches
            for loss in token_losses(logits_of, stream.get(start, stop).to(self._device), self._ids_NL[start:stop])
        )

    def through(
        self, layer: nn.Module, index: int, before_BLC: Tensor, kinds: Sequence[SubLayerKind] = KINDS
    ) -> Tensor:
        """One batch after those sub-layers of a layer."""
        return layer_output(self._decoder.family, layer, before_BLC, self._kwargs[index], kinds)

    def mlp_inputs(self, layer: nn.Module, index: int, before_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Of one batch the stream that the MLP's output will join, and the inputs (B, L, I) of its down_proj."""
        family = self._decoder.family
        joined_BLC = self.through(layer, index, before_BLC, ("attention",))
        read_BLC = before_BLC if family.parallel_residual else joined_BLC
        return joined_BLC, output_inputs(family, layer, "mlp", read_BLC, self._kwargs[index])
