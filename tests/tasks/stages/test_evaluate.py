"""The evaluation stage: reports and samples side by side, equal in one process and in several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.inference.replicas import ReplicaProcesses
from evaluation.report import EvalReport
from evaluation.samples import read_samples
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.errors import SourceMissing
from infra.settings import Settings
from infra.sources.find import Sources
from pruning.checkpoints.save_load import save_checkpoint
from tasks.devices.model_cache import evict
from tasks.devices.placement import Placement
from tasks.devices.pool import DevicePool
from tasks.execution import stage
from tasks.execution.context import RunContext, StageContext
from tasks.execution.stage import run_stage
from tasks.requests import EvaluateRequest
from tasks.stages.evaluate import MISSING, fill
from tasks.stages.pairs import SAMPLES_FILE
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # not in `make test-fast`

CHECKPOINT, OTHER = (ArtifactRef(kind="checkpoint", key=f"checkpoint-v1-{digit * 16}") for digit in "ab")


@pytest.fixture
def run_context(tmp_path: Path) -> RunContext:
    settings = Settings(home=tmp_path / "home", device="cpu")
    store = ArtifactStore(settings.store_root)
    for seed, ref in enumerate((CHECKPOINT, OTHER)):
        with store.writing(ref, request={}, versions={}) as folder:
            save_checkpoint(tiny_model("llama", seed=seed), tiny_tokenizer(), folder)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    return RunContext(settings, Sources((), None, False, home=settings.home))


def asked(tmp_path: Path, suite: str, window: int = 32, **more: Any) -> EvaluateRequest:
    config = {"dataset": str(tmp_path / "text.txt"), "config": None, "split": "train", "windows": [window]}
    return EvaluateRequest(plugin=suite, **{"checkpoint": CHECKPOINT, "config": config, "sources": ({},), **more})


def fill_one(request: EvaluateRequest, run_context: RunContext, folder: Path, **settings: Any) -> EvalReport:
    folder.mkdir()
    changed = RunContext(run_context.settings.model_copy(update=settings), run_context.sources)
    place = Placement(torch.device("cpu"))
    fill(request, StageContext(changed, folder, request.ref, place, lambda share, message: None))
    return EvalReport.model_validate_json((folder / "report.json").read_text())


def filled(request: EvaluateRequest, run_context: RunContext, folder: Path, **settings: Any) -> EvalReport:
    """Nothing stays."""
    try:
        return fill_one(request, run_context, folder, **settings)
    finally:
        evict()


@pytest.fixture
def crews(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ReplicaProcesses]]:
    """Every crew that is started."""
    started: list[ReplicaProcesses] = []
    start = ReplicaProcesses.start

    def noted(self: ReplicaProcesses) -> None:
        started.append(self)
        start(self)

    monkeypatch.setattr(ReplicaProcesses, "start", noted)
    yield started
    evict()


def test_several_processes_and_batch_sizes_measure_the_same(run_context: RunContext, tmp_path: Path) -> None:
    request = asked(tmp_path, "perplexity")
    alone = filled(request, run_context, tmp_path / "alone")
    together = filled(request, run_context, tmp_path / "together", eval_processes=2, eval_batch_size=3)
    (metric,), (same,) = alone.metrics, together.metrics
    assert same.value == pytest.approx(metric.value, rel=1e-6)
    samples = [read_samples(tmp_path / name / SAMPLES_FILE) for name in ("alone", "together")]
    assert [sample.item_hash for sample in samples[0]] == [sample.item_hash for sample in samples[1]]
    assert len(samples[0]) == metric.num_examples


@pytest.mark.usefixtures("forked")
def test_suites_of_one_checkpoint_share_their_processes(
    run_context: RunContext, tmp_path: Path, crews: list[ReplicaProcesses]
) -> None:
    request = asked(tmp_path, "perplexity")
    alone = filled(request, run_context, tmp_path / "alone")
    reports = [fill_one(request, run_context, tmp_path / str(number), eval_processes=2) for number in range(2)]
    assert [report.metrics[0].value for report in reports] == pytest.approx([alone.metrics[0].value] * 2, rel=1e-6)
    assert len(crews) == 1
    assert crews[0].alive
    fill_one(asked(tmp_path, "perplexity", checkpoint=OTHER), run_context, tmp_path / "other", eval_processes=2)
    assert [replicas.alive for replicas in crews] == [False, True]


@pytest.mark.usefixtures("forked")
def test_stages_on_all_devices_hand_their_processes_on(
    run_context: RunContext, tmp_path: Path, crews: list[ReplicaProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And have none any more when the first device is given back."""
    alive: list[bool] = []

    @contextmanager
    def lease(name: str, wait: bool) -> Iterator[bool]:
        try:
            yield True
        finally:
            alive.append(any(replicas.alive for replicas in crews))

    places = DevicePool(tuple(Placement(torch.device("cpu"), accelerators=(name,)) for name in "ab"), lease)
    monkeypatch.setattr(stage, "pool", lambda *setting: places)
    monkeypatch.setenv("SLIMLINE_HOME", str(run_context.settings.home))
    several = RunContext(run_context.settings.model_copy(update={"eval_processes": 2}), run_context.sources)
    requests = [asked(tmp_path, "perplexity", window) for window in (16, 32)]
    with ThreadPoolExecutor(2) as threads, places.all():
        done = [
            threads.submit(run_stage, request, "evaluate", several, fill, devices="evaluation") for request in requests
        ]
        while len(places._queue) < len(requests):
            time.sleep(0.01)
    for one in done:
        one.result()
    assert len(crews) == 1
    assert alive == [False] * 4, "before the suites and after them"


def test_a_comparison_gets_both_models(run_context: RunContext, tmp_path: Path) -> None:
    report = filled(asked(tmp_path, "agreement", reference=OTHER), run_context, tmp_path / "report")
    assert next(metric.value for metric in report.metrics if metric.metric == "kl@32") > 0
    same = filled(asked(tmp_path, "agreement", reference=CHECKPOINT), run_context, tmp_path / "same")
    assert next(metric.value for metric in same.metrics if metric.metric == "kl@32") == pytest.approx(0, abs=1e-6)


def test_the_reference_is_part_of_the_key_where_there_is_one(tmp_path: Path) -> None:
    request = asked(tmp_path, "agreement", reference=OTHER)
    assert request.inputs == (CHECKPOINT, OTHER)
    assert request.ref.key != asked(tmp_path, "agreement", reference=CHECKPOINT).ref.key
    assert "reference" not in asked(tmp_path, "perplexity").model_dump()


def test_data_that_was_missing_fails_before_a_model_is_loaded(run_context: RunContext, tmp_path: Path) -> None:
    lost = asked(tmp_path, "zero_shot", sources=({MISSING: "aps/super_glue"},), config={"tasks": ["boolq"]})
    with pytest.raises(SourceMissing, match="aps/super_glue"):
        filled(lost, run_context, tmp_path / "lost")
    found = asked(tmp_path, "perplexity", sources=({MISSING: str(tmp_path / "text.txt")},))
    with pytest.raises(SourceMissing, match="is there now"):
        filled(found, run_context, tmp_path / "found")
