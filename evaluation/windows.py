"""How a perplexity is to be taken: the protocol, without which two figures cannot be compared. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evaluation.suite import SuiteConfig

Bos = Literal["none", "once", "per_window"]
"""Where a beginning-of-sequence token goes: nowhere, before the text's first token, or at the head of each window."""


class WindowSelection(SuiteConfig):
    """How texts become windows, for any window length."""

    join: str = "\n\n"
    """Put between two texts before they are tokenised as one."""

    bos: Bos = "once"
    """SlimGPT's tables (arXiv 2412.18110) use "once". With "per_window" the token takes the place of one text token."""

    max_windows: int | None = Field(default=None, ge=1)
    """Measure only so many windows, drawn by `window_seed`; None measures all, in order."""

    window_seed: int = 0
    """The windows measured are the first `max_windows` of torch.randperm(number of windows, seed)."""

    keep_last_partial: bool = False
    """Measure the shorter window that is left at the end too, weighted by its tokens."""


class WindowProtocol(WindowSelection):
    """A complete perplexity protocol: the selection and the window length.

    Protocol P1 of the design notes is `WindowProtocol(window=1024, bos="none", max_windows=8, window_seed=1)` on a
    float32 model; the papers' is `WindowProtocol(window=128)`.
    """

    window: int = Field(ge=2)
    """Tokens in a window, BOS included; each but the first is predicted. Windows do not overlap."""
