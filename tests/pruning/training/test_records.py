"""Instruction records as examples: prompts, templates, what carries loss, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from pruning.errors import PruningError
from pruning.instructions import prompt_of
from pruning.training.batches import IGNORED, collate
from pruning.training.data import RecordData
from pruning.training.records import choose, encode
from tests.tiny import tiny_tokenizer

RECORDS = [
    {"instruction": f"What is {i} and {i}?", "input": "" if i % 2 else "Add them.", "output": f"It is {2 * i}."}
    for i in range(16)
]


def test_prompts_are_the_alpaca_ones() -> None:
    with_input = prompt_of(RECORDS[0], RecordData())
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert with_input.endswith("### Instruction:\nWhat is 0 and 0?\n\n### Input:\nAdd them.\n\n### Response:\n")
    without = prompt_of(RECORDS[1], RecordData())
    assert "Input" not in without
    assert without == prompt_of(RECORDS[1], RecordData(input=None))


def test_only_the_response_and_eos_carry_loss() -> None:
    tokenizer = tiny_tokenizer()
    examples = encode(tokenizer, RECORDS[:2], RecordData(), 512)
    batch = collate(0)([example.tensors() for example in examples])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, record in enumerate(RECORDS[:2]):
        labels = batch["labels"][row]
        learned = labels[labels != IGNORED]
        assert tokenizer.decode(learned) == record["output"] + "</s>"
        whole = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert tokenizer.decode(whole) == "<s>" + prompt_of(record, RecordData()) + record["output"] + "</s>"
        assert torch.equal(labels[labels != IGNORED], batch["input_ids"][row][labels != IGNORED])


def test_truncation_drops_examples_without_response() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode(tokenizer, RECORDS[:2], RecordData(), 512)
    shorter = min(whole, key=lambda example: example.num_prompt)
    cut = encode(tokenizer, RECORDS[:2], RecordData(), shorter.num_prompt + 1)
    assert [example.ids for example in cut] == [shorter.ids[: shorter.num_prompt + 1]]
    with pytest.raises(PruningError, match="none of the 2 training records has a response within max_length=20"):
        encode(tokenizer, RECORDS[:2], RecordData(), 20)


def test_a_tokenizer_that_adds_eos_itself_gets_one_only() -> None:
    class WithEos:
        eos_token_id = 1

        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*ids, 1] for ids in tiny_tokenizer()(texts)["input_ids"]]}

    assert encode(WithEos(), RECORDS, RecordData(), 512) == encode(tiny_tokenizer(), RECORDS, RecordData(), 512)  # type: ignore[arg-type]


def test_subsets_are_seeded() -> None:
    assert choose(RECORDS, None, 0) == RECORDS
    assert choose(RECORDS, 5, 0) == choose(RECORDS, 5, 0) != choose(RECORDS, 5, 1)
    assert len({record["output"] for record in choose(RECORDS, 5, 0)}) == 5


def test_unusable_records_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(PruningError, match="no training records"):
        choose([], None, 0)
    with pytest.raises(PruningError, match="num_examples is 17, but the data set has 16"):
        choose(RECORDS, 17, 0)
    with pytest.raises(
        PruningError, match=r"record 0 has no text in column 'output'; it has \['input', 'instruction'\]"
    ):
        encode(tokenizer, [{"instruction": "a", "input": "b"}], RecordData(), 512)
    with pytest.raises(PruningError, match="column 'question'"):
        encode(tokenizer, RECORDS, RecordData(instruction="question"), 512)
    tokenizer.eos_token = None
    with pytest.raises(PruningError, match="no EOS"):
        encode(tokenizer, RECORDS, RecordData(), 512)


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_asks_as_a_user_and_learns_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(PruningError, match="the tokenizer has no chat template: take alpaca, or an instruct model"):
        encode(tokenizer, RECORDS, RecordData(template="chat"), 512)
    tokenizer.chat_template = CHAT
    for record, example in zip(
        RECORDS[:2], encode(tokenizer, RECORDS[:2], RecordData(template="chat"), 512), strict=True
    ):
        whole = tokenizer.decode(example.ids)
        asked = record["instruction"] + (f"\n\n{record['input']}" if record["input"] else "")
        assert whole == f"<user>{asked}</s>\n<assistant>{record['output']}</s>\n"
        assert tokenizer.decode(example.ids[example.num_prompt :]).startswith(record["output"])


def test_records_without_an_answer_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    empty = {**RECORDS[0], "output": " "}
    with caplog.at_level(logging.WARNING, "slimline"):
        assert len(encode(tiny_tokenizer(), [empty, *RECORDS[:3]], RecordData(), 512)) == 3
    assert "1 of 4 training records have an empty output and are left out" in caplog.text
    with pytest.raises(PruningError, match="all 2 training records are empty in column 'output'"):
        encode(tiny_tokenizer(), [empty, empty], RecordData(), 512)
