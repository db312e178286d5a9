"""A multimodal Gemma-3 comes in as the text model in it, in both spellings of its tensors; a GGUF has another name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra.models.import_model import describe, import_model
from infra.sources.located import Located
from pruning.families import decoder_parameters, family_of
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

IMAGES = ("vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.mm_soft_emb_norm.weight")


def multimodal(folder: Path, spelling: str) -> Any:
    """A tiny Gemma-3 as the hub keeps it; returns the text model in it."""
    model = tiny_model("gemma3", tie_word_embeddings=True)
    model.save_pretrained(folder / "text")
    tensors = load_file(folder / "text" / "model.safetensors")
    config = json.loads((folder / "text" / "config.json").read_bytes())
    inside = "model." if spelling == "new" else ""
    whole = {
        ("model.language_model." if spelling == "new" else "language_model.model.") + name.removeprefix("model."): each
        for name, each in tensors.items()
    }
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "whole")
    images = {inside + name: torch.ones(4) for name in IMAGES}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, (whole, images), strict=True):
        save_file(part, folder / "whole" / name, metadata={"format": "pt"})
    weight_map = dict.fromkeys(whole, names[0]) | dict.fromkeys(images, names[1])
    (folder / "whole" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    outer = {"eos_token_id": config.pop("eos_token_id"), "torch_dtype": "float32"}
    text = {name: value for name, value in config.items() if name not in ("architectures", "dtype")}
    values = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
        "vision_config": {"hidden_size": 4}, **outer,
    }  # fmt: skip
    (folder / "whole" / "config.json").write_text(json.dumps(values))
    (folder / "whole" / "preprocessor_config.json").write_text("{}")
    return model


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_the_text_model_is_what_comes_in(spelling: str, tmp_path: Path) -> None:
    text = multimodal(tmp_path, spelling)
    located = Located("someone/gemma-3", "model", tmp_path / "whole", None, "local path")
    described = describe(located)
    assert (described.model_type, described.num_layers, described.num_heads) == ("gemma3_text", 3, 8)
    out = tmp_path / "out"
    out.mkdir()
    card = import_model(located, out, "auto")
    outside = text.get_input_embeddings().weight.numel() + text.model.norm.weight.numel()
    assert card.num_parameters == described.num_parameters == decoder_parameters(text) + outside
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert family_of(model).name == "gemma3"
    assert model.config.eos_token_id == text.config.eos_token_id
    ids = random_ids(text)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, text(ids).logits)
    assert not (out / "preprocessor_config.json").exists()
    assert {name for file in out.glob("*.safetensors") for name in load_file(file)} == set(text.state_dict()) - {
        "lm_head.weight"
    }


def test_a_gguf_calls_the_text_model_otherwise(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    for add, value in (
        (writer.add_block_count, 18), (writer.add_embedding_length, 640), (writer.add_context_length, 32768),
        (writer.add_head_count, 4), (writer.add_head_count_kv, 1), (writer.add_key_length, 256),
    ):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((2, 640), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    card = describe(Located("someone/gguf", "model", tmp_path / "model.gguf", None, "local path"))
    assert (card.model_type, card.num_kv_heads, card.attention_size) == ("gemma3_text", 1, 1024)
