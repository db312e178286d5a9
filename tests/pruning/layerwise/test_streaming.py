"""From checkpoint to checkpoint one layer at a time: the same bits as in memory, whoever is killed on the way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.errors import PruningError
from pruning.families import family_of, layer_cost, shapes
from pruning.layerwise import prune as layerwise
from pruning.layerwise import streaming
from pruning.layerwise.capture import capture_statistics
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.statistics.hessian import Hessian, HessianAccumulator
from pruning.walk import durable_state, sequential
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, in_bfloat16, logits, prune_copy, same_weights, windows
from tests.pruning.checkpoints.test_save_load import FRESH
from tests.tiny import FAMILIES, random_ids, random_plan, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

LAYERS = 4


def calibration_for(source: Path) -> CalibrationSet:
    return windows(load_checkpoint(source))


def prune(source: Path, out: Path, work: Path, *, budget: int | None = None, **more: Any) -> Pruned:
    """`more`: fields of the config, or arguments of prune_checkpoint."""
    arguments = {name: more.pop(name) for name in ("statistics", "progress") if name in more}
    return prune_checkpoint(
        source,
        out,
        slimgpt,
        calibration_for(source),
        slimgpt.Config(**({"sparsity": 0.3, "split": "equal"} | more)),
        options=replace(CPU, activation_budget_bytes=budget),
        work=work,
        **arguments,
    )


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    save_checkpoint(model, None, folder, **options)
    return folder


def in_memory(source: Path, **more: Any) -> tuple[PreTrainedModel, Pruned]:
    """The shrunk model that the same pruning gives without streaming."""
    statistics = more.pop("statistics", None)
    model = load_checkpoint(source)
    config = slimgpt.Config(**({"sparsity": 0.3, "split": "equal"} | more))
    masked, pruned = prune_copy(model, config, calibration_for(source), statistics=statistics)
    shrink_(masked, pruned.plan)
    return masked, pruned


def untimed(pruned: Pruned) -> Pruned:
    reports = tuple(report.model_copy(update={"seconds": 0.0}) for report in pruned.layers)
    return pruned.model_copy(update={"layers": reports})


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_is(out: Path, expected: PreTrainedModel) -> None:
    """The checkpoint is what saving the model from memory gives, but for how the weights lie in files."""
    loaded, other = load_checkpoint(out), saved(expected, out.with_name("saved-from-memory"))
    assert type(loaded) is type(expected)
    assert (out / "config.json").read_text() == (other / "config.json").read_text()
    described = {path.name for path in out.iterdir() if ".safetensors" not in path.name and path.name != "plan.json"}
    assert described == {path.name for path in other.iterdir() if ".safetensors" not in path.name}
    assert shapes(loaded) == shapes(expected)
    assert same_weights(loaded, expected)
    assert loaded.dtype == expected.dtype
    ids_NL = random_ids(expected)
    assert torch.equal(logits(loaded, ids_NL), logits(expected, ids_NL))


@dataclass(frozen=True)
class Streamed:
    """A tiny model, saved and pruned; computed once, read by several tests."""

    source: Path
    out: Path
    pruned: Pruned


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Streamed]:
    @cache
    def run(name: str, layers: int = 3) -> Streamed:
        folder = tmp_path_factory.mktemp(name)
        source = saved(tiny_model(name, layers=layers), folder / "source", max_shard_size="40KB")
        return Streamed(source, folder / "out", prune(source, folder / "out", folder / "work"))

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_pruning_in_memory(name: str, streamed: Callable[..., Streamed], tmp_path: Path) -> None:
    source = streamed(name).source
    before = hashes(source)
    expected, outcome = in_memory(source)
    in_files = prune(source, tmp_path / "out", tmp_path / "work", budget=0)
    for pruned, out in ((streamed(name).pruned, streamed(name).out), (in_files, tmp_path / "out")):
        assert untimed(pruned) == untimed(outcome)
        assert_is(out, expected)
        assert load_plan(out) == outcome.plan
    assert hashes(source) == before


@pytest.mark.parametrize("name", ["llama", "gemma", "phi-mha", "opt"])
@pytest.mark.parametrize("split", ["auto", "half"])
def test_equals_pruning_in_memory_in_bfloat16(name: str, split: str, tmp_path: Path) -> None:
    source = saved(in_bfloat16(tiny_model(name)), tmp_path / "source")
    pruned = prune(source, tmp_path / "out", tmp_path / "work", split=split, budget=0)
    expected, outcome = in_memory(source, split=split)
    assert untimed(pruned) == untimed(outcome)
    assert_is(tmp_path / "out", expected)
    assert expected.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "opt"])
@pytest.mark.parametrize("stored", [True, False])
def test_tied_heads_are_stored_once(name: str, stored: bool, tmp_path: Path) -> None:
    source = saved(tiny_model(name, tie_word_embeddings=True), tmp_path / "source")
    if stored:  # twice, as in the published Qwen3-0.6B
        tensors = load_file(source / "model.safetensors")
        embeddings = tensors[f"{family_of(tiny_model(name)).embeddings_path}.weight"]
        save_file(tensors | {"lm_head.weight": embeddings.clone()}, source / "model.safetensors", {"format": "pt"})
    prune(source, tmp_path / "out", tmp_path / "work")
    expected, _ = in_memory(source)
    assert_is(tmp_path / "out", expected)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_equal_widths_give_a_plain_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sparsity = 12 * layer_cost(model).per_channel / layer_cost(model).parameters(shapes(model)[0])
    source, even = saved(model, tmp_path / "source"), {"split": "ffn", "curve": "uniform", "sparsity": sparsity}
    prune(source, tmp_path / "out", tmp_path / "work", **even)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "per_layer_config" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert (config["intermediate_size"], config["num_attention_heads"]) == (36, 8)
    assert_is(tmp_path / "out", in_memory(source, **even)[0])


@pytest.mark.slow
def test_a_fresh_process_loads_every_family_with_trust_remote_code(
    streamed: Callable[..., Streamed], tmp_path: Path
) -> None:
    folders = []
    for name in FAMILIES:
        out, plan = shutil.copytree(streamed(name).out, tmp_path / name), streamed(name).pruned.plan
        tiny_tokenizer().save_pretrained(out)
        model = load_checkpoint(out)
        ids, widths = random_ids(model), [shape.intermediate_size for shape in plan.shapes]
        torch.save({"ids": ids, "logits": logits(model, ids), "widths": widths}, out / "expected.pt")
        folders.append(str(out))
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-P", "-c", FRESH, *folders],
        cwd=tmp_path / "elsewhere",
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_uneven_checkpoint_is_pruned_again(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name, layers=LAYERS)
    model = tiny_model(name, layers=LAYERS)
    first = random_plan(shapes(model), family_of(model).head_dim(model), seed=5)
    shrink_(model, first)
    save_checkpoint(model, None, tmp_path / "one", first)
    settings = {"sparsity": 0.15, "split": "ffn"}
    pruned = prune(tmp_path / "one", tmp_path / "two", tmp_path / "work", **settings)
    expected, outcome = in_memory(tmp_path / "one", **settings)
    assert pruned.plan == outcome.plan
    assert_is(tmp_path / "two", expected)
    whole = load_plan(tmp_path / "two")
    assert whole == first.compose(pruned.plan)
    shrink_(dense, whole)
    assert shapes(dense) == shapes(load_checkpoint(tmp_path / "two"))


class Watched(StreamedDecoder):
    """Knows which layers were read, and how many of them were alive at once."""

    read: list[int]
    alive: list[int]
    kept: list[weakref.ref[nn.Module]]

    def layer(self, index: int, device: torch.device) -> nn.Module:
        layer = super().layer(index, device)
        self.read.append(index)
        self.kept.append(weakref.ref(layer))
        self.alive.append(sum(reference() is not None for reference in self.kept))
        return layer


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    for name in ("read", "alive", "kept"):
        monkeypatch.setattr(Watched, name, [], raising=False)
    monkeypatch.setattr(streaming, "StreamedDecoder", Watched)
    return Watched


@pytest.mark.parametrize("split", ["equal", "auto"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_one_layer_is_in_memory_at_a_time(name: str, split: str, watched: type[Watched], tmp_path: Path) -> None:
    source = saved(tiny_model(name, layers=LAYERS), tmp_path / "source")
    prune(source, tmp_path / "out", tmp_path / "work", split=split)
    assert len(watched.read) >= LAYERS
    assert set(watched.alive) == {1}
    prune(source, tmp_path / "files", tmp_path / "work-files", split=split, budget=0)
    assert set(watched.alive) == {1, 2}, "one whose output joins the stream, and one whose inputs are captured"


@pytest.mark.parametrize("captured", [False, True])
def test_one_linears_hessian_is_in_memory_at_a_time(
    captured: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Counting(HessianAccumulator):
        def __init__(self, *args: Any, **options: Any) -> None:
            alive.append(sum(reference() is not None for reference in kept))
            super().__init__(*args, **options)

        def finish(self, *args: Any) -> Hessian:
            hessian = super().finish(*args)
            kept.append(weakref.ref(hessian.matrix_II))
            return hessian

    monkeypatch.setattr(sequential, "HessianAccumulator", Counting)
    source = saved(tiny_model("llama"), tmp_path / "source")
    if captured:
        capture_statistics(StreamedDecoder(source), calibration_for(source), tmp_path, CPU)
    else:
        prune(source, tmp_path / "out", tmp_path / "work")
    assert len(alive) >= 2 * 5  # calibration and held-out, of all linears that lose something
    assert set(alive) == {0}


def test_progress_rises_to_one(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    shares: list[float] = []
    prune(source, tmp_path / "out", tmp_path / "work", progress=lambda share, message: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_refusal_leaves_no_checkpoint(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    with pytest.raises(PruningError, match=r"sparsity 0\.9 cannot be reached"):
        prune(source, tmp_path / "out", tmp_path / "work", sparsity=0.9, split="ffn")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PruningError, match=r"no config\.json"):
        prune_checkpoint(
            tmp_path,
            tmp_path / "out",
            slimgpt,
            windows(tiny_model("llama")),
            slimgpt.Config(sparsity=0.2),
            options=CPU,
            work=tmp_path / "work",
        )


@pytest.mark.parametrize("other", [{"sparsity": 0.4}, {"dampening_frac": 0.5}])
def test_a_work_folder_belongs_to_one_pruning(other: dict[str, float], tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    prune(source, tmp_path / "out", tmp_path / "work")
    with pytest.raises(PruningError, match="finished layers of another pruning"):
        prune(source, tmp_path / "other", tmp_path / "work", **other)
    assert not (tmp_path / "other").exists()
    again = prune(source, tmp_path / "again", tmp_path / "work")
    assert again.plan == load_plan(tmp_path / "out")


def test_another_disk_gets_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    prune(source, tmp_path / "linked", tmp_path / "work")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    prune(source, tmp_path / "copied", tmp_path / "work")
    assert hashes(tmp_path / "copied") == hashes(tmp_path / "linked")
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "copied").iterdir())


def test_a_published_generation_config_goes_along(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 1}')
    prune(source, tmp_path / "out", tmp_path / "work")
    assert load_checkpoint(tmp_path / "out").generation_config.temperature == 0.9


# --- kill -9 ------------------------------------------------------------


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def when(condition: Callable[..., bool], function: Any, then: Callable[..., Any]) -> Any:
    """The function, but `then` instead once its arguments meet the condition."""
    return lambda *args, **options: (then if condition(*args, **options) else function)(*args, **options)


def half_a_shard(state: dict[str, Tensor], path: Path, **options: Any) -> None:
    save_file(state, path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


def kept_stream(walk_state: Any, walked: Any) -> None:
    durable_state.DurableWalkState._original_save_stream(walk_state, walked)  # type: ignore[attr-defined]
    die()


def _third(path: Path) -> bool:
    return path.stem == "layer-00002"


def arm(where: str) -> None:
    """In the child: die at this point of the third layer, or of the assembly."""
    walk_state = durable_state.DurableWalkState
    if where == "when it is read":
        Watched.layer = when(lambda self, index, device: index == 2, Watched.layer, die)  # type: ignore[method-assign]
    elif where == "before its attention is pruned":
        layerwise.prune_linear_ = when(
            lambda sub, *_: (sub.layer, sub.kind) == (2, "attention"), layerwise.prune_linear_, die
        )
    elif where == "before its mlp is pruned":
        layerwise.prune_linear_ = when(
            lambda sub, *_: (sub.layer, sub.kind) == (2, "mlp"), layerwise.prune_linear_, die
        )
    elif where == "when its stream is written":
        walk_state._original_save_stream = walk_state._save_stream  # type: ignore[attr-defined]
        walk_state._save_stream = when(lambda self, walked: walked.index == 2, walk_state._save_stream, kept_stream)  # type: ignore[method-assign]
    elif where == "in the middle of its shard":
        durable_state.save_file = when(lambda state, path, **_: _third(path), durable_state.save_file, half_a_shard)
    elif where == "before its page is written":
        durable_state._write_atomically = when(lambda path, text: _third(path), durable_state._write_atomically, die)
    elif where == "when the first files are linked":
        streaming._link = when(lambda file, target: _third(file), streaming._link, die)
    elif where == "before the index is written":
        streaming.write_index = die
    else:
        raise AssertionError(where)


POINTS = {
    "when it is read": 1,  # to capture its inputs in the pass in which the second one is finished
    "before its attention is pruned": 2,
    "before its mlp is pruned": 2,
    "when its stream is written": 2,
    "in the middle of its shard": 2,
    "before its page is written": 2,
    "when the first files are linked": LAYERS,
    "before the index is written": LAYERS,
}
"""Where the process is killed, and how many layers are finished then."""


def killed(work: Callable[[], None]) -> None:
    """Run it in a child that ends by SIGKILL."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == -signal.SIGKILL


