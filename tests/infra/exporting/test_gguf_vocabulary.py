"""Tokenizers in the words of GGUF: rules by their names, ids that no token has, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.errors import SourceInvalid
from infra.exporting.gguf_vocabulary import CONTROL, NORMAL, UNUSED, read_vocabulary
from tests.tiny import VOCAB_SIZE, tiny_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER_SPLIT = BYTES | {"use_regex": False}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def written(folder: Path, **changes: Any) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_bytes()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_every_row_of_the_embedding_has_a_token(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}', encoding="utf-8")
    found = read_vocabulary(written(tmp_path), VOCAB_SIZE + 2)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens[:2] + found.tokens[-2:] == ("<s>", "</s>", f"[PAD{VOCAB_SIZE}]", f"[PAD{VOCAB_SIZE + 1}]")
    assert (found.kinds[0], found.kinds[50], found.kinds[-1]) == (CONTROL, NORMAL, UNUSED)
    assert found.special == {"bos": 0, "eos": 1, "eot": 7}
    assert (found.add_bos, found.add_eos, found.add_space_prefix) == (True, False, None)
    assert found.chat_template == "{{ messages }}"
    assert found.merges
    assert all(merge.count(" ") == 1 for merge in found.merges)
    with pytest.raises(SourceInvalid, match=f"has token {VOCAB_SIZE - 1} and the embedding 300 rows"):
        read_vocabulary(tmp_path, 300)


@pytest.mark.parametrize(
    "steps, name",
    [
        ([{"type": "Digits", "individual_digits": True}, BYTES], "smollm"),
        ([split(LLAMA_3), AFTER_SPLIT], "llama-bpe"),
        ([split(LLAMA_3.replace("{1,3}", "")), AFTER_SPLIT], "qwen2"),
        ([split(r"\p{N}+"), AFTER_SPLIT], None),
        ([{"type": "Digits", "individual_digits": False}, BYTES], None),
        ([BYTES | {"add_prefix_space": True}], None),
    ],
)
def test_rules_have_the_names_that_llama_cpp_knows(steps: list[Any], name: str | None, tmp_path: Path) -> None:
    folder = written(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    if name is not None:
        assert read_vocabulary(folder, VOCAB_SIZE).pre == name
        return
    with pytest.raises(SourceInvalid, match=r"splits texts by rules that none of llama\.cpp's is known to be"):
        read_vocabulary(folder, VOCAB_SIZE)


def test_only_bpe_and_only_from_a_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"has no tokenizer\.json"):
        read_vocabulary(tmp_path, VOCAB_SIZE)
    written(tmp_path, model={"type": "Unigram", "vocab": [["a", 0.0]]})
    with pytest.raises(SourceInvalid, match="the tokenizer is a Unigram"):
        read_vocabulary(tmp_path, VOCAB_SIZE)
