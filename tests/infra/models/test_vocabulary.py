"""Tokens beyond the embedding: what text never needs is left out at import, what it yields is refused."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from infra.errors import SourceInvalid
from infra.models.import_model import describe, import_model, load_tokenizer
from infra.models.model_files import read_config
from infra.sources.located import Located
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

TEXT = "The quick [PAD] brown fox"
CHATML = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
PLAIN = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"


def model_folder(tmp_path: Path, change: Callable[[PreTrainedTokenizerFast], object], **config: Any) -> Located:
    """A model of as many embeddings as the tokenizer had tokens before the change."""
    folder = tmp_path / "model"
    tiny_model("llama", layers=1).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_bytes()) | config
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return Located(str(folder), "model", folder, None, "local path")


def imported(located: Located, tmp_path: Path) -> tuple[Path, PreTrainedTokenizerFast]:
    out = tmp_path / "out"
    out.mkdir()
    import_model(located, out, "auto")
    tokenizer = load_tokenizer(out)
    assert max(tokenizer.get_vocab().values()) < VOCAB_SIZE
    return out, tokenizer


def add_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def old_files(folder: Path) -> None:
    """The files as transformers 4 wrote them."""
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    entry = {"content": "[PAD]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"] = {str(VOCAB_SIZE): entry | {"special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCAB_SIZE}))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": entry}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    fast = json.loads((folder / "tokenizer.json").read_bytes())
    fast["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": VOCAB_SIZE,
        "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(fast))


@pytest.mark.parametrize("old", [False, True])
def test_a_pad_token_beyond_the_embedding_is_left_out_and_said(
    old: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    located = model_folder(tmp_path, add_pad)
    assert located.folder is not None
    if old:
        old_files(located.folder)
    before = {file.name: file.read_bytes() for file in located.folder.iterdir()}
    assert VOCAB_SIZE in load_tokenizer(located.folder)(TEXT)["input_ids"]
    with caplog.at_level(logging.WARNING):
        out, tokenizer = imported(located, tmp_path)
    (record,) = caplog.records
    assert (
        f"{located.folder}: the model has {VOCAB_SIZE} embeddings and none for the tokenizer's '[PAD]'"
        in record.message
    )
    assert tokenizer.pad_token is None
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert all(b"[PAD]" not in file.read_bytes() for file in out.iterdir())
    assert {file.name: file.read_bytes() for file in located.folder.iterdir()} == before


@pytest.mark.parametrize("listed", [True, False])
def test_a_llama_of_2023_with_a_sentencepiece_model(listed: bool, tmp_path: Path) -> None:
    """listed: added_tokens.json has the token; without it transformers adds what special_tokens_map.json names."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The quick brown fox jumps over the lazy dog."] * 8), model_writer=model,
        model_type="bpe", vocab_size=VOCAB_SIZE, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "model"
    tiny_model("llama", layers=1, eos_token_id=2, bos_token_id=1).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "pad_token": "[PAD]"},
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "[PAD]",
        },
    }
    files |= {"added_tokens.json": {"[PAD]": VOCAB_SIZE}} if listed else {}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    values = json.loads((folder / "config.json").read_bytes()) | {"vocab_size": size}
    (folder / "config.json").write_text(json.dumps(values))
    out = tmp_path / "out"
    out.mkdir()
    import_model(Located(str(folder), "model", folder, None, "local path"), out, "auto")
    tokenizer = load_tokenizer(out)
    assert max(tokenizer.get_vocab().values()) < size
    assert max(tokenizer(TEXT)["input_ids"]) < size
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_a_tokenizer_that_fits_is_not_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    located = model_folder(tmp_path, lambda tokenizer: None)
    out, _ = imported(located, tmp_path)
    assert located.folder is not None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (located.folder / name).read_bytes()
    assert caplog.records == []


def test_ids_in_the_configs_beyond_the_embedding_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers raises "Padding_idx must be within num_embeddings" for such a pad id."""
    from pruning.checkpoints.save_load import load_checkpoint

    located = model_folder(tmp_path, add_pad, pad_token_id=VOCAB_SIZE, eos_token_id=[1, VOCAB_SIZE + 1])
    assert located.folder is not None
    generation = {"pad_token_id": VOCAB_SIZE, "eos_token_id": 1, "bos_token_id": 0}
    (located.folder / "generation_config.json").write_text(json.dumps(generation))
    out, _ = imported(located, tmp_path)
    ids = f"pad_token_id {VOCAB_SIZE}, eos_token_id {VOCAB_SIZE + 1}"
    assert caplog.records[0].message.endswith(f"left out of its config, beyond its {VOCAB_SIZE} embeddings: {ids}")
    assert (read_config(out)["pad_token_id"], read_config(out)["eos_token_id"]) == (None, [1])
    assert json.loads((out / "generation_config.json").read_bytes()) == generation | {"pad_token_id": None}
    assert load_checkpoint(out).get_input_embeddings().padding_idx is None


def retrained(*words: str) -> Callable[[PreTrainedTokenizerFast], object]:
    """Words that the vocabulary proper has more than the model: as from another model."""

    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["model"]["vocab"] |= {word: VOCAB_SIZE + number for number, word in enumerate(words)}
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokenizer: tokenizer.add_tokens(["slim", "line"]), "text yields 'slim' (id 320), 'line' (id 321);"),
        (lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<end>"}), "its EOS token is '<end>' (id 320);"),
        (lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<go>"}), "its BOS token is '<go>' (id 320);"),
        (retrained("ab", "cd", "ef", "gh"), "text yields 'ab' (id 320), 'cd' (id 321), 'ef' (id 322) and 1 more;"),
    ],
)
def test_what_text_yields_is_refused_by_name(
    change: Callable[[PreTrainedTokenizerFast], object], words: str, tmp_path: Path
) -> None:
    located = model_folder(tmp_path, change)
    with pytest.raises(SourceInvalid) as caught:
        imported(located, tmp_path)
    assert words in str(caught.value)
    assert f"the tokenizer of {located.folder} has 32" in str(caught.value)
    assert "take the tokenizer that was trained with this model" in str(caught.value)


def test_a_token_around_every_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import processors

    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_special_tokens({"sep_token": "[SEP]"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", special_tokens=[("[SEP]", VOCAB_SIZE)]
        )

    with pytest.raises(SourceInvalid, match=r"it puts '\[SEP\]' \(id 320\) around every text"):
        imported(model_folder(tmp_path, change), tmp_path)


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_chat_template_that_writes_such_tokens_is_left_out(template: str, tmp_path: Path) -> None:
    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template

    located = model_folder(tmp_path, change)
    out, tokenizer = imported(located, tmp_path)
    usable = template is PLAIN
    assert (tokenizer.chat_template is not None) == usable
    assert (
        describe(located).has_chat_template
        == describe(Located("x", "model", out, None, "")).has_chat_template
        == usable
    )


def test_more_embeddings_than_tokens_are_usual(tmp_path: Path) -> None:
    """And so are holes: an added token may have any id that has an embedding."""
    located = model_folder(tmp_path, add_pad)
    assert located.folder is not None
    shutil.rmtree(located.folder)
    tiny_model("llama", layers=1, vocab_size=VOCAB_SIZE + 64).save_pretrained(located.folder)
    tokenizer = tiny_tokenizer()
    add_pad(tokenizer)
    tokenizer.save_pretrained(located.folder)
    (tmp_path / "out").mkdir()
    import_model(located, tmp_path / "out", "auto")
    assert load_tokenizer(tmp_path / "out").pad_token == "[PAD]"
