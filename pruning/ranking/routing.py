"""How many tokens the router of each layer sends to each expert, and what the experts add to the stream for them.

Shapes: E experts of a layer, T tokens routed to one of them, C residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.families.experts import experts_of
from pruning.families.forward import KINDS, read_by
from pruning.walk.streams import ResidualStreams

if TYPE_CHECKING:
    from pruning.checkpoints.decoder import Decoder
    from pruning.walk.options import WalkOptions


@dataclass(frozen=True)
class Usage:
    """Of one layer over the tokens of all processes. counts: by expert, how many tokens it got. norms: by expert, the
    sum over these of the 2-norm of what it adds to the stream, its output times what the router gives it."""

    layer: int
    num_tokens: int
    counts: tuple[int, ...]
    norms: tuple[float, ...]


@torch.no_grad()
def expert_usage(decoder: Decoder, input_ids_NL: Tensor, options: WalkOptions) -> Iterator[Usage | None]:
    """Walk the model as it is; yields of each layer what its experts do, None of one without experts."""
    ids_NL, group, family = options.process_group.share(input_ids_NL), options.process_group, decoder.family
    num_tokens = int(group.sum_of(ids_NL.numel())[0])
    with options.walk_store(decoder, input_ids_NL.shape[1]) as store:
        streams = ResidualStreams(decoder, options, store, ids_NL)
        for index in range(decoder.num_layers):
            layer = decoder.layer(index, options.device)
            experts = experts_of(family, layer)
            counts, norms = ([0.0] * (experts.num_experts if experts else 0) for _ in range(2))
            for start, before_BLC in streams.read():
                before_mlp_BLC, after_BLC = streams.around(layer, index, "mlp", before_BLC, KINDS)
                read_BLC = read_by(family, layer, "mlp", before_mlp_BLC)
                for routed in experts.routed(read_BLC) if experts else ():
                    assert experts is not None
                    output_TC = experts.output_linear(routed.expert)(routed.inputs_TI).float()
                    counts[routed.expert] += len(output_TC)
                    norms[routed.expert] += float((output_TC.norm(dim=-1) * routed.weights_T).sum(dtype=torch.float64))
                streams.common.put(start, after_BLC)
            del layer  # before the next one is there
            if experts is None:
                yield None
                continue
            del experts
            counts, norms = list(group.sum_of(*counts)), list(group.sum_of(*norms))
            yield Usage(index, num_tokens, tuple(map(int, counts)), tuple(norms))
