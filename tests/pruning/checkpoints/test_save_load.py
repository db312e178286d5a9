"""Checkpoints: equal logits after reload, here and in a process that has never heard of slimline."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from pruning.checkpoints.load_check import check_pruned
from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import family_of, shapes
from pruning.plan import PruningPlan
from tests.pruning.checkpoints.test_surgery import SLIDING, generate, logits, plan_for
from tests.tiny import FAMILIES, LATER_FAMILIES, ROPE_TYPES, random_ids, rope_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`


def shrunk(name: str, *, seed: int = 0, drop: int = 1, **config: object) -> tuple[PreTrainedModel, PruningPlan]:
    model = tiny_model(name, **config)
    plan = plan_for(model, seed=seed, drop=drop)
    shrink_(model, plan)
    return model, plan


@pytest.mark.parametrize("name", FAMILIES)
def test_reloaded_model_is_the_same(name: str, tmp_path: Path) -> None:
    model, plan = shrunk(name, **SLIDING.get(name, {}))
    save_checkpoint(model, tiny_tokenizer(), tmp_path, plan)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert shapes(loaded) == plan.shapes
    assert load_plan(tmp_path) == plan
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(generate(loaded), generate(model))
    assert torch.equal(generate(loaded, use_cache=False), generate(model))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
def test_rotary_tables_of_layers_with_uneven_heads(name: str, rope_type: str, tmp_path: Path) -> None:
    model = rope_model(name, rope_type)
    # longer than anything the model has seen: dynamic tables remember the longest
    source, ids = tmp_path / "source", random_ids(model, length=26)
    save_checkpoint(model, None, source)
    plan = plan_for(model, seed=3)
    masked = copy.deepcopy(model)
    mask_(masked, plan)
    shrink_(model, plan)
    assert len({shape.num_heads for shape in shapes(model)}) > 1
    save_checkpoint(model, None, tmp_path / "out", plan)
    check_pruned(tmp_path / "out", source, plan)
    loaded = load_checkpoint(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        torch.testing.assert_close(loaded(ids).logits, masked(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(loaded), generate(model))
    # libraries ask the config as a whole: then the answer is the largest, as for a cache that must hold every layer
    assert loaded.config.num_attention_heads == max(shape.num_heads for shape in shapes(model))
    assert loaded.config.head_dim == plan.head_dim


def test_a_loaded_model_can_be_pruned_and_saved_again(tmp_path: Path) -> None:
    model, first = shrunk("qwen3", seed=1, drop=0)
    save_checkpoint(model, None, tmp_path / "one")
    loaded = load_checkpoint(tmp_path / "one")
    then = plan_for(loaded, seed=2)
    shrink_(loaded, then)
    save_checkpoint(loaded, None, tmp_path / "two")
    again = load_checkpoint(tmp_path / "two")
    once = tiny_model("qwen3")
    shrink_(once, first.compose(then))
    assert torch.equal(logits(again), logits(once))


def test_uniform_and_dense_models_are_plain_checkpoints(tmp_path: Path) -> None:
    model = tiny_model("llama")
    full = PruningPlan.full(shapes(model), 4)
    narrow = tuple(layer.model_copy(update={"kept_channels": tuple(range(16))}) for layer in full.layers[1:])
    shrink_(model, PruningPlan(source=full.source, head_dim=4, layers=narrow))
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["intermediate_size"], config["num_hidden_layers"]) == (16, 2)
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "opt"])
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    model, _ = shrunk(name, tie_word_embeddings=True)
    save_checkpoint(model, None, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


FRESH = """
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class NoSlimline(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pruning", "evaluation", "infra", "tasks", "flows"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoSlimline())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    expected = torch.load(folder / "expected.pt")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    width = "ffn_dim" if config.model_type == "slimline-opt" else "intermediate_size"
    assert [getattr(layer, width) for layer in config.per_layer_config] == expected["widths"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-5, rtol=0)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(expected["ids"], **options)
    assert torch.equal(cached, model.generate(expected["ids"], use_cache=False, **options))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=1e-4, rtol=0)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert type(again).__name__ == type(model).__name__
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False)("a").input_ids
"""


def test_a_fresh_process_without_slimline_loads_every_family(tmp_path: Path) -> None:
    models = {name: shrunk(name, **SLIDING.get(name, {})) for name in (*FAMILIES, *LATER_FAMILIES)}
    for rope_type in ROPE_TYPES[1:]:
        model = rope_model("llama", rope_type)
        plan = plan_for(model)
        shrink_(model, plan)
        models[rope_type] = model, plan
    for name, (model, plan) in models.items():
        save_checkpoint(model, tiny_tokenizer(), tmp_path / name)
        ids = random_ids(model)
        widths = [shape.intermediate_size for shape in plan.shapes]
        torch.save({"ids": ids, "logits": logits(model), "widths": widths}, tmp_path / name / "expected.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-P", "-c", FRESH, *(str(tmp_path / name) for name in models)],
        cwd=elsewhere,
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )


def test_code_in_a_folder_is_never_executed(tmp_path: Path) -> None:
    model, _ = shrunk("mistral")
    save_checkpoint(model, None, tmp_path)
    (tmp_path / "modeling_slimline.py").write_text("raise SystemExit('executed')")
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))


def test_tokenizer_loads_without_trust(tmp_path: Path) -> None:
    model, _ = shrunk("llama")
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert tokenizer("What is it?").input_ids == tiny_tokenizer()("What is it?").input_ids
    assert tokenizer.eos_token_id == 1


def test_big_models_are_sharded(tmp_path: Path) -> None:
    model, _ = shrunk("qwen2")
    save_checkpoint(model, None, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_checkpoint(tmp_path)), logits(model))


def test_dtype_and_device(tmp_path: Path) -> None:
    model, _ = shrunk("llama")
    save_checkpoint(model.to(torch.bfloat16), None, tmp_path)
    assert load_checkpoint(tmp_path).dtype == torch.bfloat16
    assert load_checkpoint(tmp_path, dtype=torch.float32, device="cpu").dtype == torch.float32
    assert load_checkpoint(tmp_path, dtype="float16", device_map={"": "cpu"}).dtype == torch.float16
    with pytest.raises(PruningError, match="not both"):
        load_checkpoint(tmp_path, device="cpu", device_map="auto")


def test_a_published_generation_config_with_contradictions_is_kept(tmp_path: Path) -> None:
    """LLaMA and Vicuna come with temperature but no do_sample; transformers writes that only if it was so loaded."""
    save_checkpoint(tiny_model("llama"), None, tmp_path / "dense")
    published = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(published))
    model = load_checkpoint(tmp_path / "dense")
    shrink_(model, plan_for(model))
    save_checkpoint(model, None, tmp_path / "pruned")
    assert load_checkpoint(tmp_path / "pruned").generation_config.temperature == 0.9


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"no config.json"):
        load_checkpoint(tmp_path)
    model, _ = shrunk("llama")
    save_checkpoint(model, None, tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(PruningError, match="cannot load the weights"):
        load_checkpoint(tmp_path)
    missing = {key: value for key, value in tensors.items() if key != "model.norm.weight"}
    save_file(missing, weights, metadata={"format": "pt"})
    with pytest.raises(PruningError, match=r"model\.norm\.weight"):
        load_checkpoint(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, weights, metadata={"format": "pt"})
    with pytest.raises(PruningError):
        load_checkpoint(tmp_path)
    weights.unlink()
    with pytest.raises(PruningError, match="no weights"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(PruningError, match=r"pickled weights \(pytorch_model.bin\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PruningError, match=r"'gpt2'.*supported: "):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PruningError, match="not a model config"):
        load_checkpoint(tmp_path)


def test_the_trainer_takes_a_loaded_uneven_model(tmp_path: Path) -> None:
    model, _ = shrunk("qwen2")
    save_checkpoint(model, None, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(loaded, batch=4)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    before = logits(loaded)
    trainer = Trainer(loaded, arguments, train_dataset=rows)
    trainer.train()
    trained = load_checkpoint(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(trained), logits(loaded.eval()))
    assert not torch.equal(logits(trained), before)
    assert family_of(trained).name == "qwen2"


def test_progress_bars_are_left_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    enabled = transformers_logging.is_progress_bar_enabled()
    save_checkpoint(tiny_model("llama"), None, tmp_path)
    load_checkpoint(tmp_path)
    assert transformers_logging.is_progress_bar_enabled() == enabled
    assert capfd.readouterr().out == ""
