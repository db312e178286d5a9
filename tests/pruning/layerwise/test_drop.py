"""Dropped layers: a stock model of fewer layers; dropped attentions and MLPs; linear stand-ins."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.families import family_of, shapes
from pruning.layerwise.stand_ins import fit_stand_ins
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import flap, llm_pruner, magnitude, shortened, slimgpt
from pruning.orders import Orders
from pruning.ranking import depth
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, logits, prune_copy, windows
from tests.tiny import FAMILIES, random_ids, tiny_model

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids, trusted = torch.tensor(json.loads(sys.argv[1])), sys.argv[2] == "trusted"
found = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
    found[folder] = [type(model).__name__, model(ids).logits[0, -1].tolist()]
assert not any(name.startswith("pruning") for name in sys.modules)
print(json.dumps(found))
"""


def streamed(model: PreTrainedModel, folder: Path, **config: Any) -> tuple[PreTrainedModel, Pruned]:
    source = folder / "source"
    save_checkpoint(model, None, source)
    pruned = prune_checkpoint(
        source, folder / "out", shortened, windows(model), shortened.Config(**config), options=CPU, work=folder / "work"
    )
    return load_checkpoint(folder / "out"), pruned


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_are_a_stock_model(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, layers=4)
    loaded, pruned = streamed(dense, tmp_path, layers=2)
    assert type(loaded) is type(dense)
    assert len(pruned.plan.dropped_layers) == 2
    assert load_plan(tmp_path / "out") == pruned.plan
    masked = copy.deepcopy(dense)
    mask_(masked, pruned.plan)
    ids = random_ids(dense)
    torch.testing.assert_close(logits(loaded, ids), logits(masked, ids), atol=1e-5, rtol=1e-5)
    gone = [(report.layer, report.sub_layer) for report in pruned.layers if report.kept == 0]
    assert gone == [(layer, kind) for layer in pruned.plan.dropped_layers for kind in ("attention", "mlp")]
    assert all(report.score is not None for report in pruned.layers if report.kept == 0)


def fresh(ids: torch.Tensor, word: str, folders: list[Path], elsewhere: Path) -> dict[str, tuple[str, list[float]]]:
    """Class and logits of checkpoints in a process that does not have this project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, json.dumps(ids.tolist()), word, *map(str, folders)],
        capture_output=True, text=True, cwd=elsewhere,
        env=environment | {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_of_ours(tmp_path: Path) -> None:
    dense = tiny_model("llama", layers=4)
    loaded, _ = streamed(dense, tmp_path, sparsity=0.5)
    ids = random_ids(dense)
    ((name, found),) = fresh(ids, "untrusted", [tmp_path / "out"], tmp_path).values()
    assert name == "LlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(found), logits(loaded, ids)[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_is_no_stock_model_brings_its_class(tmp_path: Path) -> None:
    """Attentions that are gone, and biases that the stock class does not know."""
    expected, ids = {}, random_ids(tiny_model("llama"))
    for family in ("llama", "qwen3", "opt"):
        streamed(tiny_model(family, layers=4), tmp_path / family, layers=3, unit="sub_layer", criterion="influence")
        masked, pruned = prune_copy(tiny_model(family), flap.Config(sparsity=0.3), method=flap)
        shrink_(masked, pruned.plan)
        save_checkpoint(masked, None, tmp_path / family / "biased")
        for name in ("out", "biased"):
            expected[str(tmp_path / family / name)] = logits(load_checkpoint(tmp_path / family / name), ids)[0, -1]
    found = fresh(ids, "trusted", [Path(folder) for folder in expected], tmp_path)
    for folder, (name, last) in found.items():
        assert name.startswith("Slimline")
        torch.testing.assert_close(torch.tensor(last), expected[folder], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "phi3", "olmo2"])
def test_attention_and_mlp_apart(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family, layers=4)
    loaded, pruned = streamed(dense, tmp_path, layers=3, unit="sub_layer", criterion="influence")
    widths = shapes(loaded)
    dropped = sum(width.num_heads == 0 for width in widths) + sum(width.intermediate_size == 0 for width in widths)
    assert dropped + 2 * len(pruned.plan.dropped_layers) == 3
    assert widths[0].num_heads
    masked = copy.deepcopy(dense)
    mask_(masked, pruned.plan)
    if family in ("phi", "phi-mha", "opt"):  # with an output linear its bias goes
        for report in pruned.layers:
            if report.kept == 0:
                dict(masked.named_modules())[report.name].bias.data.zero_()
    ids = random_ids(dense)
    torch.testing.assert_close(logits(loaded, ids), logits(masked, ids), atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (loaded.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_depth_then_width(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without some sub-layers is pruned on, and the plans are one plan."""
    dense = tiny_model("llama", layers=4)
    block = depth.Block(2, (kind,))
    monkeypatch.setattr(depth, "_score", lambda job, ranking, blocks, *_: {b: float(b != block) for b in blocks})
    first, one = streamed(dense, tmp_path, layers=1, unit="sub_layer", iterative=False)
    assert (shapes(first)[2].num_heads == 0) == (kind == "attention")
    second = prune_checkpoint(
        tmp_path / "out", tmp_path / "smaller", slimgpt, windows(dense), slimgpt.Config(sparsity=0.3),
        options=CPU, work=tmp_path / "work2",
    )  # fmt: skip
    assert second.split_kl, "a layer without heads must not make the others look ungrouped"
    plan = load_plan(tmp_path / "smaller")
    assert plan == one.plan.compose(second.plan)
    small = load_checkpoint(tmp_path / "smaller")
    assert shapes(small) == plan.shapes
    cut = copy.deepcopy(first)
    shrink_(cut, second.plan)  # without compensation, but of the same shape
    assert shapes(cut) == shapes(small)
    assert logits(small, random_ids(dense)).isfinite().all()
    for method, options in ((flap, {}), (llm_pruner, {"protect_first": 0, "protect_last": 0}), (magnitude, {})):
        masked, pruned = prune_copy(first, method.Config(sparsity=0.3, **options), method=method)
        shrunk = copy.deepcopy(masked)
        shrink_(shrunk, pruned.plan)
        torch.testing.assert_close(logits(shrunk, random_ids(dense)), logits(masked, random_ids(dense)))


