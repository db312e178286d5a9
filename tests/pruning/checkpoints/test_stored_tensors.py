"""A checkpoint folder is one model for whoever loads it, or is refused by all in the same words; import cleans it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from infra.models.card import card_of_folder
from pruning.checkpoints.clean import clean_
from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.stored_tensors import stored_tensors
from pruning.errors import PruningError
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from tests.pruning.captured import CPU, logits, same_weights, windows
from tests.pruning.checkpoints.test_decoder import DEVICE, logits_of
from tests.tiny import random_ids, tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

Tensors = dict[str, Tensor]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "opt")
HEAD = "lm_head.weight"


def embeddings_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


def as_saved(tensors: Tensors) -> Tensors:
    return tensors


def with_a_copy(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[embeddings_of(tensors)].clone()}


def with_another_head(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return tensors | {HEAD: torch.randn(tensors[embeddings_of(tensors)].shape, generator=generator)}


def head_alone(tensors: Tensors) -> Tensors:
    name = embeddings_of(tensors)
    return {HEAD if key == name else key: value for key, value in tensors.items() if key != HEAD}


def without_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def norms_wide(tensors: Tensors) -> Tensors:
    return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}


def norms_narrow(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in tensors.items()}


def in_half(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


TIES = [
    *((True, change) for change in (as_saved, with_a_copy, with_another_head, head_alone)),
    *((False, change) for change in (as_saved, with_a_copy, without_head, head_alone)),
]
PREFIXES = (as_saved, without_prefix)
DTYPES = (norms_wide, norms_narrow, in_half)
#: whether config.json ties; the head, the names and the dtypes as they are stored
CASES = [
    *((tied, head, prefix, as_saved) for (tied, head), prefix in product(TIES, PREFIXES)),
    *((True, with_another_head, without_prefix, dtype) for dtype in DTYPES),
    *((False, as_saved, as_saved, dtype) for dtype in DTYPES),
]
UNCLEAN = [
    case
    for case in CASES
    if case
    not in (
        (True, as_saved, as_saved, as_saved),
        (False, as_saved, as_saved, as_saved),
        (False, with_a_copy, as_saved, as_saved),
    )
]


def written(folder: Path, model: PreTrainedModel, *changes: Callable[[Tensors], Tensors], shards: bool = False) -> Path:
    save_checkpoint(model, None, folder, max_shard_size="20KB" if shards else "5GB")
    for file in folder.glob("*.safetensors"):
        tensors: Tensors = load_file(file)
        for change in changes:
            tensors = change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def refusal(load: Callable[[], object]) -> str | None:
    try:
        load()
    except PruningError as error:
        return str(error)
    return None


def assert_same_model(folder: Path) -> PreTrainedModel:
    """Both loaders give the same weights in the same dtype, tied or not, and the same logits; returns the model."""
    model, streamed = load_checkpoint(folder), StreamedDecoder(folder)
    family, skeleton = streamed.family, streamed.skeleton
    for index in range(streamed.num_layers):
        assert same_weights(streamed.layer(index, DEVICE), family.layers(model)[index])
    inside = f"{family.layers_path}."
    mine, theirs = skeleton.state_dict(), model.state_dict()
    outside = [name for name in theirs if not name.startswith(inside)]
    assert [name for name in mine if not name.startswith(inside)] == outside
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in outside)
    ties = {family.head(each).weight is family.embeddings(each).weight for each in (model, skeleton)}
    assert ties == {model.config.tie_word_embeddings} == {skeleton.config.tie_word_embeddings}
    assert {parameter.dtype for parameter in model.parameters()} == {model.config.dtype} == {skeleton.config.dtype}
    ids_NL = random_ids(model, 2, 12)
    assert torch.equal(logits_of(streamed, ids_NL), logits_of(ResidentDecoder(model), ids_NL))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_loader_gives_one_model_or_the_same_refusal(name: str, tmp_path: Path) -> None:
    prefixes = PREFIXES if name == "llama" else PREFIXES[:1]  # what differs between families is not how names begin
    cases, refused = [case for case in CASES if case[2] in prefixes], 0
    for number, (tied, head, prefix, dtype) in enumerate(cases):
        said = (name, tied, head.__name__, prefix.__name__, dtype.__name__)
        dense = tiny_model(name, tie_word_embeddings=tied, layers=2)
        folder = written(tmp_path / str(number), dense, head, prefix, dtype)
        why = refusal(lambda folder=folder: load_checkpoint(folder))
        if why is not None:
            assert not tied, said
            assert "lacks 1 weights, the first is" in why, said
            assert refusal(lambda folder=folder: StreamedDecoder(folder)) == why, said
            assert refusal(lambda folder=folder: clean_(folder)) == why, said
            refused += 1
            continue
        model = assert_same_model(folder)
        assert_transformers_gives(folder, model, said)
        changes = clean_(folder)
        assert bool(changes) == ((tied, head, prefix, dtype) in UNCLEAN), said
        assert stored_tensors(folder).oddities == ()
        assert_transformers_gives(folder, model, said)
        assert card_of_folder(folder).num_parameters == model.num_parameters(), said
        assert card_of_folder(folder).dtype == str(model.dtype).removeprefix("torch."), said
    assert refused == 2 * len(prefixes), "only an untied model without its head, or without embeddings"


def assert_transformers_gives(folder: Path, model: PreTrainedModel, said: object) -> None:
    """Whoever loads the folder without us gets the same logits."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    assert torch.equal(logits(theirs, random_ids(model)), logits(model, random_ids(model))), said


