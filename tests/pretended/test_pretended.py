"""What runs on a device runs without mixing it with the CPU, comes to the same, and moves no more than it must."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from evaluation.inference.options import EvalOptions
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.protocol import WindowProtocol
from pruning.activations.activations import MemoryActivations
from pruning.activations.pinned import PinnedActivations
from pruning.activations.tiers import ActivationStore
from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.save_load import save_checkpoint
from pruning.errors import memory_part
from pruning.gradients.backward import walk_backwards
from pruning.layerwise import prune as layerwise
from pruning.methods import slimgpt
from pruning.statistics import hessian
from pruning.statistics.hessian import HessianAccumulator
from pruning.walk import durable_state, sequential
from pruning.walk.options import WalkOptions
from pruning.walk.sequential import walk_layers
from tests.pretended.counts import counted
from tests.pretended.device import PretendedTensor, pretended
from tests.pretended.transfers import PLACES, layer_transfers
from tests.pruning.captured import CPU, prune_copy, windows
from tests.scenarios.test_methods_contract import run
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

_ALONE = "PRETENDED_ALONE"
#: autograd counts the devices when it first runs, and in this process another test may have let it
IN_A_PROCESS_OF_ITS_OWN = pytest.mark.skipif(
    _ALONE not in os.environ, reason="run by test_what_needs_autograd_in_a_process_of_its_own"
)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as there:
        yield there


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def on(device: torch.device, place: str) -> WalkOptions:
    device_budget, host_budget = PLACES[place]
    return replace(CPU, device=device, device_budget_bytes=device_budget, activation_budget_bytes=host_budget)


def test_its_tensors_do_not_mix_with_the_cpus_and_what_moves_is_counted(device: torch.device) -> None:
    here = torch.arange(12.0).reshape(3, 4)
    with counted() as counts:
        there = here.to(device)
        assert isinstance(there, PretendedTensor)
        with pytest.raises(RuntimeError, match=r"on the same device, but found pretended:0 and cpu \(of add\)"):
            there + here
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.mm(torch.zeros(2, 3), there)
        there[1].mul_(2)  # through a view
        there += torch.zeros(3, 4, device=device) + torch.tensor(1.0)
        assert (counts.to_device, counts.from_device) == (48, 0)
        assert torch.equal(there.cpu(), here * torch.tensor([[1.0], [2.0], [1.0]]) + 1)
        assert (counts.to_device, counts.from_device, counts.synchronisations) == (48, 48, 2)
        assert float(there[0, 3]) == 4.0
        assert (there > 20).nonzero().tolist() == [[1, 3 - 3 + c] for c in range(4) if float(2 * here[1, c] + 1) > 20]
    assert counts.waits["nonzero"] == 1
    assert counts.waits["_local_scalar_dense"] == 1


@IN_A_PROCESS_OF_ITS_OWN
def test_gradients_flow(device: torch.device) -> None:
    here = torch.nn.Linear(4, 2)
    there, x_34 = copy.deepcopy(here).to(device), torch.randn(3, 4)
    here(x_34).square().sum().backward()
    there(x_34.to(device)).square().sum().backward()
    assert here.weight.grad is not None
    assert there.weight.grad is not None
    assert torch.equal(there.weight.grad.cpu(), here.weight.grad)


@pytest.mark.parametrize(
    ("family", "place"),
    [*(("llama", place) for place in PLACES), ("phi", "host"), ("olmo2", "files"), ("gemma2", "host")],
)
def test_a_walk_gives_the_same_hessians_wherever_activations_lie(family: str, place: str, device: torch.device) -> None:
    model = tiny_model(family)
    ids_NL = random_ids(model, 7, 12)
    here = walk_layers(ResidentDecoder(model), ids_NL, CPU, num_heldout=2)
    there = walk_layers(ResidentDecoder(model), ids_NL, on(device, place), num_heldout=2)
    for one, other in zip(here, there, strict=True):
        for mine, theirs in ((one.statistic, other.statistic), (one.heldout, other.heldout)):
            assert isinstance(theirs.matrix_II, PretendedTensor)
            torch.testing.assert_close(theirs.matrix_II.cpu(), mine.matrix_II, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            one.linear.weight[:, :8] = 0
            other.linear.weight[:, :8] = 0


def test_a_layer_moves_two_streams_each_way_when_nothing_fits_and_none_when_all_does(model: PreTrainedModel) -> None:
    ids_NL = random_ids(model, 7, 12)
    scalars = 64  # whether a Hessian is finite, and the like
    for place in PLACES:
        moved = layer_transfers(model, ids_NL, place, batch_size=3)
        if place == "device":
            assert moved.to_device == 0
            assert 0 <= moved.from_device <= scalars
        else:
            assert moved.to_device == 2 * moved.stream + moved.kept
            assert 0 <= moved.from_device - (2 * moved.stream + moved.kept) <= scalars
        if place != "files":
            assert moved.blocking == 0, "beside what is computed"


def test_batches_that_are_asked_for_ahead_are_copied_once(device: torch.device) -> None:
    values = torch.randn(7, 4, 6)
    with ActivationStore(None, device=device) as store, counted() as counts:
        room = store.allocate(7, (4, 6), torch.float32)
        assert isinstance(room, PinnedActivations)
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            room.put(start, values[start:stop].to(device))
        before = counts.to_device
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            assert torch.equal(room.get(start, stop).cpu(), values[start:stop])
        assert counts.to_device - before == values.numel() * 4
        room.get(0, 3)  # and with it the next, which is then overwritten
        room.put(3, values[:3].to(device))
        assert torch.equal(room.get(3, 6).cpu(), values[:3])
        assert torch.equal(room.on_host(6, 7), values[6:])
        room.drop(6)
        with pytest.raises(KeyError):
            room.get(6, 7)


@pytest.mark.parametrize(("free", "fits"), [(2**34, True), (10_000, False)])
def test_the_default_budget_is_what_is_free_less_what_the_walk_needs(
    free: int, fits: bool, model: PreTrainedModel
) -> None:
    with pretended(free) as device, WalkOptions(device).walk_store(ResidentDecoder(model), 12) as store:
        assert isinstance(store.allocate(1, (12, 32), torch.float32), MemoryActivations) == fits


@pytest.mark.parametrize(
    "method",
    ["slimgpt", "flap", pytest.param("llm_pruner", marks=IN_A_PROCESS_OF_ITS_OWN), "magnitude", "shortened"],
)
def test_a_method_removes_the_same(method: str, device: torch.device, model: PreTrainedModel, tmp_path: Any) -> None:
    calibration, plans = windows(model), []
    for options in (CPU, on(device, "host")):
        folder = tmp_path / options.device.type
        folder.mkdir()
        masked, pruned = run(method, model, calibration, folder, options)
        plans.append(pruned.plan)
        assert {type(parameter.data) for parameter in masked.parameters()} == {torch.Tensor}
    assert plans[0] == plans[1]


@IN_A_PROCESS_OF_ITS_OWN
def test_gradients_layer_by_layer_are_the_same(device: torch.device, model: PreTrainedModel) -> None:
    ids_NL = random_ids(model, 5, 12)
    here = walk_backwards(ResidentDecoder(model), ids_NL, CPU)
    there = walk_backwards(ResidentDecoder(model), ids_NL, on(device, "host"))
    for one, other in zip(here, there, strict=True):
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(other.gradients[name].cpu(), gradient, atol=1e-5, rtol=1e-4)


def test_perplexity_is_the_same(device: torch.device, model: PreTrainedModel) -> None:
    texts, protocol = [f"The quick brown fox number {i} jumps." for i in range(8)], WindowProtocol(window=16)
    there = copy.deepcopy(model).to(device)
    one, other = (
        perplexity(each, tiny_tokenizer(), texts, protocol, EvalOptions(batch_size=3)) for each in (model, there)
    )
    assert other.ppl == pytest.approx(one.ppl, rel=1e-5)


def test_generation_with_a_cache_is_the_same(device: torch.device, model: PreTrainedModel) -> None:
    ids_BL = random_ids(model, 2, 8)
    there = copy.deepcopy(model).to(device)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids_BL, **settings)
    assert torch.equal(there.generate(ids_BL.to(device), **settings).cpu(), expected)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hessians_of_half_precision_inputs_are_those_of_float64(
    dtype: torch.dtype, halves: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large inputs, which float16 sums could not hold; several blocks; nothing is made float32 but the sums."""
    monkeypatch.setattr(hessian, "_multiplies_halves", lambda device: halves)
    monkeypatch.setattr(hessian, "_DEVICE_BLOCK", 10)
    X_TI = (300 * torch.randn(200, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    accumulator = HessianAccumulator(24, device)
    with counted() as counts:
        for batch_BI in X_TI.to(device).split(80):
            accumulator.add(batch_BI)
    assert counts.to_device == X_TI.numel() * 2
    found_II = accumulator.finish("x").matrix_II.cpu().double()
    expected_II = X_TI.double().T @ X_TI.double() / 200
    torch.testing.assert_close(found_II, expected_II, atol=1e-6 * float(expected_II.max()), rtol=1e-5)


def test_a_layer_is_read_while_the_one_before_is_computed_with(
    device: torch.device, model: PreTrainedModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(model, None, tmp_path)
    decoder, threads = StreamedDecoder(tmp_path), []
    read = decoder._stored.read

    def noted(names: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return read(names)

    object.__setattr__(decoder._stored, "read", noted)
    for index in (0, 1, 2, 1, 0):  # what comes out of turn is read at once
        layer = decoder.layer(index, device)
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight.cpu(), model.model.layers[index].state_dict()[name])
    decoder._ahead[1].result()
    decoder.layer(0, CPU.device)
    assert threads == [True, False, False, True, True, False, True]
    assert not decoder._ahead


def test_hessians_of_a_batch_need_no_wait(device: torch.device) -> None:
    accumulator = HessianAccumulator(6, device)
    with counted() as counts:
        accumulator.add(torch.zeros(3, 4, 6, device=device))
    assert (counts.synchronisations, counts.to_device, counts.from_device) == (0, 0, 0)


def test_without_room_to_solve_it_is_solved_on_the_host(
    device: torch.device, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = layerwise.prepare
    seen: list[str] = []

    def prepare(system: Any) -> Any:
        seen.append(system.W_OI.device.type)
        if system.W_OI.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(system)

    config = slimgpt.Config(sparsity=0.3, split="equal")
    _, expected = prune_copy(model, config)
    monkeypatch.setattr(layerwise, "prepare", prepare)
    _, pruned = prune_copy(model, config, options=on(device, "host"))
    assert pruned.plan == expected.plan
    assert seen == ["pretended", "cpu"] * (len(seen) // 2)
    assert "pretended:0 has no room to solve model.layers.0.mlp.down_proj: it is solved on the host" in caplog.text


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_is_written_while_the_next_one_is_computed_with(
    place: str, device: torch.device, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, written = slimgpt.Config(sparsity=0.3, split="equal"), []
    save = durable_state.save_file

    def noted(state: Any, path: Path, **more: Any) -> None:
        assert all(tensor.device.type == "cpu" for tensor in state.values())
        written.append((path.name, threading.current_thread() is threading.main_thread()))
        save(state, path, **more)

    monkeypatch.setattr(durable_state, "save_file", noted)
    states = []
    for name, options in (("here", CPU), ("there", on(device, place))):
        state = durable_state.DurableWalkState(tmp_path / name)
        slimgpt.prune(ResidentDecoder(model), windows(model), config, options=options, walk_state=state)
        states.append(state)
    names = [f"layer-{index:05d}.safetensors" for index in range(3)]
    assert written == [*((name, True) for name in names), *((name, False) for name in names)]
    for mine, theirs in zip(states[0].shards, states[1].shards, strict=True):
        expected, found = load_file(mine), load_file(theirs)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)
    assert durable_state.DurableWalkState(tmp_path / "there").layers_done == 3


def test_a_layer_that_cannot_be_written_ends_the_walk(
    device: torch.device, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, path: Path, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_state, "save_file", full)
    state, config = durable_state.DurableWalkState(tmp_path), slimgpt.Config(sparsity=0.3, split="equal")
    with pytest.raises(OSError, match="No space left"):
        slimgpt.prune(ResidentDecoder(model), windows(model), config, options=on(device, "device"), walk_state=state)
    assert state.layers_done == 1, "the second one met the error of the first"
    assert durable_state.DurableWalkState(tmp_path).layers_done == 0


def test_memory_that_runs_out_is_told_apart(model: PreTrainedModel) -> None:
    def short(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for owner, name, part in ((torch.nn.Module, "to", "loading"), (sequential, "output_inputs", "the forward")):
        walk = walk_layers(ResidentDecoder(model), random_ids(model), CPU)
        with patch.object(owner, name, short), pytest.raises(torch.OutOfMemoryError) as raised:
            next(walk)
        assert memory_part(pickle.loads(pickle.dumps(raised.value))) == part


def test_what_needs_autograd_in_a_process_of_its_own() -> None:
    wanted = "gradients_flow or llm_pruner or gradients_layer_by_layer"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-rA", __file__, "-k", wanted]
    child = subprocess.run(command, env=os.environ | {_ALONE: "1"}, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout[-3000:]
    assert child.stdout.count("PASSED ") == 3, child.stdout[-3000:]
