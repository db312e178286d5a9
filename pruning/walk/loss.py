"""The next-token loss of a residual stream, without ever holding all logits.

Shapes: B samples of one batch, L tokens per sample, C residual stream, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

#: tokens whose logits are in memory at once
_TOKENS = 128


def token_losses(logits_of: Callable[[Tensor], Tensor], stream_BLC: Tensor, ids_BL: Tensor) -> Iterator[Tensor]:
    """Sums of the loss (nats) over some predicted tokens each, all L - 1 of every sample in turn; float32 scalars.

    logits_of: from the stream after the last layer. Each sum may be differentiated before the next one is asked for.
    """
    for stream_LC, ids_L in zip(stream_BLC, ids_BL, strict=True):
        for stream_TC, targets_T in zip(stream_LC[:-1].split(_TOKENS), ids_L[1:].split(_TOKENS), strict=True):
            logits_TV = logits_of(stream_TC).float()
            yield nn.functional.cross_entropy(logits_TV, targets_T.to(logits_TV.device), reduction="sum")


def sampled_losses(logits_of: Callable[[Tensor], Tensor], stream_BLC: Tensor, ids_BL: Tensor) -> Iterator[Tensor]:
    """As `token_losses`, but each token is one that the model itself draws: gradients of these have the Fisher
    information as second moments. The draws of a sample depend on its own tokens alone."""
    for stream_LC, ids_L in zip(stream_BLC, ids_BL, strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(ids_L.cpu().numpy().tobytes()))
        for stream_TC in stream_LC[:-1].split(_TOKENS):
            logits_TV = logits_of(stream_TC).float()
            # the inverse of the distribution function at a number drawn on the CPU: the same on all devices
            drawn_T1 = torch.rand(len(stream_TC), 1, generator=generator, dtype=torch.float64)
            share_TV = logits_TV.detach().double().softmax(-1).cumsum_(-1)
            targets_T = torch.searchsorted(share_TV, drawn_T1.to(share_TV.device)).squeeze(1)
            targets_T.clamp_(max=logits_TV.shape[1] - 1)  # rounding may leave the sum below 1
            yield nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
