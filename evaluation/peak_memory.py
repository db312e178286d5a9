"""Peak memory on CPU, taken in a process that loads and runs one model and nothing else.

    python -m evaluation.peak_memory FOLDER '{"prompt_len": 128}' transformers:LlamaForCausalLM

A worker's own high-water mark would include every model it held before. The child reads VmHWM and not
getrusage's ru_maxrss, because Linux lets a child inherit its parent's ru_maxrss across fork and exec.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from evaluation.errors import EvaluationError
from evaluation.profile_config import GridPoint, ProfileConfig
from evaluation.profile_report import ProfileReport
from evaluation.report import GIB
from evaluation.suite import Progress, silent

log = logging.getLogger("slimline")


class PeakMemory(BaseModel):
    """GiB of resident memory at its highest: after all imports, and after loading the model and one run of it.

    `model_gib`, the difference, is what the model itself costs; the libraries take a few hundred MiB.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    libraries_gib: float
    peak_gib: float

    @property
    def model_gib(self) -> float:
        """The peak without the libraries."""
        return self.peak_gib - self.libraries_gib


def peak_resident_gib(folder: Path, config: ProfileConfig, model_class: str) -> PeakMemory:
    """Load the checkpoint in `folder` in a fresh process, in the dtype it was saved in, and run it once.

    config: of one grid point; compiled or not, the plain forward pass is run, for the compiler's own memory is not the
    model's. model_class: where the child finds the model's class, "module:name"; code that lies in the folder is not
    run.
    Raises EvaluationError if the process fails, with its last words.
    """
    command = [sys.executable, "-m", "evaluation.peak_memory", str(folder.resolve()), config.model_dump_json()]
    command += [model_class]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EvaluationError(f"peak memory of {folder} could not be measured: {words[-1]}")
    return PeakMemory.model_validate_json(done.stdout.splitlines()[-1])


def with_resident_peaks(
    report: ProfileReport, folder: Path, config: ProfileConfig, *, model_class: str, progress: Progress = silent
) -> ProfileReport:
    """The report with the peak memory of each grid point that has none and that did fit, one process each.

    A child that fails, since the machine has not the memory for another copy of the model or for other reasons, costs
    its own figure only, with a line in the log.
    """
    points = []
    for index, point in enumerate(report.points):
        if point.speed is not None and point.peak_memory_gib is None:
            progress(index / len(report.points), "peak memory")
            size = GridPoint(**point.model_dump(include=set(GridPoint.model_fields)))
            try:
                peak = peak_resident_gib(folder, at_point(config, size), model_class).model_gib
            except EvaluationError as error:
                log.warning("%s; the report has no peak memory for %s", error, point.task)
                peak = None
            point = point.model_copy(update={"peak_memory_gib": peak})
        points.append(point)
    return report.model_copy(update={"points": tuple(points)})


def at_point(config: ProfileConfig, point: GridPoint) -> ProfileConfig:
    """The same options for one grid point alone."""
    sizes = {name: (getattr(point, name),) for name in ("batch_size", "prompt_len", "new_tokens")}
    return config.model_copy(update=sizes)


def main(arguments: list[str] | None = None) -> None:
    """The child: prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.peak_memory")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=ProfileConfig.model_validate_json)
    parser.add_argument("model_class")
    given = parser.parse_args(arguments)

    import torch

    from evaluation.compiling import set_attention_
    from evaluation.generation import Runner, random_prompt, timed_run

    module, _, name = given.model_class.partition(":")
    model_class: Any = getattr(importlib.import_module(module), name)
    shape = model_class.config_class.from_pretrained(given.folder, local_files_only=True)
    with torch.device("meta"):  # imports all that the model needs, allocates nothing
        model_class(shape)
    libraries = _high_water_gib()
    model = model_class.from_pretrained(
        given.folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    set_attention_(model, given.config.attn_implementation)
    runner, (point,) = Runner(model, model), given.config.points
    timed_run(runner, random_prompt(model, point, given.config.seed), point.new_tokens)
    measured = PeakMemory(libraries_gib=libraries, peak_gib=_high_water_gib())
    sys.stdout.write(measured.model_dump_json() + "\n")


def _high_water_gib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GIB
    # macOS counts bytes and does not let a child inherit the mark.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


if __name__ == "__main__":
    main()
