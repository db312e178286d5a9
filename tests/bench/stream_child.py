"""The process that prunes a checkpoint folder and nothing else, so that its peak memory is the pruning's own.

    python -m tests.bench.stream_child '{"source": ..., ...}'

It prints a line "share seconds message" whenever progress is told and at its end one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pruning.checkpoints.load_check import check_pruned
from pruning.layerwise import streaming
from pruning.methods import slimgpt
from pruning.modeling import class_of
from pruning.walk.options import WalkOptions
from tests.bench.options import Windows
from tests.bench.random_tokens import random_calibration

GIB = 2**30


@dataclass(frozen=True)
class Job:
    """What the child is told."""

    source: str
    out: str
    work: str
    vocab: int
    count: int
    length: int
    batch_size: int
    device: str
    sparsity: float = 0.2

    def arguments(self) -> list[str]:
        return [sys.executable, "-m", "tests.bench.stream_child", json.dumps(asdict(self))]


def high_water_gib() -> float:
    """Peak resident memory of this process: VmHWM, since Linux lets a child inherit its parent's ru_maxrss."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # macOS: bytes, and nothing inherited


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    class_of("llama")  # imports the modelling code, which is neither the pruning's time nor its memory
    libraries = high_water_gib()
    calibration = random_calibration(job.vocab, Windows(job.count, job.length))
    start = time.perf_counter()

    def report(share: float, message: str) -> None:
        sys.stdout.write(f"{share:.6f} {time.perf_counter() - start:.3f} {message}\n")
        sys.stdout.flush()

    check: dict[str, float] = {}

    def timed_check(*arguments: Any) -> None:
        before, began = high_water_gib(), time.perf_counter()
        check_pruned(*arguments)
        check["check_seconds"] = time.perf_counter() - began
        check["check_gib"] = high_water_gib() - before

    streaming.check_pruned = timed_check
    report(0.0, "start")
    streaming.prune_checkpoint(
        Path(job.source),
        Path(job.out),
        slimgpt,
        calibration,
        slimgpt.Config(sparsity=job.sparsity, split="equal"),
        options=WalkOptions(torch.device(job.device), batch_size=job.batch_size),
        work=Path(job.work),
        progress=report,
    )
    measured = {
        "libraries_gib": libraries,
        "peak_gib": high_water_gib(),
        "seconds": time.perf_counter() - start,
        **check,
    }
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
