from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.inference.generate import generate_until
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import PromptRule, chat_prompt, cut_middle, fit_prompt
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from tests.tiny import random_plan, tiny_model

PROMPTS = (
    "What is the capital of France?",
    "The quick brown fox",
    "Pruning removes the heads and the channels that matter least, and the others learn. " * 3,
    "Write a response",
    "<s>The text begins with its BOS",
    "question and answer " * 60,
)
CHAT = "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [answer]"


def by_hand(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    max_length: int,
) -> list[str]:
    """HFLM's own answers, row by row: with more rows it goes on behind some ends (see the test of batches)."""
    lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, max_length=max_length)
    instances = [Instance("generate_until", {}, (text, dict(settings)), 0) for text, settings in requests]
    return list(lm.generate_until(instances, disable_tqdm=True))


def texts(*args: Any, **kwargs: Any) -> list[str]:
    return [response.text for response in generate_until(*args, **kwargs)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "opt", "uneven"])
def test_the_answers_are_those_of_hflm(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama" if family == "uneven" else family)
    if family == "uneven":
        shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=3))
    settings: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 1}
    requests = [(prompt, settings) for prompt in PROMPTS]
    rule = PromptRule(context=100)
    whole = by_hand(model, tokenizer, requests, 100)
    assert texts(model, tokenizer, requests, rule, EvalOptions(batch_size=1)) == whole
    assert texts(model, tokenizer, requests, rule, EvalOptions(batch_size=4)) == whole
    assert len(set(whole)) > 2

    # Ends that do occur: of each answer some inner characters, and a token of another answer as the model's own end.
    stops = [text[len(text) // 2 :][:2] for text in whole if len(text) > 4]
    stopped = [(prompt, settings | {"until": [stop, "never"]}) for prompt, stop in zip(PROMPTS, stops, strict=False)]
    model.generation_config.eos_token_id = [1, tokenizer(whole[2], add_special_tokens=False)["input_ids"][-2]]
    expected = by_hand(model, tokenizer, stopped, 100)
    assert texts(model, tokenizer, stopped, rule, EvalOptions(batch_size=4)) == expected
    assert all(stop not in text for text, stop in zip(expected, stops, strict=False))


def test_a_pad_token_without_an_embedding_is_not_fed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """lm-eval adds "<|pad|>" to a tokenizer that has no token to pad with."""
    requests = [(prompt, {"until": [], "max_gen_toks": 6}) for prompt in PROMPTS]
    rule, options = PromptRule(context=100), EvalOptions(batch_size=len(PROMPTS))
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert padded.pad_token_id >= model.config.vocab_size
    assert texts(model, padded, requests, rule, options) == texts(model, tokenizer, requests, rule, options)


@pytest.mark.parametrize("until", ["e", ["e", "a"], []])
def test_rows_that_ended_do_not_change_with_those_beside_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, until: Any
) -> None:
    model.generation_config.eos_token_id = None  # so that nothing but the text says where an answer ends
    settings: dict[str, Any] = {"until": until, "max_gen_toks": 20}
    requests = [(prompt, settings) for prompt in PROMPTS]
    alone = texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=1))
    assert texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=6)) == alone
    assert alone == by_hand(model, tokenizer, requests, 200)


def test_settings_differ_from_request_to_request(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    requests: list[tuple[str, dict[str, Any]]] = [
        (PROMPTS[0], {"until": "e", "max_gen_toks": 5}),
        (PROMPTS[1], {"until": ["a"], "max_new_tokens": 9, "temperature": 0.0}),
        (PROMPTS[2], {"max_tokens": 3, "do_sample": False}),
        (PROMPTS[3], {"until": "e", "max_gen_toks": 5}),
    ]
    assert texts(model, tokenizer, requests, PromptRule(300), EvalOptions()) == by_hand(model, tokenizer, requests, 300)


def test_a_sampled_answer_depends_on_its_own_seed_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_gen_toks": 8}
    requests = [(PROMPTS[0], settings)] * 3
    before = torch.get_rng_state()
    one = texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=1))
    assert texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=3)) == one
    assert len(set(one)) == 3
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)  # what lm-eval begins with
    assert by_hand(model, tokenizer, requests[:1], 200) == one[:1]
    warm = {"temperature": 0.8, "top_p": 0.9, "max_gen_toks": 8}
    assert texts(model, tokenizer, [(PROMPTS[0], warm)], PromptRule(200)) == one[:1]


def test_short_of_memory_the_batch_is_halved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(prompt, {"max_gen_toks": 6}) for prompt in PROMPTS]
    expected = texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=1))
    generate, sizes = model.generate, []

    def narrow(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found: torch.Tensor = generate(input_ids=input_ids, **kwargs)
        return found

    monkeypatch.setattr(model, "generate", narrow)
    assert texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=6)) == expected
    assert sizes == [6, 3, 2, 2, 2]