def brute_force_order(dense: PreTrainedModel, calibration: CalibrationSet) -> list[int]:
    """The layer without which the loss is lowest, again and again."""
    ids_NL, order = calibration.input_ids_NL[:10, :128], []
    while len(order) < len(family_of(dense).layers(dense)) - 1:
        losses = {}
        for index in range(len(family_of(dense).layers(dense))):
            if index in order:
                continue
            model = copy.deepcopy(dense)
            for gone in (*order, index):
                for linear in (family_of(model).o_proj, family_of(model).down_proj):
                    linear(family_of(model).layers(model)[gone]).weight.data.zero_()
            with torch.no_grad():
                losses[index] = float(model(ids_NL, labels=ids_NL).loss)
        order.append(min(losses, key=losses.__getitem__))
    return order


def test_measured_anew_after_each_removal_and_resumed(tmp_path: Path) -> None:
    dense = tiny_model("llama", layers=5)
    decoder, calibration = ResidentDecoder(dense), windows(dense)
    expected = brute_force_order(dense, calibration)
    whole = tmp_path / "whole"
    whole.mkdir()
    shortened.order(decoder, shortened.OrderConfig(), whole, calibration=calibration, options=CPU, work=tmp_path)
    found = Orders(whole).load("model.layers", "layer")
    assert list(found.order) == expected
    saved = json.loads((tmp_path / "removals.json").read_bytes())
    (tmp_path / "removals.json").write_text(json.dumps(saved[:2]))  # killed after two
    calls: list[str] = []
    shortened.order(
        decoder, shortened.OrderConfig(), whole, calibration=calibration, options=CPU, work=tmp_path,
        progress=lambda share, message: calls.append(message),
    )  # fmt: skip
    assert Orders(whole).load("model.layers", "layer") == found
    assert calls[0] == "removal 3 of 4"


