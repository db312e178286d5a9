"""How far a model's predictions moved: KL to the dense logits, without ever holding all logits.

Shapes: M samples, L tokens, C residual stream, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pruning.checkpoints.decoder import Decoder
from pruning.errors import PruningError
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers

#: tokens whose logits are in memory at once
_TOKENS = 128


def final_stream(decoder: Decoder, input_ids_ML: Tensor, options: WalkOptions) -> Tensor:
    """The residual stream after the last layer (M, L, C) of this process's samples, computed layer by layer."""
    walk = walk_layers(decoder, input_ids_ML, options, num_heldout=len(input_ids_ML), wanted=lambda layer, kind: False)
    while True:
        try:
            next(walk)
        except StopIteration as finished:
            stream_MLC: Tensor = finished.value
            return stream_MLC


@torch.no_grad()
def mean_kl(decoder: Decoder, dense_MLC: Tensor, pruned_MLC: Tensor, options: WalkOptions) -> float:
    """Mean over tokens of KL(dense ‖ pruned) in nats, of the logits that the model's own head gives both streams.

    Streams of one process; the mean is over the samples of all processes. Only the streams are held, never all logits:
    M x L x V of a large vocabulary would not fit. Raises PruningError when it is not finite: no comparison with NaN
    chooses anything.
    """
    device, logits_of = options.device, decoder.logits_of(options.device)
    total = 0.0
    for dense_LC, pruned_LC in zip(dense_MLC, pruned_MLC, strict=True):
        for dense_TC, pruned_TC in zip(dense_LC.split(_TOKENS), pruned_LC.split(_TOKENS), strict=True):
            p_TV, q_TV = (logits_of(stream_TC.to(device)).float() for stream_TC in (dense_TC, pruned_TC))
            # sum of p (log p - log q) in few passes over what is the largest tensor there is
            distance_T = q_TV.logsumexp(-1) - p_TV.logsumexp(-1)
            difference_TV = q_TV.neg_().add_(p_TV)
            distance_T += (p_TV.softmax(-1).mul_(difference_TV)).sum(-1)
            total += float(distance_T.sum()) / len(dense_LC)
    total, count = options.process_group.sum_of(total, len(dense_MLC))
    if not math.isfinite(total):
        raise PruningError(
            "the KL to the dense logits is not finite: the model's outputs contain NaN or infinity; load it in another "
            "dtype (float32 or bfloat16 instead of float16)"
        )
    return total / count
