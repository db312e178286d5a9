"""A walk that was interrupted goes on from its state to the same bits; what cannot be trusted is not used."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of
from pruning.methods import slimgpt
from pruning.walk import durable_state
from pruning.walk.durable_state import DurableWalkState
from pruning.walk.state import LayerEntry, MemoryWalkState, Pruned, WalkedLayer, WalkState
from tests.pruning.captured import CPU, prune_copy, same_weights, windows
from tests.tiny import FAMILIES, tiny_model

LAYERS = 4
#: a sparsity at which `auto` tries three splits
SEVERAL = 0.3


class Stop(Exception):
    """Raised where a kill would come."""


class Counted(ResidentDecoder):
    """Remembers which layers were asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.asked: list[int] = []

    def layer(self, index: int, device: torch.device) -> nn.Module:
        self.asked.append(index)
        return super().layer(index, device)


def prune_into(
    walk_state: WalkState,
    decoder: ResidentDecoder,
    *,
    stop_after: int | None = None,
    budget: int | None = None,
    **config: Any,
) -> Pruned:
    """stop_after: that many times progress was reported."""
    reported: list[float] = []

    def progress(share: float, message: str) -> None:
        reported.append(share)
        if len(reported) == stop_after:
            raise Stop

    return slimgpt.prune(
        decoder,
        windows(decoder.skeleton),
        slimgpt.Config(**({"sparsity": 0.3, "split": "equal"} | config)),
        options=replace(CPU, activation_budget_bytes=budget),
        walk_state=walk_state,
        progress=progress,
    )


def interrupted(folder: Path, model: PreTrainedModel, after: int, **more: Any) -> None:
    with pytest.raises(Stop):
        prune_into(DurableWalkState(folder), ResidentDecoder(model), stop_after=after, **more)


def bits(walk_state: DurableWalkState) -> list[bytes]:
    return [shard.read_bytes() for shard in walk_state.shards]


def untimed(pruned: Pruned) -> Pruned:
    reports = tuple(report.model_copy(update={"seconds": 0.0}) for report in pruned.layers)
    return pruned.model_copy(update={"layers": reports})


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=LAYERS)


def test_each_finished_layer_is_told_and_again_to_who_goes_on(model: PreTrainedModel, tmp_path: Path) -> None:
    """Not the layers of a trial."""
    told: list[LayerEntry] = []
    with pytest.raises(Stop):
        prune_into(DurableWalkState(tmp_path, on_entry=told.append), ResidentDecoder(model), stop_after=2)
    assert len(told) == 2
    again = DurableWalkState(tmp_path, on_entry=told.append)
    assert told[2:] == told[:2]
    prune_into(again, ResidentDecoder(model))
    assert told[2:] == list(again.entries)
    assert len(told) == 2 + LAYERS
    prune_into(again.branch("trial"), ResidentDecoder(model), stop_after=None)
    assert len(told) == 2 + LAYERS


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_are_the_shrunk_models_layers(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, layers=LAYERS)
    masked, expected = prune_copy(model, slimgpt.Config(sparsity=0.3, split="equal"))
    walk_state = DurableWalkState(tmp_path)
    pruned = prune_into(walk_state, ResidentDecoder(model))
    assert untimed(pruned) == untimed(expected)
    assert [entry.plan for entry in walk_state.entries] == list(pruned.plan.layers)
    shrink_(masked, pruned.plan)
    state: dict[str, Tensor] = {}
    for shard in walk_state.shards:
        state |= load_file(shard)
    prefix = f"{family_of(model).layers_path}."
    theirs = {key: value for key, value in masked.state_dict().items() if key.startswith(prefix)}
    assert state.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in state.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budgets", [(None, None), (0, 0), (None, 0), (0, None)])
def test_an_interrupted_walk_goes_on_to_the_same_bits(
    name: str, budgets: tuple[int | None, int | None], tmp_path: Path
) -> None:
    model = tiny_model(name, layers=LAYERS)
    whole = DurableWalkState(tmp_path / "whole")
    expected = prune_into(whole, ResidentDecoder(model))
    interrupted(tmp_path / "killed", model, 2, budget=budgets[0])
    again, decoder = DurableWalkState(tmp_path / "killed"), Counted(model)
    assert again.layers_done == 2
    assert again.entries[0].plan == expected.plan.layers[0]
    pruned = prune_into(again, decoder, budget=budgets[1])
    assert decoder.asked == [2, 3]
    assert untimed(pruned) == untimed(expected)
    assert bits(again) == bits(whole)