def killed_and_continued(
    tmp_path: Path, watched: type[Watched], where: str, source: Path, whole: Streamed | None = None, **more: Any
) -> list[int]:
    """Which layers the second process read; its files must be those of `whole`, a run that nobody killed."""
    if whole is None:
        whole = Streamed(source, tmp_path / "whole", prune(source, tmp_path / "whole", tmp_path / "work-whole", **more))
    out, work = tmp_path / "out", tmp_path / "work"

    def child() -> None:
        torch.set_num_threads(1)
        arm(where)
        prune(source, out, work, **more)

    killed(child)
    watched.read.clear()
    pruned = prune(source, out, work, **more)
    assert hashes(out) == hashes(whole.out)
    assert untimed(pruned) == untimed(whole.pruned)
    assert list(work.rglob("activations-*")) == []
    return watched.read


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("where", POINTS)
def test_killed_at_any_point(
    where: str, budget: int | None, watched: type[Watched], streamed: Callable[..., Streamed], tmp_path: Path
) -> None:
    whole = streamed("llama", LAYERS)
    read = killed_and_continued(tmp_path, watched, where, whole.source, whole, budget=budget)
    # of a stream in files the next layer is read before the one before is finished
    assert read == list(range(POINTS[where] + (budget is None and where == "when it is read"), LAYERS))


