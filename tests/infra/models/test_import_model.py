"""Models in: every form they come in gives the same plain checkpoint, and what must not come in is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import SourceInvalid
from infra.models.import_model import describe, import_model, load_tokenizer
from infra.sources.find import Sources
from infra.sources.located import Located
from tests.infra.fake_hub import fake_hub
from tests.infra.sources.test_find import python


@pytest.fixture
def tiny(offline: Sources, tmp_path: Path) -> Path:
    """A copy of the tiny random Llama that a test may break."""
    folder = offline.find("slimline/tiny-random-llama", "model").folder
    assert folder is not None
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def at(folder: Path) -> Located:
    return Located(str(folder), "model", folder, None, "local path")


def shard(folder: Path) -> None:
    """Split the weights over two files with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(4 * tensor.numel() for tensor in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_auto_keeps_the_weights_bit_for_bit(tiny: Path, out: Path) -> None:
    card = import_model(at(tiny), out, "auto")
    assert (out / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert card == describe(at(tiny)) == describe(at(out))
    assert (card.model_type, card.num_layers, card.hidden_size, card.dtype) == ("llama", 4, 64, "float32")
    assert card.num_parameters == sum(tensor.numel() for tensor in weights(tiny).values())


@pytest.mark.parametrize("sharded", [False, True])
def test_cast_is_exact_and_the_config_says_so(tiny: Path, out: Path, sharded: bool) -> None:
    from transformers import AutoModelForCausalLM

    expected = {name: tensor.bfloat16() for name, tensor in weights(tiny).items()}
    edit_config(tiny, torch_dtype="float32", dtype="float32")
    if sharded:
        shard(tiny)
    card = import_model(at(tiny), out, "bfloat16")
    assert card.dtype == "bfloat16"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("bfloat16", False)
    if sharded:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in expected.values())
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"])


def test_progress_ends_at_one(tiny: Path, out: Path) -> None:
    seen: list[float] = []
    shard(tiny)
    import_model(at(tiny), out, "float16", progress=lambda share, message: seen.append(share))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1], len(seen)) == (0.0, 1.0, 3)


def test_tied_embeddings_stay_tied(tiny: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    edit_config(tiny, tie_word_embeddings=True)
    card = import_model(at(tiny), out, "auto")
    assert "lm_head.weight" not in weights(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert card.num_parameters == model.num_parameters()
    # Some checkpoints store the tied head a second time: it counts once, as long as it is the same.
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, tiny / "model.safetensors", {"format": "pt"})
    assert describe(at(tiny)).num_parameters == card.num_parameters
    save_file({**tensors, "lm_head.weight": head}, tiny / "model.safetensors", {"format": "pt"})
    assert describe(at(tiny)).num_parameters == card.num_parameters + head.numel()


def test_a_pruned_checkpoint_keeps_its_files_but_no_other_weights(tiny: Path, out: Path) -> None:
    edit_config(tiny, model_type="slimline_llama", per_layer_config={"1": {"intermediate_size": 80}})
    for name in ("plan.json", "modeling_slimline.py", "training_args.bin", "optimizer.pt", ".hidden", "model.onnx"):
        (tiny / name).write_text("{}")
    assert import_model(at(tiny), out, "auto").model_type == "slimline_llama"
    names = {file.name for file in out.iterdir()}
    assert {"plan.json", "tokenizer.json", "config.json"} <= names
    assert not {"modeling_slimline.py", "training_args.bin", "optimizer.pt", ".hidden", "model.onnx"} & names
    assert json.loads((out / "config.json").read_text())["per_layer_config"] == {"1": {"intermediate_size": 80}}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_tensor_is_named(tiny: Path, out: Path, value: float) -> None:
    edit_weights(tiny, "model.layers.2.mlp.down_proj.weight", value)
    with pytest.raises(
        SourceInvalid, match=r"1 of the 10240 values of model.layers.2.mlp.down_proj.weight are NaN or inf"
    ):
        import_model(at(tiny), out, "auto")


def test_value_too_large_for_float16(tiny: Path, out: Path) -> None:
    edit_weights(tiny, "lm_head.weight", 1e6)
    with pytest.raises(SourceInvalid, match=r"lm_head.weight are NaN or infinite in float16 \(float16 ends at 65504"):
        import_model(at(tiny), out, "float16")


def test_pickled_weights_are_refused(tiny: Path, out: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(SourceInvalid, match=r"only pickled weights \(pytorch_model.bin\)"):
        describe(at(tiny))
    with pytest.raises(SourceInvalid, match=r"only pickled weights \(pytorch_model.bin\)"):
        import_model(at(tiny), out, "auto")


def test_folders_that_are_no_model(tiny: Path, out: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "adapter_model.safetensors")
    with pytest.raises(SourceInvalid, match="LoRA adapter"):
        describe(at(tiny))
    (tiny / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceInvalid, match="holds no weights"):
        describe(at(tiny))
    (tiny / "readme.txt").write_text("x")
    with pytest.raises(SourceInvalid, match=r"readme.txt is no model"):
        describe(at(tiny / "readme.txt"))


def test_incomplete_models(tiny: Path, out: Path) -> None:
    shard(tiny)
    (tiny / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceInvalid, match=r"lacks model-00002-of-00002\.safetensors"):
        describe(at(tiny))
    first = tiny / "model-00001-of-00002.safetensors"
    first.write_bytes(first.read_bytes()[:-100])
    shutil.copy(first, tiny / "model-00002-of-00002.safetensors")
    with pytest.raises(SourceInvalid, match=r"no whole safetensors file \(its size is not what its header says\)"):
        describe(at(tiny))
    (tiny / "config.json").write_text("{")
    with pytest.raises(SourceInvalid, match="is not JSON"):
        import_model(at(tiny), out, "auto")


def test_quantised_models_are_refused(tiny: Path, out: Path) -> None:
    edit_config(tiny, quantization_config={"quant_method": "gptq", "bits": 4})
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(SourceInvalid, match=r"is quantised \(gptq\)"):
        import_model(at(tiny), out, "auto")


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        {"load_in_4bit": False, "load_in_8bit": False},
        # left over in a model that was merged in full precision
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
)
def test_a_quantisation_that_is_none_is_left_out(nothing: object, tiny: Path, out: Path) -> None:
    from pruning.checkpoints.save_load import load_checkpoint

    edit_config(tiny, quantization_config=nothing)
    import_model(at(tiny), out, "auto")
    assert "quantization_config" not in json.loads((out / "config.json").read_bytes())
    assert load_checkpoint(out).num_parameters() == describe(at(tiny)).num_parameters


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("architectures", 1595, "architectures = 1595, and not a list of names"),
        ("architectures", [None], "architectures = .*, and not a list of names"),
        ("max_position_embeddings", "long", "max_position_embeddings = 'long'"),
        ("model_type", [], r"model_type = \[\]"),
    ],
)
def test_config_with_a_value_that_nobody_expects(tiny: Path, name: str, value: object, words: str) -> None:
    edit_config(tiny, **{name: value})
    with pytest.raises(SourceInvalid, match=words):
        describe(at(tiny))


