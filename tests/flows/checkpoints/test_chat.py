"""`slimline chat`: answers are the model's own, told piece by piece, with its template if it has one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from evaluation.errors import EvaluationError
from evaluation.inference.dialogue import Dialogue, DialogueOptions
from infra.artifacts.store import ArtifactRef
from infra.models.import_model import load_tokenizer
from pruning.checkpoints.save_load import load_checkpoint
from tests.flows.checkpoints.conftest import Command
from tests.flows.recorded_runs import Records
from tests.tiny import tiny_model, tiny_tokenizer


def folder_of(recorded: Records, name: str) -> Path:
    return recorded.store.path(ArtifactRef(kind="checkpoint", key=f"prune-{name}"))


def answered(folder: Path, written: str, count: int) -> str:
    """By transformers' generate alone."""
    model, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer(written, add_special_tokens=False).input_ids])
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_pipe_gets_the_answers_alone(recorded: Records, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The lazy dog\n\n/new\nWhat is the capital?\n"))
    said = command("chat", "tiny", "--max-tokens", "6")
    first, second = (
        answered(folder_of(recorded, "tuned"), f"user: {text}\nassistant:", 6)
        for text in ("The lazy dog", "What is the capital?")
    )
    assert said == f"{first}\n{second}\n"


def test_the_dense_model_answers_beside_it(
    recorded: Records, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The lazy dog\n"))
    said = command("chat", "tiny", "--checkpoint", "slimgpt-20", "--dense", "--max-tokens", "5")
    dense, pruned = (
        answered(folder_of(recorded, name), "user: The lazy dog\nassistant:", 5) for name in ("dense", "slimgpt-20")
    )
    assert said == f"dense: {dense}\nslimgpt-20: {pruned}\n"


def test_a_talk_goes_on_and_forgets_its_beginning_when_it_must() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
    model = tiny_model("llama", max_position_embeddings=48)
    dialogue = Dialogue(model, tokenizer, DialogueOptions(max_tokens=8, system="Be short."))
    pieces: list[str] = []
    assert dialogue.answer("The lazy dog", pieces.append) == "".join(pieces)
    assert [turn["role"] for turn in dialogue.turns] == ["user", "assistant"]
    dialogue.turns[1]["content"] = "jumps"
    dialogue.answer("and the brown fox runs over the lazy dog", pieces.append)
    assert dialogue.turns[0]["content"] != "The lazy dog"
    with pytest.raises(EvaluationError, match="the model's context is 48: make it shorter"):
        dialogue.answer("Pruning " * 40, pieces.append)


def test_without_a_template_each_text_is_continued() -> None:
    dialogue = Dialogue(tiny_model("llama"), tiny_tokenizer(), DialogueOptions(max_tokens=4, temperature=0.7, seed=3))
    pieces: list[str] = []
    first = dialogue.answer("The lazy dog", pieces.append)
    assert first == "".join(pieces)
    assert dialogue.answer("The lazy dog", pieces.append) == first, "drawn by the seed"