def test_a_clean_folder_is_left_as_it_is(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("llama"), shards=True)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    assert clean_(folder) == ()
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()} == before


def test_shards_are_cleaned_one_by_one(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("qwen3", tie_word_embeddings=True), without_prefix, norms_narrow, shards=True)
    # one shard more, of nothing that the model has
    save_file({"v_head.weight": torch.ones(2)}, folder / "model-x.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["v_head.weight"] = "model-x.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = assert_same_model(folder)
    assert clean_(folder) == (
        f"{len(index['weight_map']) - 1} tensors lack the prefix model.",
        "1 tensors are of no part of the model, the first is v_head.weight",
        "some weights are bfloat16 where most are float32",
    )
    assert not (folder / "model-x.safetensors").exists()
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(logits(assert_same_model(folder), random_ids(model)), logits(model, random_ids(model)))


@pytest.mark.parametrize(
    "extra", ["model.layers.1.self_attn.q_proj.bias", "layers.0.self_attn.q_norm.weight", "lm_head.bias", "norm.bias"]
)
def test_a_weight_that_would_not_be_computed_with_is_refused(extra: str, tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("llama"), lambda tensors: tensors | {extra: torch.ones(4)})
    reasons = [refusal(lambda load=load: load(folder)) for load in (load_checkpoint, StreamedDecoder, clean_)]
    assert set(reasons) == {
        f"{folder} holds {extra}, which a LlamaForCausalLM of its config.json does not compute with: take the "
        "config.json that belongs to the weights"
    }


@pytest.mark.parametrize("extra", ["model.layers.3.mlp.up_proj.weight", "score.weight", "model.rotary_emb.inv_freq"])
def test_parts_that_the_model_does_not_have_change_nothing(extra: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = written(tmp_path, model, lambda tensors: tensors | {extra: torch.ones(4)})
    assert torch.equal(logits(assert_same_model(folder), random_ids(model)), logits(model, random_ids(model)))
    assert len(clean_(folder)) == ("rotary" not in extra)
    assert (extra in load_file(folder / "model.safetensors")) == ("rotary" in extra)
    assert card_of_folder(folder).num_parameters == model.num_parameters()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda tensors: tensors | {"norm.weight": torch.ones(32)}, "holds model.norm.weight twice, as"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
            "holds model.norm.weight as I8, which is no plain floating point",
        ),
        (lambda tensors: tensors | {"model.norm.weight": torch.ones(31)}, r"model.norm.weight is \[31\] and .* \[32\]"),
    ],
)
def test_tensors_that_are_no_model(change: Callable[[Tensors], Tensors], reason: str, tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("llama"), change)
    for load in (load_checkpoint, StreamedDecoder, clean_):
        with pytest.raises(PruningError, match=reason):
            load(folder)


def test_a_value_that_the_common_dtype_cannot_hold(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        return halves | {"model.norm.weight": torch.full((32,), 1e6)}

    folder = written(tmp_path, tiny_model("llama"), change)
    with pytest.raises(PruningError, match=r"model.norm.weight in .* has values that float16, which most weights are"):
        clean_(folder)


def test_configs_that_are_none(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    for load in (load_checkpoint, StreamedDecoder, clean_):
        with pytest.raises(
            PruningError, match=r"config.json is no config of a LlamaForCausalLM \(.*\): fetch it again"
        ):
            load(folder)


def test_which_files_are_the_model(tmp_path: Path) -> None:
    folder = written(tmp_path, tiny_model("llama"), shards=True)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(PruningError, match="no index of shards"):
        load_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(PruningError, match=r"neither model\.safetensors nor"):
        StreamedDecoder(folder)
    # as transformers: a whole file goes before an index that was left behind
    other = tiny_model("llama", seed=5)
    written(folder / "again", other)
    (folder / "again" / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert torch.equal(logits(assert_same_model(folder), random_ids(other)), logits(other, random_ids(other)))


def test_a_head_of_its_own_survives_pruning_under_a_config_that_ties_it(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    source = written(tmp_path / "source", model, with_another_head)
    dense = load_checkpoint(source)
    work, out = tmp_path / "work", tmp_path / "out"
    config = slimgpt.Config(sparsity=0.3)
    prune_checkpoint(source, out, slimgpt, windows(dense), config, options=CPU, work=work)
    pruned = assert_same_model(out)
    assert torch.equal(pruned.lm_head.weight, dense.lm_head.weight)
    assert not torch.equal(pruned.lm_head.weight, pruned.model.embed_tokens.weight)
