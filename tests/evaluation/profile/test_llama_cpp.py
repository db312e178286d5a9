"""Size and speed of a GGUF file: what is said without llama.cpp, and what its wheel measures where it is installed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from evaluation.errors import EvaluationError
from evaluation.profile import llama_cpp
from evaluation.profile.config import FileProfileConfig
from evaluation.profile.report import NO_RUNTIME, FileProfile, Speed, Timing, read_profile

CONFIG = FileProfileConfig(prompt_len=8, new_tokens=4, warmup=0, runs=2)


def test_without_llama_cpp_the_size_is_all(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x" * 1000)
    report = llama_cpp.profile_file(tmp_path / "model.gguf", CONFIG, runtime="", threads=1)
    assert {(row.task, row.metric): row.value for row in report.metrics()} == {("profile", "file_bytes"): 1000}
    assert report.conditions() == {"runtime": f"none, so no tokens/s: {NO_RUNTIME}"}
    assert read_profile(report.model_dump_json()) == report


def test_another_llama_cpp_than_planned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    monkeypatch.setattr(llama_cpp, "installed_runtime", lambda: "")
    with pytest.raises(EvaluationError, match="planned with xllamacpp 1 on a, and there is none here: run it again"):
        llama_cpp.profile_file(tmp_path / "model.gguf", CONFIG, runtime="xllamacpp 1 on a", threads=1)


def test_speed_is_counted_as_that_of_a_checkpoint() -> None:
    speed = llama_cpp._speed([(10.0, 30.0), (20.0, 60.0)], new_tokens=4)
    assert (speed.prefill_ms, speed.latency_ms) == (Timing(p50=15, p90=19), Timing(p50=60, p90=76))
    assert speed.decode_ms_per_token == Timing(p50=15, p90=19)
    assert speed.tokens_per_s == pytest.approx(4000 / 60)
    report = FileProfile(file_bytes=9, runtime="a", threads=2, speed=speed, **CONFIG.model_dump())
    rows = {(row.task, row.metric): row for row in report.metrics()}
    assert rows["profile llama.cpp", "tokens_per_s"].higher_is_better
    assert rows["profile llama.cpp", "tokens_per_s"].num_examples == 2
    assert not rows["profile", "file_bytes"].higher_is_better
    assert report.conditions() == {"runtime": "a", "threads": 2, **CONFIG.model_dump()}


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp's wheel is not installed")
def test_llama_cpp_times_a_file(tmp_path: Path) -> None:
    from tasks.exporting.gguf import export_gguf
    from tests.tasks.exporting.kinds import write_checkpoint

    write_checkpoint(tmp_path / "checkpoint", "llama", "uneven")
    export_gguf(tmp_path / "checkpoint", tmp_path / "model.gguf", {}, "f16")
    runtime = llama_cpp.installed_runtime()
    assert re.match(r"xllamacpp \d", runtime)
    report = llama_cpp.profile_file(tmp_path / "model.gguf", CONFIG, runtime=runtime, threads=1)
    assert isinstance(report.speed, Speed)
    assert report.speed.tokens_per_s > 0
    assert report.file_bytes == (tmp_path / "model.gguf").stat().st_size
    (tmp_path / "broken.gguf").write_bytes(json.dumps({}).encode())
    with pytest.raises(EvaluationError, match=r"speed with .*broken\.gguf could not be measured"):
        llama_cpp.profile_file(tmp_path / "broken.gguf", CONFIG, runtime=runtime, threads=1)