@pytest.mark.parametrize("name", FAMILIES)
def test_killed_in_every_family(name: str, watched: type[Watched], tmp_path: Path) -> None:
    source = saved(in_bfloat16(tiny_model(name, layers=LAYERS)), tmp_path / "source")
    assert killed_and_continued(tmp_path, watched, "before its mlp is pruned", source) == [2, 3]


@pytest.mark.parametrize("where", ["before its mlp is pruned", "when the first files are linked"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_killed_with_several_splits_to_try(where: str, bfloat16: bool, watched: type[Watched], tmp_path: Path) -> None:
    model = tiny_model("llama", layers=LAYERS)
    source = saved(in_bfloat16(model) if bfloat16 else model, tmp_path / "source")
    read = killed_and_continued(tmp_path, watched, where, source, split="auto", budget=0)
    assert read[:2] == [2, 3] if POINTS[where] == 2 else read == []


@pytest.mark.parametrize("split", ["equal", "auto"])
def test_killed_without_error_propagation(split: str, watched: type[Watched], tmp_path: Path) -> None:
    source, statistics = saved(tiny_model("llama", layers=LAYERS), tmp_path / "source"), tmp_path / "statistics"
    statistics.mkdir()
    capture_statistics(StreamedDecoder(source), calibration_for(source), statistics, CPU)
    more: dict[str, Any] = {"split": split, "propagate_error": False, "statistics": statistics}
    read = killed_and_continued(tmp_path, watched, "before its mlp is pruned", source, **more)
    assert read[:2] == [2, 3]
    expected, _ = in_memory(source, **more)
    assert_is(tmp_path / "out", expected)


def test_killed_twice_and_then_again(watched: type[Watched], streamed: Callable[..., Streamed], tmp_path: Path) -> None:
    whole = streamed("llama", LAYERS)
    for layer in range(LAYERS):

        def child(layer: int = layer) -> None:
            torch.set_num_threads(1)

            def progress(share: float, message: str) -> None:
                if f"layer {layer + 1} of" in message:
                    die()

            prune(whole.source, tmp_path / "out", tmp_path / "work", progress=progress)

        killed(child)
    watched.read.clear()
    prune(whole.source, tmp_path / "out", tmp_path / "work")
    assert watched.read == []
    assert hashes(tmp_path / "out") == hashes(whole.out)
