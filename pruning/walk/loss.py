"""The next-token loss of a residual stream, without ever holding all logits.

Shapes: B samples of one batch, L tokens per sample, C residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