def test_config_that_is_no_decoder(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": config["hidden_size"]}))
    with pytest.raises(SourceInvalid, match="decoder-only"):
        describe(at(tiny))


def test_missing_and_foreign_tokenizers(tiny: Path, out: Path) -> None:
    edit_config(tiny, vocab_size=900)
    with pytest.raises(SourceInvalid, match="has 1000 tokens and the model 900"):
        import_model(at(tiny), out, "auto")
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(SourceInvalid, match="no tokenizer that loads"):
        load_tokenizer(tiny)


def test_gguf_that_is_none(tmp_path: Path) -> None:
    for number, content in enumerate(
        (b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"no gguf at all, but long enough")
    ):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content)
        with pytest.raises(SourceInvalid, match="is no GGUF file that can be read"):
            describe(at(file))
    with pytest.raises(SourceInvalid, match="4 GGUF files"):
        describe(at(tmp_path))


def test_model_from_the_hub(tiny: Path, tmp_path: Path) -> None:
    (tiny / "pytorch_model.bin").write_text("never fetched")
    files = {file.name: file.read_bytes() for file in tiny.iterdir() if not file.name.startswith(".")}
    code = (
        "from infra.settings import load_settings; from infra.sources.find import sources_from\n"
        "from infra.models.import_model import describe; from infra.hub import download_model\n"
        "located = sources_from('hub', load_settings()).find('owner/name', 'model')\n"
        "card = describe(located); print(card.model_type, card.num_layers, card.bytes)\n"
        "print(sorted(p.name for p in download_model(located.repo_id, located.revision).iterdir()))"
    )
    with fake_hub("model", "owner/name", files) as endpoint:
        done = python(code, tmp_path, endpoint)
    expected = sorted(set(files) - {"pytorch_model.bin", "README.md"})
    assert done.stdout.splitlines() == [f"llama 4 {len(files['model.safetensors'])}", str(expected)], done.stderr
    with fake_hub("model", "owner/name", {k: v for k, v in files.items() if k != "model.safetensors"}) as endpoint:
        done = python(code, tmp_path / "other", endpoint)
    assert "pickled ones (.bin, .pt) are refused" in done.stderr


def test_smollm2_header(offline: Sources) -> None:
    card = describe(offline.find("HuggingFaceTB/SmolLM2-135M-Instruct", "model"))
    assert (card.model_type, card.num_layers, card.hidden_size, card.num_parameters) == ("llama", 30, 576, 134515008)


@pytest.mark.slow
def test_smollm2_from_gguf(offline: Sources, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    card = import_model(offline.find("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), out, "float32")
    assert (card.dtype, card.num_parameters) == ("float32", 134515008)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 2
    tokenizer = load_tokenizer(out)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_tokenizer_beside_foreign_code_loads_without_a_question(
    offline: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our uneven checkpoints name a modelling file in auto_map: transformers would ask whether to run it."""
    source = offline.find("slimline/tiny-random-llama", "model").folder
    assert source is not None
    shutil.copytree(source, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    foreign = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    values = json.loads(config.read_bytes()) | {"model_type": "slimline-x", "auto_map": foreign}
    config.write_text(json.dumps(values))
    (tmp_path / "model" / "modeling_x.py").write_text("raise SystemExit('foreign code was run')")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "n")
    assert load_tokenizer(tmp_path / "model").encode("a")
    assert asked == []
