"""How a perplexity is to be taken: the protocol, without which two figures cannot be compared. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from evaluation.bounds import Count, Seed
from evaluation.errors import EvaluationError
from evaluation.suite import SuiteConfig

Bos = Literal["none", "once", "per_window", "tokenizer"]
"""Where a beginning-of-sequence token goes: nowhere; before the first token of the text (with separate documents: of
each); at the head of each window; or whatever special tokens the tokenizer adds to a text by itself, as the papers'
code and lm-eval have it (once with Llama, nowhere with Qwen and SmolLM2)."""

Normalisation = Literal["word", "lm_eval_word", "byte"]
"""What a perplexity is per, beside the token.

A window's words and bytes are those of its predicted tokens: a word counts where its first character is predicted, and
a token's bytes are those of the text between its predecessor's end and its own. So the figures are right when only some
windows are measured, and sum up to the text's own words and bytes when all tokens are predicted. Words lie between
white space (str.split), bytes are UTF-8; both are counted in the text as it is in the data set, joined but not
detokenised (a detokeniser changes their number: each window then has its share of the original's). "lm_eval_word"
counts as lm-eval's task wikitext does, where white space at either end of a text makes one word more.
"""


class WindowSelection(SuiteConfig):
    """How texts become windows, for any window length."""

    join: str = "\n\n"
    """Put between two texts before they are tokenised as one."""

    documents: Literal["joined", "separate"] = "joined"
    """"separate": each text is cut by itself, no window spans two and `join` plays no part."""

    detokenizer: Literal["wikitext"] | None = None
    """Undo WikiText's tokenisation (" @-@ ", " , ") in each text first, as lm-eval's task wikitext does."""

    bos: Bos = "once"
    """SlimGPT's tables (arXiv 2412.18110) use "once". With "per_window" the token takes the place of one text token (to
    predict as many as Shortened LLaMA's add_bos_to_every does, ask for windows of one token more)."""

    rolling: bool = False
    """Predict every token of the text, the first one too: from BOS with bos: once, else from a prefix token (BOS, else
    EOS); a BOS that the tokenizer adds (bos: tokenizer) is predicted as well, as in lm-eval. Each later window predicts
    as many tokens as it is long, from one token of context before them. lm-eval's loglikelihood_rolling."""

    stride: Count | None = None
    """Windows begin so many tokens after one another and overlap; each predicts only what none before it has, with the
    rest as context. None: no overlap, and (unless `rolling`) the first token of a window is not predicted.

    With keep_last_partial this is the sliding window of the transformers documentation ("Perplexity of fixed-length
    models"), but for its weights: that recipe gives each later window's mean the weight of one token too few."""

    max_windows: Count | None = None
    """Measure only so many windows, drawn by `window_seed`; None measures all, in order."""

    window_seed: Seed | None = 0
    """The windows measured are the first `max_windows` of torch.randperm(number of windows, seed); None: the first of
    the text."""

    keep_last_partial: bool = False
    """Measure the shorter window that is left at the end of a text too, weighted by its tokens. If it is not set,
    `rolling` sets it. A text shorter than a window is measured in any case."""

    normalise: tuple[Normalisation, ...] = ()
    """Further figures over the same windows: word_ppl@W per word; byte_ppl@W and bits_per_byte@W per byte."""

    def at(self, window: int) -> WindowProtocol:
        """The complete protocol with windows of so many tokens."""
        return WindowProtocol(window=window, **{name: getattr(self, name) for name in WindowSelection.model_fields})

    @model_validator(mode="before")
    @classmethod
    def _rolling_predicts_everything(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("rolling") is True and "keep_last_partial" not in data:
            return data | {"keep_last_partial": True}
        return data


class WindowProtocol(WindowSelection):
    """A complete perplexity protocol: the selection and the window length.

    Protocol P1 of the design notes is `WindowProtocol(window=1024, bos="none", max_windows=8, window_seed=1)` on a
    float32 model; the papers' is `WindowProtocol(window=128)`.
    """

    window: Count = Field(ge=2)
    """Tokens the model is given at once, BOS included. Each but the first is predicted, or with `rolling` each and the
    one after the last."""


def window_lengths(windows: Sequence[int | Literal["max"]], longest: int | None) -> tuple[int, ...]:
    """The lengths in tokens; "max" is the model's own limit, `longest` (None: it states none).

    Raises EvaluationError for a length beyond the limit or named twice, and for "max" without a limit.
    """
    if longest is None and "max" in windows:
        raise EvaluationError("window 'max' is asked, but the model states no max_position_embeddings; name a number")
    lengths = tuple(longest if window == "max" and longest is not None else int(window) for window in windows)
    for length in lengths:
        check_length(length, longest)
    refuse_twice(lengths, f" (max is {longest})" if "max" in windows else "")
    return lengths


def refuse_twice(windows: Sequence[int | Literal["max"]], remark: str = "") -> None:
    """Raise EvaluationError if a length is named twice: both would be the same figure."""
    if len(set(windows)) < len(windows):
        raise EvaluationError(f"windows {', '.join(map(str, windows))} names a length twice{remark}; name each once")


def check_length(window: int, longest: int | None) -> None:
    """Raise EvaluationError if the model has no positions for a window of so many tokens."""
    if longest is not None and window > longest:
        raise EvaluationError(
            f"a window of {window} tokens is longer than the model's max_position_embeddings of {longest}; "
            f"ask for a window of at most {longest}"
        )


def check_consistent(selection: WindowSelection, lengths: Sequence[int]) -> None:
    """Raise EvaluationError for what contradicts itself at any of these window lengths."""
    if selection.rolling and selection.bos == "per_window":
        raise EvaluationError(
            "bos='per_window' and rolling exclude each other: a rolling window begins with the token before those it "
            "predicts; set bos to none, once or tokenizer"
        )
    if {"word", "lm_eval_word"} <= set(selection.normalise):
        raise EvaluationError("normalise names word and lm_eval_word, which are one figure counted twice; keep one")
    for length in lengths:
        if selection.stride is not None and selection.stride >= length:
            raise EvaluationError(
                f"stride {selection.stride} is not smaller than the window of {length} tokens, so nothing would "
                "overlap; give a smaller stride, or leave it out for windows without overlap"
            )
