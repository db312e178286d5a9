"""Layers that come one at a time are the model's own, from memory or from files, and bad files are named."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pruning.checkpoints.decoder import Decoder, ResidentDecoder, StreamedDecoder
from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.stored_tensors import StoredTensors
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import family_of, layer_cost, shapes
from pruning.layerwise.kl import final_stream
from pruning.walk.sequential import walk_layers
from tests.pruning.captured import CPU, in_bfloat16, logits, same_weights
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model

DEVICE = torch.device("cpu")


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    save_checkpoint(model, None, folder, **options)
    return folder


@torch.no_grad()
def logits_of(decoder: Decoder, ids_NL: Tensor) -> Tensor:
    family, model = decoder.family, decoder.skeleton
    return family.head(model)(family.final_norm(model)(final_stream(decoder, ids_NL, CPU)))


def assert_equal_decoders(streamed: Decoder, model: PreTrainedModel) -> None:
    """Layers, everything else, and what a walk computes with them."""
    resident = ResidentDecoder(model)
    assert streamed.family is resident.family
    assert streamed.num_layers == resident.num_layers == len(resident.family.layers(model))
    assert shapes(streamed.skeleton) == shapes(model)
    assert layer_cost(streamed.skeleton) == layer_cost(model)
    for index in range(resident.num_layers):
        one, other = streamed.layer(index, DEVICE), resident.layer(index, DEVICE)
        assert type(one) is type(other)
        assert same_weights(one, other)
    prefix = f"{resident.family.layers_path}."
    mine, theirs = streamed.skeleton.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs if not name.startswith(prefix))
    ids_NL = random_ids(model, 4, 16)
    for one_sub, other_sub in zip(walk_layers(streamed, ids_NL, CPU), walk_layers(resident, ids_NL, CPU), strict=True):
        assert one_sub.hessian is not None
        assert other_sub.hessian is not None
        assert torch.equal(one_sub.hessian.matrix_II, other_sub.hessian.matrix_II)
    assert torch.equal(logits_of(streamed, ids_NL), logits_of(resident, ids_NL))
    torch.testing.assert_close(logits_of(streamed, ids_NL), logits(model, ids_NL), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_resident(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    assert_equal_decoders(StreamedDecoder(saved(model, tmp_path)), model)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_is_resident_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = in_bfloat16(tiny_model(name))
    streamed = StreamedDecoder(saved(model, tmp_path))
    ids_NL = random_ids(model, 4, 16)
    assert torch.equal(logits_of(streamed, ids_NL), logits_of(ResidentDecoder(model), ids_NL))
    assert {parameter.dtype for parameter in streamed.layer(1, DEVICE).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_checkpoint_of_uneven_layers(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, layers=4)
    shrink_(model, random_plan(shapes(model), family_of(model).head_dim(model), seed=3))
    assert_equal_decoders(StreamedDecoder(saved(model, tmp_path)), model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_several_shards_and_tied_heads(name: str, tied: bool, tmp_path: Path) -> None:
    if tied and name.startswith("phi"):
        pytest.skip("the head of a Phi has a bias and is never tied")
    model = tiny_model(name, tie_word_embeddings=tied)
    saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    streamed = StreamedDecoder(tmp_path)
    assert_equal_decoders(streamed, model)
    head, embeddings = (part(streamed.skeleton) for part in (streamed.family.head, streamed.family.embeddings))
    assert (head.weight is embeddings.weight) == tied


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    # as in the published Qwen3-0.6B
    model = tiny_model("qwen3", tie_word_embeddings=True)
    saved(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    assert_equal_decoders(StreamedDecoder(tmp_path), model)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_independent(name: str, streamed: bool, tmp_path: Path) -> None:
    model = tiny_model(name).train()
    decoder: Decoder = StreamedDecoder(saved(model, tmp_path)) if streamed else ResidentDecoder(model)
    skeleton, before = decoder.skeleton, copy.deepcopy(model)
    one, two = decoder.layer(1, DEVICE), decoder.layer(1, DEVICE)
    assert not any(module.training for module in one.modules())
    assert not any(parameter.requires_grad for parameter in one.parameters())
    tables = [tensor.data_ptr() for layer in (one, two) for tensor in layer.state_dict().values()]
    assert len(set(tables)) == len(tables)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert same_weights(two, decoder.layer(1, DEVICE))
    assert same_weights(two, decoder.family.layers(before)[1])
    assert same_weights(model, before)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = decoder.family.layers(skeleton)
    assert all(layer is not own[index] for layer in (one, two) for index in range(3))
    # a copy of a layer is not a copy of the config
    assert decoder.family.attention(one).config is skeleton.config  # type: ignore[attr-defined]


def test_the_layers_of_the_skeleton_hold_no_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    decoder = StreamedDecoder(saved(model, tmp_path))
    layers = decoder.family.layers(decoder.skeleton)
    held = [decoder.layer(index, DEVICE) for index in range(3)]
    assert all(linear.weight.is_meta for layer in layers for linear in decoder.family.linears(layer).values())
    assert not any(tensor.is_meta for layer in held for tensor in layer.state_dict().values())
    outside = [name for name, value in decoder.skeleton.named_parameters() if not value.is_meta]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(outside)


def changed(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Tensors replaced, or removed where None."""
    tensors: dict[str, Tensor | None] = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def walked_through(folder: Path) -> None:
    decoder = StreamedDecoder(folder)
    for index in range(decoder.num_layers):
        decoder.layer(index, DEVICE)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_missing_weight_is_named(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, layers=2)
    saved(model, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    prefix = f"{family_of(model).layers_path}.1."
    for weight in (weight for weight in model.state_dict() if f"{family_of(model).layers_path}.0." not in weight):
        (tmp_path / "model.safetensors").write_bytes(whole)
        changed(tmp_path, {weight: None})
        with pytest.raises(PruningError, match=r"lacks 1 weights?, the first is .*: save it again") as caught:
            walked_through(tmp_path)
        assert weight.removeprefix(prefix) in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "weight", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.2.input_layernorm.weight"]
)
def test_a_misshapen_weight_is_named_with_both_shapes(weight: str, tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path)
    changed(tmp_path, {weight: torch.ones(3)})
    with pytest.raises(PruningError, match=r"misshapes a weight, save it again: .*\[3\].*(32|16)") as caught:
        walked_through(tmp_path)
    assert weight.rpartition("layers.")[2].partition(".")[2].removeprefix("weight") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_other_names_are_neither_needed_nor_read(tmp_path: Path) -> None:
    # some repositories hold the same weights twice, the second time under their authors' names
    model = tiny_model("mistral")
    saved(model, tmp_path)
    changed(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    save_file(
        {"layers.0.attention.wq.weight": torch.ones(2), "norm.weight": torch.ones(2)}, tmp_path / "original.safetensors"
    )
    decoder = StreamedDecoder(tmp_path)
    assert_equal_decoders(decoder, model)
    with (tmp_path / "original.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    assert same_weights(StreamedDecoder(tmp_path).layer(0, DEVICE), family_of(model).layers(model)[0])


def test_only_the_layer_that_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral")
    read: list[str] = []
    whole = StoredTensors.read

    def watched(stored: StoredTensors, names: Iterable[str]) -> dict[str, Tensor]:
        read.extend(names := list(names))
        return whole(stored, names)

    monkeypatch.setattr(StoredTensors, "read", watched)
    StreamedDecoder(saved(model, tmp_path)).layer(0, DEVICE)
    assert sorted(read) == sorted(
        name for name in model.state_dict() if not name.startswith(("model.layers.1", "model.layers.2"))
    )


@pytest.mark.parametrize("cut", [-40, 100, 4, 0])
def test_a_truncated_file(cut: int, tmp_path: Path) -> None:
    file = saved(tiny_model("llama"), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(PruningError, match=r"cannot load the weights in .*model\.safetensors: "):
        StreamedDecoder(tmp_path)


def test_a_file_that_is_gone_when_its_layer_is_wanted(tmp_path: Path) -> None:
    decoder = StreamedDecoder(saved(tiny_model("llama"), tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PruningError, match=r"cannot load the weights in .*model\.safetensors: "):
        decoder.layer(0, DEVICE)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("model-*.safetensors"))[2].unlink()
    with pytest.raises(PruningError, match=r"lacks \d+ weights, the first is .*: save it again"):
        walked_through(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PruningError, match="has no weights"):
        StreamedDecoder(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PruningError, match=r"pickled weights \(pytorch_model\.bin\).*convert them to safetensors"):
        StreamedDecoder(tmp_path)


def test_folders_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"no config\.json"):
        StreamedDecoder(tmp_path)
    saved(tiny_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(PruningError, match=r"'gpt2'.*supported: "):
        StreamedDecoder(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(PruningError, match="not a model config"):
        StreamedDecoder(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_weights_has_real_tables(name: str) -> None:
    model = tiny_model(name)
    empty = meta_model(type(model), model.config)
    linears = [
        linear for layer in family_of(model).layers(empty) for linear in family_of(model).linears(layer).values()
    ]
    assert all(linear.weight.is_meta for linear in linears)
    assert [name for name, buffer in empty.named_buffers() if buffer.is_meta] == []
    for (_, one), (_, other) in zip(empty.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(one, other)


def test_another_thread_builds_real_modules_meanwhile() -> None:
    begun, built = threading.Event(), threading.Event()
    seen: list[nn.Linear] = []

    def slow_class(config: LlamaConfig) -> nn.Module:
        first = nn.Linear(2, 2)
        begun.set()
        assert built.wait(10)
        model = LlamaForCausalLM(config)
        assert first.weight.is_meta
        assert model.lm_head.weight.is_meta
        return model

    def other() -> None:
        assert begun.wait(10)
        seen.append(nn.Linear(3, 4))
        built.set()

    thread = threading.Thread(target=other)
    thread.start()
    meta_model(slow_class, tiny_model("llama").config)
    thread.join(10)
    (linear,) = seen
    assert linear.weight.device == DEVICE
    assert torch.isfinite(linear(torch.ones(3))).all()
    assert nn.Linear(2, 2).weight.device == DEVICE, "and afterwards this thread does so too"


def test_a_loader_that_fails_leaves_no_mode_behind() -> None:
    def broken(config: object) -> nn.Module:
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        meta_model(broken, None)
    assert nn.Linear(2, 2).weight.device == DEVICE


def test_both_ways_to_load_agree(tmp_path: Path) -> None:
    saved(tiny_model("gemma", tie_word_embeddings=True), tmp_path)
    assert_equal_decoders(StreamedDecoder(tmp_path), load_checkpoint(tmp_path))
