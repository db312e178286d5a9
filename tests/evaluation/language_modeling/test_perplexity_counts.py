"""Per word and per byte: what is divided by, window by window."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import lm_eval
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from evaluation.language_modeling.token_streams import wikitext_detokenized
from evaluation.language_modeling.windows import windows_of

TEXTS = ["  The quick brown fox, \n 1 @,@ 000 times", "naïve café – 日本語 🙂 ok", "one", "jumps over the lazy dog  "]
PAGE = (
    " \n = Robert <unk> = \n \n Robert ' s friends ' houses ( the old ones ) cost 1 @,@ 000 @.@ 5 – \" much \" , he"
    " said ; why ? [ no reason ] { none } ! At 5 ° C : N N N . \n = = Early life = = \n \n = = = A = = = \n"
    " the Smiths ' well @-@ known ' quoted ' dog 's tail \n"
)


def lm_eval_wikitext() -> ModuleType:
    path = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_detokenizer_writes_what_lm_eval_s_does() -> None:
    expected = lm_eval_wikitext().wikitext_detokenizer({"page": PAGE})
    assert wikitext_detokenized(PAGE) == expected != PAGE
    assert wikitext_detokenized("") == ""


@pytest.mark.parametrize("documents", ["joined", "separate"])
@pytest.mark.parametrize("detokenizer", [None, "wikitext"])
@pytest.mark.parametrize("words", ["word", "lm_eval_word"])
@pytest.mark.parametrize("bos", ["none", "once", "tokenizer"])
def test_all_windows_together_hold_the_original_text(
    tokenizer: PreTrainedTokenizerFast, documents: str, detokenizer: str | None, words: str, bos: str
) -> None:
    protocol = WindowProtocol.model_validate(
        {"window": 7, "rolling": True, "documents": documents, "detokenizer": detokenizer, "bos": bos}
        | {"normalise": [words, "byte"]}
    )
    windows = windows_of(tokenizer, TEXTS, protocol)
    originals = ["\n\n".join(TEXTS)] if documents == "joined" else TEXTS
    count = {"word": lambda text: len(text.split()), "lm_eval_word": lambda text: len(re.split(r"\s+", text))}[words]
    assert len(windows) > 5
    assert sum(window.num_words for window in windows) == pytest.approx(sum(map(count, originals)))
    assert sum(window.num_bytes for window in windows) == pytest.approx(sum(len(text.encode()) for text in originals))


def test_a_window_has_the_words_that_begin_in_it_and_the_bytes_of_its_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The tiny tokenizer is a byte-level BPE: a token of its vocabulary has as many letters as bytes."""
    text = "The quick brown fox jumps over the lazy dog, then it sleeps for 12345 hours."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    protocol = WindowProtocol(window=6, bos="none", keep_last_partial=True, normalise=("word", "byte"))
    windows = windows_of(tokenizer, [text], protocol)
    for number, window in enumerate(windows):
        first, last = number * 6 + 1, number * 6 + len(window.inputs)  # the first token is not predicted
        begin, end = sum(sizes[:first]), sum(sizes[:last])
        assert window.num_bytes == end - begin
        assert window.num_words == sum(text[i] != " " and (i == 0 or text[i - 1] == " ") for i in range(begin, end))
    assert sum(window.num_bytes for window in windows) < len(text)


def test_a_character_of_several_tokens_is_counted_once(tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = WindowProtocol(window=2, rolling=True, bos="none", normalise=("byte",))
    windows = windows_of(tokenizer, ["🙂"], protocol)
    assert sum(len(window.targets) for window in windows) == 4
    assert [window.num_bytes for window in windows] == [4.0, 0.0]


def test_the_figures_are_the_same_log_likelihood_over_other_counts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    protocol = WindowProtocol(window=12, bos="none", max_windows=5, normalise=("word", "byte"))
    result = perplexity(model, tokenizer, TEXTS, protocol)
    scored = result.scored
    total = sum(entry.nll for entry in scored)
    words = sum(entry.window.num_words for entry in scored)
    size = sum(entry.window.num_bytes for entry in scored)
    figures = result.normalised

    assert (len(result.scored), result.num_words, result.num_bytes) == (5, words, size)
    assert figures["word_ppl"].value == pytest.approx(math.exp(total / words))
    assert figures["byte_ppl"].value == pytest.approx(math.exp(total / size))
    assert figures["bits_per_byte"].value == pytest.approx(total / size / math.log(2))
    residuals = [entry.nll - total / size * entry.window.num_bytes for entry in scored]
    error = math.sqrt(5 / 4 * sum(value**2 for value in residuals)) / size
    assert figures["bits_per_byte"].stderr == pytest.approx(error / math.log(2))
    assert figures["byte_ppl"].stderr == pytest.approx(error * math.exp(total / size))


def test_windows_without_the_beginning_of_a_word_have_no_figure_per_word(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    protocol = WindowProtocol(window=8, bos="none", normalise=("word",))
    figure = perplexity(model, tokenizer, ["x" * 40], protocol).normalised["word_ppl"]
    assert (figure.value, figure.stderr) == (math.inf, None)


def test_words_of_a_slow_tokenizer_are_refused() -> None:
    class Slow:
        is_fast = False
        bos_token_id = 0

    protocol = WindowProtocol(window=8, normalise=("byte",))
    with pytest.raises(EvaluationError, match=r"slow tokenizer Slow does not tell; leave normalise out"):
        windows_of(Slow(), TEXTS, protocol)