def test_interrupted_after_every_layer(model: PreTrainedModel, tmp_path: Path) -> None:
    whole = DurableWalkState(tmp_path / "whole")
    expected = prune_into(whole, ResidentDecoder(model))
    for layer in range(LAYERS):
        # one more layer reported each time; the first call of a resumed walk reports the last finished layer again
        interrupted(tmp_path / "killed", model, 1 if layer == 0 else 2)
        assert DurableWalkState(tmp_path / "killed").layers_done == layer + 1
    again, decoder = DurableWalkState(tmp_path / "killed"), Counted(model)
    assert untimed(prune_into(again, decoder)) == untimed(expected)
    assert decoder.asked == []
    assert bits(again) == bits(whole)


def test_the_stream_goes_on_where_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    streams: list[Tensor] = []

    class Recording(MemoryWalkState):
        def _save_layer(self, walked: WalkedLayer, entry: LayerEntry) -> None:
            streams.append(torch.cat([walked.stream.get(*span) for span in walked.spans]))
            super()._save_layer(walked, entry)

    prune_into(Recording(), ResidentDecoder(model))
    for budget in (None, 0):
        interrupted(tmp_path / str(budget), model, 3, budget=budget)
        walk_state = DurableWalkState(tmp_path / str(budget))
        assert torch.equal(walk_state.resumed(0, 8), streams[2])
        assert torch.equal(walk_state.resumed(3, 5), streams[2][3:5])  # in other batches than it was written


def test_only_the_last_streams_are_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    walk_state = DurableWalkState(tmp_path)
    prune_into(walk_state, ResidentDecoder(model))
    streams = sorted(path for path in tmp_path.rglob("stream-*"))
    assert len(streams) == 2
    assert sum(path.stat().st_size for path in streams) == 2 * 8 * 24 * 32 * 4
    assert [path.name for path in tmp_path.rglob("activations-*")] == []


