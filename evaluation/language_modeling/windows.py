"""Streams of tokens cut into the windows that a protocol asks for.

Shapes: T tokens of a stream, L tokens of a window, K of them predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluation.errors import EvaluationError
from evaluation.language_modeling.protocol import WindowProtocol, check_consistent
from evaluation.language_modeling.token_streams import Ids, Stream, bos_id, streams_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Window:
    """What the model is given at once, and what it is to predict.

    number: of the window among all of the texts. inputs: (L,). targets: (K,), of which the logits at position first + k
    of the inputs predict the k-th. num_words, num_bytes: what the targets stand for in the original text.
    """

    number: int
    inputs: Ids
    targets: Ids
    first: int
    num_words: float = 0.0
    num_bytes: float = 0.0

    @property
    def content(self) -> str:
        """A hash of the window's tokens and of which of them are predicted."""
        return hashlib.sha256(self.inputs.tobytes() + b"|" + self.targets.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class _Span:
    """Tokens begin to end of a stream, the last `predicted` of them as targets; led: a token is put before them."""

    begin: int
    end: int
    predicted: int
    led: bool
    full: bool


def windows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], protocol: WindowProtocol) -> list[Window]:
    """All windows of the texts, in order. A rest that predicts nothing is left out.

    Raises EvaluationError if the texts are too short, the protocol contradicts itself, or the tokenizer lacks what it
    asks for.
    """
    check_consistent(protocol, [protocol.window])
    lead = _lead(tokenizer, protocol)
    windows: list[Window] = []
    num_tokens = 0
    # the BOS that leads a rolling window is not one of the tokens that are predicted
    cut = protocol.model_copy(update={"bos": "none"}) if _led_by_bos(protocol) else protocol
    for stream in streams_of(tokenizer, texts, cut):
        num_tokens += len(stream.ids) - (cut.bos == "once")
        for span in _spans(len(stream.ids), protocol):
            windows.append(_window(len(windows), stream, span, lead, protocol))
    if not windows:
        raise EvaluationError(
            f"the {len(texts)} texts hold {num_tokens} tokens with bos='{protocol.bos}', too few to predict one; "
            "give a longer text or another split"
        )
    return windows


def select_windows(windows: list[Window], protocol: WindowProtocol) -> list[Window]:
    """The windows to measure: all of them, or `max_windows`, the first ones or those of a seeded permutation."""
    if protocol.max_windows is None:
        return windows
    if protocol.window_seed is None:
        return windows[: protocol.max_windows]
    generator = torch.Generator().manual_seed(protocol.window_seed)
    order = torch.randperm(len(windows), generator=generator)[: protocol.max_windows]
    return [windows[index] for index in order.tolist()]


def _led_by_bos(protocol: WindowProtocol) -> bool:
    return protocol.bos == "per_window" or (protocol.rolling and protocol.bos == "once")


def _lead(tokenizer: PreTrainedTokenizerBase, protocol: WindowProtocol) -> Ids:
    """The token before windows that are led by one."""
    if _led_by_bos(protocol):
        return np.array([bos_id(tokenizer, protocol)], dtype=np.int64)
    if not protocol.rolling:
        return np.array([], dtype=np.int64)
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise EvaluationError(
            f"rolling predicts the first token from BOS or EOS, and the tokenizer {type(tokenizer).__name__} has "
            "neither; leave rolling out"
        )
    return np.array([prefix], dtype=np.int64)


def _spans(length: int, protocol: WindowProtocol) -> list[_Span]:
    spans = list(_rolling(length, protocol) if protocol.rolling else _in_order(length, protocol))
    full = [span for span in spans if span.full]
    return spans if protocol.keep_last_partial or not full else full


def _in_order(length: int, protocol: WindowProtocol) -> Iterator[_Span]:
    led = protocol.bos == "per_window"
    size = protocol.window - led
    predicted_up_to = 0
    for begin in range(0, length, protocol.stride or size):
        end = min(begin + size, length)
        first = max(predicted_up_to, begin + (not led))
        if first < end:
            yield _Span(begin, end, end - first, led, full=end - begin == size)
        if end == length:
            return
        predicted_up_to = end


def _rolling(length: int, protocol: WindowProtocol) -> Iterator[_Span]:
    """Also the last window has as much context as the model may be given, as in lm-eval."""
    end = 0
    while end < length:
        wanted = protocol.window if end == 0 else protocol.stride or protocol.window
        predicted = min(wanted, length - end)
        end += predicted
        # a window's last target is not among its inputs, so it takes one token more
        begin = max(0, end - protocol.window - 1)
        yield _Span(begin, end, predicted, led=end <= protocol.window, full=predicted == wanted)


def _window(number: int, stream: Stream, span: _Span, lead: Ids, protocol: WindowProtocol) -> Window:
    ids = stream.ids[span.begin : span.end]
    if span.led:
        ids = np.concatenate([lead, ids])
    start = span.end - span.predicted
    return Window(
        number=number,
        inputs=ids[:-1] if protocol.rolling else ids,
        targets=stream.ids[start : span.end],
        first=len(ids) - 1 - span.predicted,
        num_words=float(stream.words[span.end] - stream.words[start]),
        num_bytes=float(stream.bytes[span.end] - stream.bytes[start]),
    )