class Elsewhere:
    """A replica in another process, as far as what is sent can tell."""

    def run(
        self, model: PreTrainedModel, work: Any, batches: Sequence[Any], finished: Callable[[int], None]
    ) -> list[list[Any]]:
        there = pickle.loads(pickle.dumps((work, batches)))
        return [pickle.loads(pickle.dumps(there[0](model, batch))) for batch in there[1]]


def test_the_work_can_be_sent_to_replicas(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    requests = [(prompt, {"until": ["e"], "max_gen_toks": 6}) for prompt in PROMPTS]
    replicas: Any = Elsewhere()
    expected = texts(model, tokenizer, requests, PromptRule(200))
    assert texts(model, tokenizer, requests, PromptRule(200), EvalOptions(batch_size=2, replicas=replicas)) == expected


def test_the_middle_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(PROMPTS[5])["input_ids"]
    for length in (2, 9, 10, len(ids) - 1):
        half = length // 2
        first = tokenizer.decode(ids[:half], skip_special_tokens=True)
        last = tokenizer.decode(ids[-half:], skip_special_tokens=True)
        assert cut_middle(tokenizer, ids, length) == first + last
    assert not cut_middle(tokenizer, ids, 10).startswith("<s>")


def test_a_prompt_in_its_middle_as_its_authors_cut_it(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"{number}." for number in range(200))
    ids = tokenizer(text)["input_ids"]
    rule = PromptRule(context=120, truncation="middle", prompt_length=40)
    prompt = fit_prompt(tokenizer, text, rule, max_gen_toks=20)
    assert prompt.truncated
    assert prompt.text == cut_middle(tokenizer, ids, 40)
    assert prompt.input_ids == tuple(tokenizer(prompt.text)["input_ids"])
    assert prompt.text.startswith("0. 1. 2.")
    assert prompt.text.endswith("198. 199.")
    # None: as much as fits
    prompt = fit_prompt(tokenizer, text, PromptRule(context=120, truncation="middle"), max_gen_toks=20)
    assert 97 <= len(prompt.input_ids) <= 100
    # exactly as long as may be is not cut
    exact = PromptRule(context=500, truncation="middle", prompt_length=len(tokenizer(PROMPTS[2])["input_ids"]))
    assert fit_prompt(tokenizer, PROMPTS[2], exact, max_gen_toks=20).text == PROMPTS[2]


def test_left_keeps_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(PROMPTS[5])["input_ids"]
    prompt = fit_prompt(tokenizer, PROMPTS[5], PromptRule(context=50), max_gen_toks=20)
    assert prompt.truncated
    assert prompt.input_ids == tuple(ids[-30:])
    assert not fit_prompt(tokenizer, PROMPTS[0], PromptRule(context=500), max_gen_toks=20).truncated


def test_the_chat_template_goes_around_what_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    text = " ".join(f"{number}." for number in range(200))
    rule = PromptRule(context=500, truncation="middle", prompt_length=40, chat_template=True)
    prompt = fit_prompt(tokenizer, text, rule, max_gen_toks=20)
    assert prompt.text == chat_prompt(tokenizer, cut_middle(tokenizer, tokenizer(text)["input_ids"], 40))
    assert prompt.text.startswith("<s>[user] 0. 1.")
    assert prompt.text.endswith("199. [answer]")
    assert prompt.input_ids.count(0) == 1  # one BOS
    # A prompt as long as the room leaves none for the template: more of its middle goes, never its ends.
    tight = PromptRule(context=120, truncation="middle", prompt_length=100, chat_template=True)
    prompt = fit_prompt(tokenizer, text, tight, max_gen_toks=20)
    assert 95 <= len(prompt.input_ids) <= 100
    assert prompt.text.startswith("<s>[user] 0. 1.")
    assert prompt.text.endswith("199. [answer]")
    with pytest.raises(EvaluationError, match="chat template alone fills a context of 24 tokens"):
        fit_prompt(tokenizer, text, PromptRule(24, "middle", chat_template=True), max_gen_toks=20)


def test_no_room_for_a_prompt_is_said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EvaluationError, match="an answer of 64 tokens leaves no room for a prompt in a context of 60"):
        generate_until(model, tokenizer, [("a", {"max_gen_toks": 64})], PromptRule(60))


def test_responses_say_what_was_asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    model.generation_config.max_length = 30  # older models bring one along
    reported: list[tuple[float, str]] = []
    options = EvalOptions(batch_size=2, progress=lambda share, message: reported.append((share, message)))
    requests = [(prompt, {"max_gen_toks": 4}) for prompt in PROMPTS]
    responses = generate_until(model, tokenizer, requests, PromptRule(80, "middle"), options)
    assert [response.truncated for response in responses] == [False, False, True, False, False, True]
    assert responses[0].prompt == PROMPTS[0]
    assert len(responses[5].prompt) < len(PROMPTS[5])
    assert reported[-1] == (1.0, "6 of 6 answers written")
    assert capfd.readouterr() == ("", "")