@pytest.mark.parametrize("stop_after", [2, LAYERS])
def test_where_copies_of_the_stream_take_long_the_walk_goes_on_from_the_last_one(
    stop_after: int, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DurableWalkState(tmp_path / "whole")
    expected = prune_into(whole, ResidentDecoder(model))
    monkeypatch.setattr(durable_state, "STREAM_SHARE", 0.0)
    monkeypatch.setattr(durable_state, "_SHORT", 0.0)
    interrupted(tmp_path / "killed", model, stop_after)
    done = LAYERS if stop_after == LAYERS else 1
    (folder,) = (tmp_path / "killed").iterdir()
    last = f"stream-{done - 1:05d}"
    assert {path.name for path in folder.glob("stream-*")} == {"stream-00000", last}, "the first, and a whole walk's"
    told: list[LayerEntry] = []
    again, decoder = DurableWalkState(tmp_path / "killed", on_entry=told.append), Counted(model)
    assert (again.layers_done, len(told)) == (done, done)
    assert untimed(prune_into(again, decoder)) == untimed(expected)
    assert decoder.asked == list(range(done, LAYERS))
    assert bits(again) == bits(whole)


def damaged(folder: Path, what: str) -> None:
    """One bit flipped, or the file cut or gone."""
    kind, _, how = what.partition(" ")
    pattern = {"shard": "layer-00000.safetensors", "stream": "stream-00001", "page": "layer-00001.json"}[kind]
    (path,) = folder.rglob(pattern)
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "flipped":
        data[len(data) // 2 if kind != "page" else 0] ^= 1
    path.write_bytes(data if how == "flipped" else data[:-5])


@pytest.mark.parametrize(
    "what",
    [
        "shard flipped",
        "shard cut",
        "shard gone",
        "stream flipped",
        "stream cut",
        "stream gone",
        "page flipped",
        "page cut",
    ],
)
def test_a_damaged_file_means_starting_again_with_a_warning(
    what: str, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = DurableWalkState(tmp_path / "whole")
    expected = prune_into(whole, ResidentDecoder(model))
    interrupted(tmp_path / "killed", model, 2)
    DurableWalkState(tmp_path / "killed").note("kl", 1.5)
    damaged(tmp_path / "killed", what)
    with caplog.at_level(logging.WARNING, logger="slimline"):
        again = DurableWalkState(tmp_path / "killed")
    (message,) = caplog.messages
    assert str(tmp_path / "killed") in message
    assert "starting from the first layer" in message
    assert again.layers_done == 0
    assert again.recall("kl") is None, "measured on layers that are gone"
    decoder = Counted(model)
    assert untimed(prune_into(again, decoder)) == untimed(expected)
    assert decoder.asked == [0, 1, 2, 3]
    assert bits(again) == bits(whole)


def test_sound_and_empty_folders_give_no_warning(
    model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert DurableWalkState(tmp_path / "new" / "folder").layers_done == 0
    interrupted(tmp_path / "killed", model, 2)
    assert DurableWalkState(tmp_path / "killed").layers_done == 2
    assert caplog.messages == []


def test_what_a_killed_process_left_half_done_is_overwritten(model: PreTrainedModel, tmp_path: Path) -> None:
    whole = DurableWalkState(tmp_path / "whole")
    prune_into(whole, ResidentDecoder(model))
    interrupted(tmp_path / "killed", model, 2, budget=0)
    (folder,) = (tmp_path / "killed").iterdir()
    (folder / "stream-00002").write_bytes(b"half" * 10**5)
    (folder / "layer-00002.safetensors").write_bytes(b"half")
    (folder / "layer-00002.unfinished").write_text("{")
    (folder / "activations-abc").mkdir()
    (folder / "activations-abc" / "1").write_bytes(b"gigabytes")
    again = DurableWalkState(tmp_path / "killed")
    assert again.layers_done == 2
    assert not (folder / "activations-abc").exists(), "a killed process cannot clean up behind itself"
    prune_into(again, ResidentDecoder(model))
    assert bits(again) == bits(whole)


def test_numbers_survive_the_process(tmp_path: Path) -> None:
    walk_state = DurableWalkState(tmp_path)
    assert walk_state.recall("kl") is None
    walk_state.note("kl", 0.1 + 0.2)
    assert walk_state.recall("kl") == DurableWalkState(tmp_path).recall("kl") == 0.1 + 0.2
    walk_state.note("kl", -1.0)
    assert DurableWalkState(tmp_path).recall("kl") == -1.0
    assert walk_state.branch("one").recall("kl") is None


def test_branches_are_apart_and_the_same_name_is_the_same_branch(model: PreTrainedModel, tmp_path: Path) -> None:
    walk_state = DurableWalkState(tmp_path)
    one, two = walk_state.branch("one"), walk_state.branch("two")
    prune_into(one, ResidentDecoder(model))
    one.note("kl", 0.5)
    assert (walk_state.layers_done, two.layers_done) == (0, 0)
    assert two.recall("kl") is None
    same = DurableWalkState(tmp_path).branch("one")
    assert same.entries == one.entries
    assert same.recall("kl") == 0.5


def test_a_branch_writes_no_shards_and_resumes(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        prune_into(DurableWalkState(tmp_path).branch("trial"), ResidentDecoder(model), stop_after=2)
    again, decoder = DurableWalkState(tmp_path).branch("trial"), Counted(model)
    pruned = prune_into(again, decoder)
    assert decoder.asked == [2, 3]
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert pruned.plan == prune_into(MemoryWalkState(), ResidentDecoder(model)).plan


@pytest.mark.parametrize("stop_after", range(1, 3 * LAYERS))
def test_several_tries_interrupted_anywhere(stop_after: int, model: PreTrainedModel, tmp_path: Path) -> None:
    whole = DurableWalkState(tmp_path / "whole")
    expected = prune_into(whole, ResidentDecoder(model), split="auto", sparsity=SEVERAL)
    tries = len(expected.split_kl)
    assert tries == 2, "then progress is reported four times in each, and four times for the winner"
    interrupted(tmp_path / "killed", model, stop_after, split="auto", sparsity=SEVERAL)
    again, decoder = DurableWalkState(tmp_path / "killed"), Counted(model)
    pruned = prune_into(again, decoder, split="auto", sparsity=SEVERAL)
    assert untimed(pruned) == untimed(expected)
    assert bits(again) == bits(whole)
    dense = LAYERS if stop_after <= tries * LAYERS else 0  # walked again for the KLs that are not known yet
    assert len(decoder.asked) == (tries + 1) * LAYERS - stop_after + dense


def test_what_a_state_in_memory_holds(model: PreTrainedModel) -> None:
    walk_state, before = MemoryWalkState(), copy.deepcopy(model)
    prune_into(walk_state, ResidentDecoder(model))
    assert walk_state.folder is None
    assert walk_state.layers_done == LAYERS
    assert same_weights(model, before)
    walk_state.apply_(model)
    assert not same_weights(model, before)
    walk_state.note("kl", 0.25)
    assert walk_state.recall("kl") == 0.25
    assert walk_state.recall("other") is None
    other = walk_state.branch("other")
    assert (other.layers_done, other.recall("kl")) == (0, None)


def test_a_layer_must_be_decided_and_come_in_order(model: PreTrainedModel, tmp_path: Path) -> None:
    entries = DurableWalkState(tmp_path / "whole")
    prune_into(entries, ResidentDecoder(model))
    layer = ResidentDecoder(model).layer(1, torch.device("cpu"))
    walked = WalkedLayer(1, layer, family_of(model), None, ())  # type: ignore[arg-type]
    for walk_state in (MemoryWalkState(), DurableWalkState(tmp_path / "empty")):
        with pytest.raises(AssertionError, match="nothing was decided for layer 1"):
            walk_state.layer_done(walked)
        walk_state.decide(entries.entries[1])
        with pytest.raises(AssertionError):
            walk_state.layer_done(walked)
        assert walk_state.layers_done == 0
