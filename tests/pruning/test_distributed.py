"""Several processes that prune one model together give what one process gives, and fail together."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from infra import registry
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder, StreamedDecoder
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.distributed import TIMEOUT, ProcessGroup
from pruning.errors import PruningError
from pruning.layerwise import streaming
from pruning.layerwise.capture import capture_statistics
from pruning.layerwise.kl import final_stream, mean_kl
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import slimgpt
from pruning.statistics.hessian import HessianAccumulator
from pruning.walk import durable_state
from pruning.walk.durable_state import DurableWalkState
from pruning.walk.sequential import walk_layers
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, hooked_moments, windows
from tests.tiny import random_ids, tiny_model

LAYERS = 4


def _in_process(rank: int, size: int, work: Callable[..., None], folder: Path, *more: Any) -> None:
    torch.set_num_threads(1)
    process_group = ProcessGroup.join("gloo", (folder / "meeting").as_uri(), rank, size)
    work(process_group, folder, *more)
    dist.destroy_process_group()


def together(work: Callable[..., None], folder: Path, *more: Any, size: int = 2) -> None:
    """Run it in `size` processes of one group, which meet in a file; their asserts are raised here."""
    (folder / "meeting").unlink(missing_ok=True)
    # one process imports torch and transformers, which takes seconds, and is forked before it does anything with them
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    start_processes(_in_process, (size, work, folder, *more), nprocs=size, start_method="forkserver")


def calibration(num_samples: int = 5, num_heldout: int = 2) -> CalibrationSet:
    # an odd number: the shares differ
    return windows(tiny_model("llama"), num_samples, num_heldout)


def prune(
    folder: Path, name: str, process_group: ProcessGroup, work: str | None = None, num_samples: int = 5, **config: Any
) -> Pruned:
    return prune_checkpoint(
        folder / "source",
        folder / name,
        slimgpt,
        calibration(num_samples),
        slimgpt.Config(**({"sparsity": 0.3, "split": "equal"} | config)),
        options=replace(CPU, process_group=process_group),
        work=folder / (work or f"work-{name}"),
    )


def source(folder: Path, family: str = "llama") -> Path:
    save_checkpoint(tiny_model(family, layers=LAYERS), None, folder / "source")
    return folder


def assert_close(one: Path, other: Path, atol: float = 1e-5) -> None:
    mine, theirs = load_checkpoint(one).state_dict(), load_checkpoint(other).state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=atol, rtol=1e-4, msg=name)


# --- one group of two does all that needs no kill --------------------


def _numbers(process_group: ProcessGroup, folder: Path) -> None:
    assert (process_group.rank, process_group.size, process_group.leads) == (dist.get_rank(), 2, dist.get_rank() == 0)
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout == TIMEOUT, "the leader may solve for longer than torch waits by default"
    assert process_group.sum_of(process_group.rank + 1, 0.25) == (3.0, 0.5)
    assert process_group.largest(-float(process_group.rank)) == 0.0
    samples_NL = torch.arange(10).reshape(5, 2)
    assert (
        process_group.share(samples_NL).tolist()
        == samples_NL.tolist()[slice(0, 3) if process_group.leads else slice(3, 5)]
    )
    assert process_group.share(samples_NL[:1]).shape == ((1 if process_group.leads else 0), 2)
    tensor = torch.full((3,), float(process_group.rank + 1))
    process_group.sum_(tensor)
    assert tensor.tolist() == [3.0] * 3
    mine = torch.full((2,), float(process_group.rank))
    process_group.copy_from_leader_(mine)
    assert mine.tolist() == [0.0] * 2
    assert process_group.decide(lambda: {"rank": process_group.rank}) == {"rank": 0}
    assert process_group.decide(lambda: None) is None


def _errors(process_group: ProcessGroup, folder: Path) -> None:
    def only_the_leader_may() -> None:
        assert process_group.leads
        raise PruningError("no way out")

    with pytest.raises(PruningError, match="no way out"):
        process_group.decide(only_the_leader_may)
    # a Hessian that only the leader tries to invert: 24 tokens for 48 channels; and one that one process sees broken
    model, ids_NL = tiny_model("llama"), random_ids(tiny_model("llama"), 4, 16)
    with pytest.raises(PruningError, match=r"Hessian of .* is (not positive definite|too ill conditioned)"):
        prune(
            folder, f"refused-{process_group.rank}", process_group, "work-refused", num_samples=1, dampening_frac=1e-30
        )
    with pytest.raises(PruningError, match="cannot be reached"):
        prune(folder, f"refused-{process_group.rank}", process_group, "work-refused-too", sparsity=0.97)
    assert not (folder / f"refused-{process_group.rank}").exists()
    accumulator = HessianAccumulator(3, device="cpu")
    accumulator.add(torch.full((2, 3), float("nan") if process_group.leads else 1.0))
    with pytest.raises(PruningError, match=r"o_proj \(4 tokens\) is not finite"):
        accumulator.finish("o_proj", process_group)
    with pytest.raises(PruningError, match="seen no tokens"):
        list(walk_layers(ResidentDecoder(model), ids_NL[:0], replace(CPU, process_group=process_group)))


def _walks(process_group: ProcessGroup, folder: Path) -> None:
    model = tiny_model("llama")
    decoder, options = ResidentDecoder(model), replace(CPU, process_group=process_group)
    for num_samples, num_heldout in ((5, 3), (1, 1), (1, 0), (2, 1)):
        ids_NL = random_ids(model, num_samples + num_heldout, 16)
        expected = hooked_moments(model, ids_NL[:num_samples])
        heldout = hooked_moments(model, ids_NL[num_samples:]) if num_heldout else {}
        for sub_layer in walk_layers(decoder, ids_NL, options, num_heldout=num_heldout):
            assert sub_layer.hessian is not None
            assert sub_layer.hessian.num_tokens == num_samples * 16
            _assert_moments(sub_layer.hessian.matrix_II, expected[sub_layer.name])
            assert (sub_layer.heldout is None) == (num_heldout == 0)
            if sub_layer.heldout is not None:
                assert sub_layer.heldout.num_tokens == num_heldout * 16
                _assert_moments(sub_layer.heldout.matrix_II, heldout[sub_layer.name])
    second = tiny_model("llama", seed=1)
    for num_samples in (3, 1):
        ids_NL = random_ids(model, num_samples, 16)
        dense, other = (final_stream(ResidentDecoder(each), ids_NL, options) for each in (model, second))
        assert len(dense) == len(process_group.share(ids_NL))
        alone = [final_stream(ResidentDecoder(each), ids_NL, CPU) for each in (model, second)]
        expected_kl = mean_kl(decoder, alone[0], alone[1], CPU)
        assert mean_kl(decoder, dense, other, options) == pytest.approx(expected_kl, rel=1e-6)


def _assert_moments(actual_II: Tensor, expected_II: Tensor) -> None:
    scale = float(expected_II.abs().max())
    torch.testing.assert_close(actual_II.double(), expected_II, atol=2e-6 * scale, rtol=1e-4)


def _prunings(process_group: ProcessGroup, folder: Path) -> None:
    for name, config in CONFIGS.items():
        pruned = prune(folder, f"two-{name}", process_group, **config)
        (folder / f"{name}-{process_group.rank}.json").write_text(pruned.model_dump_json())
    statistics = folder / "statistics"
    if process_group.leads:
        statistics.mkdir()
    dist.barrier()
    capture_statistics(
        StreamedDecoder(folder / "source"), calibration(), statistics, replace(CPU, process_group=process_group)
    )
    dist.barrier()


RANKINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flap": ("flap", {"sparsity": 0.3}),
    "taylor": ("llm_pruner", {"sparsity": 0.3, "protect_first": 1, "protect_last": 0}),
    "ppl": ("shortened", {"layers": 2}),
    "influence": ("shortened", {"layers": 2, "criterion": "influence", "unit": "sub_layer"}),
    "merged": ("shortened", {"layers": 1, "criterion": "taylor", "merge": "linear", "ridge": 0.1}),
}


def ranked(folder: Path, name: str, out: str, process_group: ProcessGroup) -> Pruned:
    method, config = RANKINGS[name]
    module = registry.load("pruning.methods", method, "method")
    options = replace(CPU, process_group=process_group)
    typed, work = module.Config(**config), folder / f"work-{out}"
    return prune_checkpoint(
        folder / "source", folder / out, module, calibration(), typed, options=options, work=work
    )  # fmt: skip


def _rankings(process_group: ProcessGroup, folder: Path) -> None:
    for name in RANKINGS:
        pruned = ranked(folder, name, f"two-{name}", process_group)
        (folder / f"{name}-{process_group.rank}.json").write_text(pruned.model_dump_json())


def _everything(process_group: ProcessGroup, folder: Path) -> None:
    _numbers(process_group, folder)
    _rankings(process_group, folder)
    _walks(process_group, folder)
    _prunings(process_group, folder)
    _errors(process_group, folder)


CONFIGS: dict[str, dict[str, Any]] = {
    "equal": {},
    "auto": {"split": "auto"},
    "searched": {"allocation": "searched", "start": "curve", "forwards": 9},
    "query": {"split": "half", "head_unit": "query_head", "protect_first": 1, "protect_last": 1, "sparsity": 0.1},
}


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    source(tmp_path)
    together(_everything, tmp_path)
    for name, config in CONFIGS.items():
        expected = prune(tmp_path, f"one-{name}", ProcessGroup(), **config)
        outcomes = [Pruned.model_validate_json((tmp_path / f"{name}-{rank}.json").read_bytes()) for rank in range(2)]
        assert outcomes[0] == outcomes[1], "to the second: the leader's report is everybody's"
        assert outcomes[0].plan == expected.plan
        assert outcomes[0].split_kl == pytest.approx(expected.split_kl, rel=1e-4)
        for report, other in zip(outcomes[0].layers, expected.layers, strict=True):
            assert report.num_tokens == other.num_tokens
            assert report.measured_error == pytest.approx(other.measured_error, rel=1e-3, abs=1e-6)
            assert (report.heldout_error or 0) == pytest.approx(other.heldout_error or 0, rel=1e-3, abs=1e-6)
        assert_close(tmp_path / f"two-{name}", tmp_path / f"one-{name}")
    for name in RANKINGS:
        expected = ranked(tmp_path, name, f"one-{name}", ProcessGroup())
        for rank in range(2):
            pruned = Pruned.model_validate_json((tmp_path / f"{name}-{rank}.json").read_bytes())
            assert pruned.plan == expected.plan
            scores = [report.score for report in pruned.layers if report.score is not None]
            others = [report.score for report in expected.layers if report.score is not None]
            assert scores == pytest.approx(others, rel=1e-3, abs=1e-4)
        assert_close(tmp_path / f"two-{name}", tmp_path / f"one-{name}", atol=1e-4)
    alone = tmp_path / "statistics-alone"
    alone.mkdir()
    capture_statistics(StreamedDecoder(tmp_path / "source"), calibration(), alone, CPU)
    assert {path.name for path in (tmp_path / "statistics").iterdir()} == {path.name for path in alone.iterdir()}
    for name in ("work-two-equal", "work-two-auto"):  # only the leader writes layers
        assert list((tmp_path / name).rglob("process-0-of-2/*.safetensors"))
        assert not list((tmp_path / name).rglob("process-1-of-2/*.safetensors"))


# --- killed --------------------


class Mortal(StreamedDecoder):
    """Its process dies when the third layer is wanted and two are done: all of them, or the follower alone, the leader
    one later."""

    def layer(self, index: int, device: torch.device) -> nn.Module:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().layer(index, device)


def _dying(process_group: ProcessGroup, folder: Path, split: str) -> None:
    durable_state.STREAM_SHARE = 1e9  # every stream is copied, however slow the machine is
    streaming.StreamedDecoder = Mortal  # type: ignore[misc]
    prune(folder, "out", process_group, split=split)


def _going_on(process_group: ProcessGroup, folder: Path, split: str) -> None:
    read: list[int] = []

    class Counted(StreamedDecoder):
        def layer(self, index: int, device: torch.device) -> nn.Module:
            read.append(index)
            return super().layer(index, device)

    streaming.StreamedDecoder = Counted  # type: ignore[misc]
    prune(folder, "out", process_group, split=split)
    assert read[:2] == [2, 3]
    if split == "equal":
        assert read == [2, 3]


def _apart(process_group: ProcessGroup, folder: Path) -> None:
    """What two processes find that died at different places: a layer less here, a number more there."""
    walk_state = DurableWalkState(folder, process_group)
    assert walk_state.layers_done == 1, "as far as both have come"
    assert walk_state.recall("kl") is None, "what one of them does not know, all must measure again"
    assert walk_state.recall("both") == 2.0
    dist.barrier()


def _everything_again(process_group: ProcessGroup, folder: Path) -> None:
    _apart(process_group, folder / "apart")
    for split in KILLED:
        _going_on(process_group, folder / split, split)


#: splits that are killed, and the families they are killed at
KILLED = {"equal": "phi", "auto": "llama"}


@pytest.mark.slow
def test_killed_processes_go_on(tmp_path: Path) -> None:
    for split, family in KILLED.items():
        (tmp_path / split).mkdir()
        source(tmp_path / split, family)
        with pytest.raises(ProcessExitedException) as killed:
            together(_dying, tmp_path / split, split)
        assert killed.value.exit_code == -signal.SIGKILL
    leader, follower = (tmp_path / "apart" / f"process-{rank}-of-2" for rank in range(2))
    shutil.copytree(tmp_path / "equal" / "work-out", tmp_path / "apart")
    for folder in (leader, follower):
        (folder / "both.json").write_text("2.0")
    (leader / "kl.json").write_text("1.0")
    (follower / "layer-00001.json").unlink()
    together(_everything_again, tmp_path)
    for split in KILLED:
        expected = prune(tmp_path / split, "one", ProcessGroup(), split=split)
        assert_close(tmp_path / split / "out", tmp_path / split / "one")
        assert (tmp_path / split / "out" / "plan.json").read_text() == expected.plan.model_dump_json()