@pytest.mark.parametrize("criterion", ["ppl", "taylor", "magnitude", "influence"])
def test_once_for_all_and_protected_ends(criterion: Any) -> None:
    dense = tiny_model("llama", layers=5)
    config = shortened.Config(layers=2, criterion=criterion, iterative=False, protect_first=1, protect_last=1)
    _, pruned = prune_copy(dense, config, method=shortened)
    assert len(pruned.plan.dropped_layers) == 2
    assert set(pruned.plan.dropped_layers) <= {1, 2, 3}
    scores = {report.layer: report.score for report in pruned.layers if report.score is not None}
    if criterion == "magnitude":
        for layer, score in scores.items():
            linears = family_of(dense).linears(family_of(dense).layers(dense)[layer]).values()
            assert score == pytest.approx(sum(float(each.weight.abs().sum()) for each in linears), rel=1e-5)
    if criterion == "taylor":
        ids_NL = windows(dense).input_ids_NL[:10, :128]
        dense(ids_NL, labels=ids_NL).loss.backward()
        for layer, score in scores.items():
            linears = family_of(dense).linears(family_of(dense).layers(dense)[layer]).values()
            expected = sum(float((each.weight * each.weight.grad).abs().sum()) for each in linears)  # type: ignore[operator]
            assert score == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
def test_a_stand_in_is_the_ridge_fit_of_what_the_run_did(family: str) -> None:
    dense = tiny_model(family, layers=5)
    calibration = windows(dense, num_samples=12)
    ridge = 1e-3
    found = fit_stand_ins(ResidentDecoder(dense), calibration, {2, 3}, ridge, replace(CPU, activation_budget_bytes=0))
    assert list(found) == [1]
    linear = family_of(dense).down_proj(family_of(dense).layers(dense)[1])
    seen: dict[str, torch.Tensor] = {}
    handle = linear.register_forward_pre_hook(lambda _m, args: seen.__setitem__("inputs", args[0].detach()))
    with torch.no_grad():
        states = dense(calibration.input_ids_NL, output_hidden_states=True).hidden_states
        given = linear(seen["inputs"].reshape(*states[0].shape[:2], -1))
    handle.remove()
    X_TI = seen["inputs"].flatten(0, -2).double()
    joined = states[2] - given  # the stream that the output of layer 1's MLP joins
    Y_TO = (states[4] - joined).flatten(0, -2).double() - (0 if linear.bias is None else linear.bias.double())
    H_II = X_TI.T @ X_TI / len(X_TI)
    damp = ridge * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=torch.float64)
    W_OI = linear.weight.detach().double()
    expected = W_OI + (Y_TO.T @ X_TI / len(X_TI) - W_OI @ H_II) @ torch.linalg.inv(H_II + damp)
    torch.testing.assert_close(found[1].weight_OI, expected, rtol=1e-2, atol=1e-2)
    error = (Y_TO - X_TI @ expected.T).square().sum(1).mean()
    assert found[1].report.measured_error == pytest.approx(float(error), rel=1e-2)


def test_stand_ins_are_merged_and_bad_ones_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_model("llama", layers=5)
    plain, one = streamed(dense, tmp_path / "plain", layers=2)
    merged, other = streamed(dense, tmp_path / "merged", layers=2, merge="linear", ridge=0.1)
    assert one.plan == other.plan
    assert type(merged) is type(plain)
    hosts = {report.layer for report in other.layers if report.measured_error and report.kept}
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    kept = [layer.layer for layer in other.plan.layers]
    assert changed == {f"model.layers.{kept.index(host)}.mlp.down_proj.weight" for host in hosts}
    with caplog.at_level(logging.WARNING, logger="slimline"):
        few = windows(dense, num_samples=1, seq_len=8)
        found = fit_stand_ins(ResidentDecoder(dense), few, {0, 2}, 1e-6, CPU)
    assert found == {}
    assert "no stand-in for the dropped layers at the start" in caplog.text
    assert "no stand-in for layers 2 to 2: on the held-out windows it is worse than none; raise ridge" in caplog.text
    assert list(fit_stand_ins(ResidentDecoder(dense), few, {0, 2}, 10.0, CPU)) == [1]


def test_the_decoder_is_read_layer_by_layer(tmp_path: Path) -> None:
    """Dropped layers are not even read."""
    dense = tiny_model("llama", layers=4)
    save_checkpoint(dense, None, tmp_path)
    decoder, read = StreamedDecoder(tmp_path), []
    layer = decoder.layer

    def noted(index: int, device: torch.device) -> torch.nn.Module:
        read.append(index)
        return layer(index, device)

    decoder.layer = noted  # type: ignore[method-assign]
    from pruning.layerwise.drop import drop_blocks
    from pruning.walk.state import MemoryWalkState

    drop_blocks(decoder, {(1, "attention"): 0.5, (1, "mlp"): 0.5}, {}, options=CPU, walk_state=MemoryWalkState())
    assert read == [0, 2, 3]
