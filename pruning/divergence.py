"""How far a pruned model's next-token distribution is from the dense one's, on held-out windows.

Shapes: M windows, L tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.families import ModelFamily
from pruning.sequential import WalkOptions, moved, walk_layers


def final_stream(model: nn.Module, family: ModelFamily, input_ids_ML: Tensor, options: WalkOptions) -> Tensor:
    """The residual stream after the last layer (M, L, C), computed layer by layer on options.device."""
    walk = walk_layers(model, family, input_ids_ML, options)
    while True:
        try:
            next(walk)
        except StopIteration as finished:
            stream: Tensor = finished.value
            return stream


@torch.no_grad()
def mean_kl(
    model: nn.Module, family: ModelFamily, dense_MLC: Tensor, pruned_MLC: Tensor, options: WalkOptions
) -> float:
    """Mean over tokens of KL(dense ‖ pruned) in nats, of the logits that the model's own head gives both streams.

    Only the streams are kept, never all logits: M x L x V of a large vocabulary would not fit.
    Raises PruningError when it is not finite: no comparison with NaN chooses anything.
    """
    norm, head = family.final_norm(model), family.head(model)
    total = 0.0
    with moved(norm, options.device), moved(head, options.device):
        for dense_LC, pruned_LC in zip(dense_MLC, pruned_MLC, strict=True):
            log_p_LV = head(norm(dense_LC.to(options.device))).float().log_softmax(-1)
            log_q_LV = head(norm(pruned_LC.to(options.device))).float().log_softmax(-1)
            total += float((log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1).mean())
    if not math.isfinite(total):
        raise PruningError(
            "the KL to the dense logits is not finite: the model's outputs contain NaN or infinity; load it in another "
            "dtype (float32 or bfloat16 instead of float16)"
        )
    return total / len(dense_MLC)
