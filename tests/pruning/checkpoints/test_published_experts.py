"""Experts as checkpoints keep them, one by one: read, made clean, written; as a stock model where there is one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pruning.checkpoints.clean import clean_
from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.plain_folder import check_stock, write_plain_folder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.families.experts import experts_module
from pruning.plan import PruningPlan
from tests.pruning.captured import same_weights
from tests.pruning.families.test_later_families import probe
from tests.tiny import EXPERT_FAMILIES, tiny_model


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_a_checkpoint_of_the_published_layout_is_imported(name: str, tmp_path: Path) -> None:
    """One expert per tensor name, the experts of a layer in several files, no prefix."""
    dense = tiny_model(name)
    dense.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any(each.endswith("gate_up_proj") for each in tensors)
    (tmp_path / "model.safetensors").unlink()
    bare = {each.removeprefix("model."): tensor for each, tensor in tensors.items()}
    shuffled = sorted(bare, key=lambda each: each[::-1])
    halves = [{each: bare[each] for each in shuffled[place::2]} for place in (0, 1)]
    index = {}
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(half, f"part-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert clean_(tmp_path) == (f"{len(tensors) - 1} tensors lack the prefix model.",)
    assert clean_(tmp_path) == ()
    assert torch.equal(probe(load_checkpoint(tmp_path)), probe(dense))
    streamed, resident = StreamedDecoder(tmp_path), ResidentDecoder(dense)
    for layer in range(3):
        assert same_weights(*(each.layer(layer, torch.device("cpu")) for each in (streamed, resident)))
    (tmp_path / "plain").mkdir()
    write_plain_folder(tmp_path, tmp_path / "plain")
    check_stock(tmp_path / "plain")
    assert torch.equal(probe(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), probe(dense))
    assert {each for file in (tmp_path / "plain").glob("*.safetensors") for each in load_file(file)} == set(tensors)


def test_missing_experts_are_said(tmp_path: Path) -> None:
    dense = tiny_model("mixtral")
    dense.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    one = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({name: value for name, value in tensors.items() if name != one}, tmp_path / "model.safetensors")
    with pytest.raises(PruningError, match=r"7 of the 8 tensors of model.layers.1.mlp.experts.gate_up_proj .*expert 2"):
        load_checkpoint(tmp_path)
    save_file(tensors | {one.replace(".2.w3", ".4.w3"): tensors[one].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(PruningError, match=r"9 of the 8 tensors .*with one of expert 4"):
        load_checkpoint(tmp_path)
    save_file(tensors | {one: tensors[one][:5].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(PruningError, match=r"misshapes a weight.* is \[5, 32\] and its config.json says \[24, 32\]"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("size", "stock"), [(16, True), (20, False)])
def test_equal_experts_are_a_stock_model_if_it_can_compute_them(size: int, stock: bool, tmp_path: Path) -> None:
    """torch's grouped products want rows of whole 16 bytes."""
    dense = tiny_model("mixtral", layers=2)
    full = PruningPlan.full(shapes(dense), 4)
    channels = tuple(expert * 24 + channel for expert in (0, 2, 3) for channel in range(size))
    plan = full.model_copy(
        update={"layers": tuple(kept.model_copy(update={"kept_channels": channels}) for kept in full.layers)}
    )
    masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    assert (type(shrunk) is type(dense)) == stock
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    save_checkpoint(shrunk, None, tmp_path, plan)
    assert torch.equal(probe(load_checkpoint(tmp_path)), probe(shrunk))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(probe(loaded), probe(shrunk))
    assert experts_module(family_of(dense), shrunk.model.layers[0]).num_experts == 3
    assert (loaded.config.num_local_experts, loaded.config.num_experts_per_tok) == (3, 2)
