"""Loader by kind of checkpoint: what is exported as a folder, in the hands of others; llama.cpp's column is in
tests/tasks/exporting/test_gguf.py. And that what is small is small: on the disk, in the cache, without zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from pruning.checkpoints.save_load import load_checkpoint
from pruning.errors import PruningError
from pruning.families import shapes
from tasks.exporting.gguf import export_gguf
from tasks.exporting.hf_folder import export_hf_folder
from tests.tasks.exporting.kinds import KINDS, write_checkpoint
from tests.tiny import random_ids

#: whether transformers' own class loads it
STOCK = {"dense": True, "uniform": True, "depth": True, "uneven": False, "halves": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind the exported folder; the checkpoint lies beside it."""
    place = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        write_checkpoint(place / f"{kind}-checkpoint", "llama", kind)
        export_hf_folder(place / f"{kind}-checkpoint", place / kind, {}, ())
    return {kind: place / kind for kind in KINDS}


#: what a program without slimline does with each folder, in a process of its own
CODE = """
import json, sys
sys.modules.update(dict.fromkeys(("pruning", "flows", "tasks", "infra", "evaluation")))  # not to be imported
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([[0, 34, 77, 120, 200, 55]])
found = {}
for kind, folder in json.loads(sys.argv[1]).items():
    trust = {"trust_remote_code": True} if kind in ("uneven", "halves") else {}
    def load(**options):
        return AutoModelForCausalLM.from_pretrained(folder, **trust, **options).eval()
    model = load()
    assert type(model).__module__.startswith("transformers_modules" if trust else "transformers.models"), kind
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        eager = load(attn_implementation="eager")(input_ids=ids).logits
        spread = load(device_map={"": "cpu"})(input_ids=ids).logits
        half = load(dtype=torch.bfloat16)(input_ids=ids).logits
        fused = load(attn_implementation="sdpa")(input_ids=ids).logits
        with torch.compiler.set_stance("force_eager"):  # what transformers compiles of it takes minutes of a compiler
            flexible = load(attn_implementation="flex_attention")(input_ids=ids).logits
        if kind == "uneven":  # captured as one graph, whatever is made of it
            compiled = torch.compile(load(), backend="eager", fullgraph=True)(input_ids=ids).logits
            torch.testing.assert_close(logits, compiled, rtol=1e-4, atol=1e-5)
    for other in (eager, fused, flexible):
        torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, spread), kind
    assert half.dtype == torch.bfloat16 and (half.float() - logits).norm() < 0.1 * logits.norm(), kind
    cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain), kind
    if kind != "halves":  # a static cache is made for the heads of the first layer
        static = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(cached, static), kind
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 0
    found[kind] = logits[0, -1].tolist()
open(sys.argv[2], "w").write(json.dumps(found))
"""


def test_transformers_without_slimline(folders: dict[str, Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    asked = json.dumps({kind: str(folder) for kind, folder in folders.items()})
    child = subprocess.run(
        [sys.executable, "-c", CODE, asked, "found.json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_bytes())
    ids = torch.tensor([[0, 34, 77, 120, 200, 55]])
    for kind, folder in folders.items():
        with torch.no_grad():
            expected = load_checkpoint(folder.with_name(f"{kind}-checkpoint"))(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(torch.tensor(found[kind]), expected, rtol=0, atol=1e-5)


def loaded(folder: Path) -> PreTrainedModel:
    trust = {"trust_remote_code": True} if (folder / "modeling_slimline.py").is_file() else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **trust)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_stock_where_it_can_be(kind: str, folders: dict[str, Path]) -> None:
    """What vLLM, SGLang and TGI ask of a config, in the words of their loaders: a known architecture whose layers are
    equal. None of them is run here."""
    config = json.loads((folders[kind] / "config.json").read_bytes())
    assert (config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama") is STOCK[kind]
    assert ("per_layer_config" in config) is not STOCK[kind]
    assert ("auto_map" in config) is not STOCK[kind]
    assert (config["hidden_size"] % config["num_attention_heads"] == 0) or not STOCK[kind]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    checkpoint, out = folders[kind].with_name(f"{kind}-checkpoint"), folders[kind].with_name(f"{kind}-uniform")
    if STOCK[kind]:
        export_hf_folder(checkpoint, out, {}, (), stock=True)
        assert not list(out.glob("*.py"))
    else:
        with pytest.raises(PruningError, match="prune with `uniform: true`"):
            export_hf_folder(checkpoint, out, {}, (), stock=True)
        assert not out.exists()


@pytest.mark.parametrize("kind", ["uneven", "uniform"])
def test_peft_on_top(kind: str, folders: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = loaded(folders[kind])
    ids = random_ids(model)
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        adapted = tuned(input_ids=ids).logits
        merged = tuned.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


def test_lm_eval_by_hand(folders: dict[str, Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pair = ("The capital of France is", " Paris")
    lm = HFLM(pretrained=str(folders["uneven"]), trust_remote_code=True, device="cpu", dtype="float32")
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    whole, start = lm.tok_encode("".join(pair)), lm.tok_encode(pair[0])
    with torch.no_grad():
        scores = loaded(folders["uneven"])(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(float(scores[place - 1, whole[place]]) for place in range(len(start), len(whole)))
    assert found == pytest.approx(expected, abs=1e-4)


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_what_is_pruned_is_really_smaller(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders[kind])
    head_dim = 4
    (weights,) = folders[kind].glob("*.safetensors")
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert stored == parameters(model)
    assert weights.stat().st_size < 4 * stored + 150 * len(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.numel():
            assert tensor.abs().sum(0).all(), f"a column of {name} is zeros"
            assert tensor.abs().sum(1).all(), f"a row of {name} is zeros"
    ids, cache = random_ids(model, batch=1, length=12), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    kept = [shape.num_kv_heads for shape in shapes(load_checkpoint(folders[kind]))]
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized]
    assert held == [2 * heads * head_dim * 12 for heads in kept if heads]
    export_gguf(folders[kind].with_name(f"{kind}-checkpoint"), tmp_path / "model.gguf", {}, "f32")
    written = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    # a layer without an MLP has a channel of zeros there, and one with nothing at all is not there
    assert abs(written - stored) <= (0 if kind != "halves" else 4 * 3 * 32)
