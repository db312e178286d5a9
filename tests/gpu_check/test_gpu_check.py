"""The check of a GPU runs, says what it found, and finds what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu_check.__main__ import failures, main


def test_a_dry_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path), "--families", "llama"]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_bytes())
    assert figures["families"] == {"llama": {"plan_equal": True, "logits": 0, "perplexity": 0, "lora_loss": 0}}
    assert figures["resume_equal"] is True
    assert figures["two_processes_equal"] is None
    seconds = figures["full_speed"]["seconds"]
    assert set(seconds) == {"read", "forward", "hessian", "solve", "write", "all", "all, each part waited for"}
    assert all(value > 0 for value in seconds.values())
    assert figures["failures"] == []
    told = capsys.readouterr().out
    assert "| llama | equal | 0.0e+00 |" in told
    assert "a dry run on the CPU" in told
    figures["families"]["llama"] |= {"plan_equal": False, "logits": float("nan")}
    assert failures(figures | {"resume_equal": False}) == [
        "llama: another plan",
        "llama: logits differs by nan",
        "a killed walk ended with other weights",
    ]
