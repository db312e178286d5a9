"""What is saved is loaded once before it counts as made, at little cost: whatever is wrong with it is found then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pruning.checkpoints.load_check import check_pruned, check_saved
from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError, UnsoundCheckpoint
from pruning.families import shapes
from pruning.layerwise import streaming
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.plan import PruningPlan
from tests.pruning.captured import CPU, in_bfloat16, windows
from tests.pruning.checkpoints.test_surgery import plan_for
from tests.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

Break = Callable[[Path], None]


def shrunk_twin(model: PreTrainedModel, folder: Path, **options: Any) -> tuple[Path, Path, PruningPlan]:
    """The model in one folder, cut to a random plan in another."""
    source, out = folder / "source", folder / "out"
    save_checkpoint(model, None, source)
    plan = plan_for(model, **options)
    shrink_(model, plan)
    save_checkpoint(model, None, out, plan)
    return source, out, plan


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_checkpoint_passes(name: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    for bfloat16, drop in ((False, 1), (True, 0)):
        model = tiny_model(name, layers=2, tie_word_embeddings=tied)
        source, out, plan = shrunk_twin(in_bfloat16(model) if bfloat16 else model, tmp_path / str(drop), drop=drop)
        check_pruned(out, source, plan)
        check_saved(out, load_checkpoint(out))
    assert caplog.messages == []


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def in_file(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})

    return in_file


def drop(name: str) -> Break:
    def from_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return from_file


def configure(**values: Any) -> Break:
    def in_config(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return in_config


def swap_layers(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = {name: name.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.") for name in tensors}
    save_file({names[name]: value for name, value in tensors.items()}, file, metadata={"format": "pt"})


FAULTS: dict[str, Break] = {
    "a lost head": drop("lm_head.weight"),
    "another head": edit("lm_head.weight", lambda weight: weight.flip(0)),
    "a head that is tied": configure(tie_word_embeddings=True, vocab_size=320),
    "a norm": edit("model.layers.1.input_layernorm.weight", lambda weight: weight + 0.05),
    "NaN": edit("model.norm.weight", lambda weight: weight * float("nan")),
    "rows of another head": edit("model.layers.0.self_attn.q_proj.weight", lambda weight: weight.roll(4, 0)),
    "another rotary base": configure(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "an unknown rotary type": configure(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    "another norm": configure(rms_norm_eps=0.1),
    "another activation": configure(hidden_act="gelu"),
    "a config that is cut off": lambda folder: (folder / "config.json").write_text("{"),
    "layers in another order": swap_layers,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_model("llama", layers=2)
    save_checkpoint(model, None, source)
    full = PruningPlan.full(shapes(model), 4)
    narrow = tuple(layer.model_copy(update={"kept_channels": tuple(range(16))}) for layer in full.layers)
    plan = PruningPlan(source=full.source, head_dim=4, layers=narrow)
    shrink_(model, plan)
    save_checkpoint(model, None, out, plan)
    check_pruned(out, source, plan)
    FAULTS[fault](out)
    with pytest.raises(
        UnsoundCheckpoint, match=r"just written to .*out (does not load|is not clean|gives other logits)"
    ):
        check_pruned(out, source, plan)
    with pytest.raises(
        UnsoundCheckpoint, match=r"just written to .*out (does not load|is not clean|gives other logits)"
    ):
        check_saved(out, model)


def test_training_that_diverged_is_the_user_s_affair(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    save_checkpoint(model, None, tmp_path)
    with pytest.raises(PruningError, match="training has diverged: lower learning_rate"):
        check_saved(tmp_path, model.train())
    assert model.training


def test_nothing_is_made_of_a_checkpoint_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    save_checkpoint(tiny_model("llama"), None, source)
    whole = streaming.assemble_checkpoint
    reported: list[str] = []

    def careless(decoder: Any, layer_files: list[Path], plan: PruningPlan, out: Path) -> None:
        whole(decoder, layer_files, plan, out)
        configure(rope_parameters={"rope_type": "default", "rope_theta": 1e6})(out)

    def prune() -> None:
        reported.clear()
        prune_checkpoint(
            source,
            tmp_path / "out",
            slimgpt,
            windows(load_checkpoint(source)),
            slimgpt.Config(sparsity=0.3),
            options=CPU,
            work=tmp_path / "work",
            progress=lambda share, message: reported.append(message),
        )

    monkeypatch.setattr(streaming, "assemble_checkpoint", careless)
    with pytest.raises(UnsoundCheckpoint):
        prune()
    assert any("layer 1 of" in message for message in reported)
    # what was pruned is not lost: it is only put together again
    monkeypatch.setattr(streaming, "assemble_checkpoint", whole)
    prune()
    assert not any("layer 1 of" in message for message in reported)
    assert load_plan(tmp_path / "out") is not None


MEASURE = """
import sys
from pathlib import Path
from pruning.checkpoints.save_load import load_plan
from pruning.checkpoints.load_check import check_pruned
from tests.bench.stream_child import high_water_gib

warm, source, out = map(Path, sys.argv[1:])
check_pruned(warm, warm, load_plan(warm))
before = high_water_gib()
check_pruned(out, source, load_plan(out))
print((high_water_gib() - before) * 2**10)
"""


def test_the_check_holds_no_model(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    plan = PruningPlan.full(shapes(model), 4)
    save_checkpoint(model, None, tmp_path / "warm", plan)
    large = tiny_model("llama", layers=24, hidden=512, heads=8, kv_heads=8, intermediate=1536)
    layer_mib = sum(weight.numel() for weight in large.model.layers[0].parameters()) * 4 / 2**20
    assert 24 * layer_mib > layer_mib + 200
    source, out, _ = shrunk_twin(large, tmp_path, drop=0)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "warm", source, out], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < layer_mib + 100
