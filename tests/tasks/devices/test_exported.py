"""A file that was exported, as a model again: every weight is the file's, and what it computes with nothing lost is
what the checkpoint computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infra.errors import SourceInvalid
from infra.exporting.gguf_file import read_gguf
from pruning.checkpoints.save_load import load_checkpoint
from tasks.devices.exported import load_gguf
from tasks.exporting.gguf import export_gguf
from tests.tasks.exporting.kinds import write_checkpoint
from tests.tiny import random_ids


@pytest.mark.parametrize(
    "family, kind",
    [("llama", "uneven"), ("llama", "halves"), ("llama", "depth"), ("qwen2", "uneven"), ("gemma", "uniform")],
)
def test_what_is_written_in_float32_is_read_as_it_was(family: str, kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", family, kind, tie_word_embeddings=family == "gemma")
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f32")
    expected = load_checkpoint(tmp_path / "checkpoint")
    found = load_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", device="cpu")
    ids = random_ids(expected)
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    """Also where nothing but the file has them: the checkpoint's own are changed before it is read."""
    model = write_checkpoint(tmp_path / "checkpoint", "llama", "uneven", hidden=64, intermediate=96)
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "q8_0")
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "checkpoint")
    found = load_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf").state_dict()
    assert found.keys() == original.keys()
    for name, weight in original.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=float(weight.abs().max()) / 100, msg=name)
    q_proj = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(found[q_proj], original[q_proj])


def test_a_tensor_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", "llama", "depth")
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f32")
    with pytest.raises(SourceInvalid, match=r"has no tensor blk\.0\.attn_q\.bias, which is model\.layers\.0\."):
        list(read_gguf(tmp_path / "model.gguf", ["model.layers.0.self_attn.q_proj.bias"]))
