"""Memory on CPU: what a generation takes at least and what there is, and the peak, taken in a process that loads and
runs one model and nothing else.

    python -m evaluation.profile.peak_memory FOLDER '{"prompt_len": 128}' transformers:LlamaForCausalLM

A worker's own high-water mark would include every model it held before. The child reads VmHWM and not
getrusage's ru_maxrss, because Linux lets a child inherit its parent's ru_maxrss across fork and exec.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from evaluation.errors import EvaluationError
from evaluation.inference.options import Progress, silent
from evaluation.profile.child import end_with_parent, last_line_of
from evaluation.profile.config import GridPoint, ProfileConfig
from evaluation.profile.report import ProfileReport
from evaluation.report import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("slimline")

_GROUPS_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_GROUPS_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")
"""Where control groups are, their files of limit and usage, and what their statistics' names begin with."""


class PeakMemory(BaseModel, frozen=True, extra="forbid"):
    """GiB of resident memory at its highest: after all imports, and after loading the model and one run of it.

    `model_gib`, the difference, is what the model itself costs; the libraries take a few hundred MiB.
    """

    libraries_gib: float
    peak_gib: float

    @property
    def model_gib(self) -> float:
        """The peak without the libraries."""
        return self.peak_gib - self.libraries_gib


def least_bytes(models: Sequence[PreTrainedModel], point: GridPoint) -> int:
    """What generations of these models, all at once, take at least beside the weights: keys and values of all tokens
    but the last, the keys of a layer once more while one is added to them, and a token's logits."""
    from evaluation.profile.sizes import attention_shapes

    caches, extras = 0, list[int]()
    for model in models:
        length = point.prompt_len + point.new_tokens - 1
        window = getattr(model.config, "sliding_window", None) or length
        tokens = point.batch_size * min(length, window)
        layers = [shape.cache_bytes_per_token for shape in attention_shapes(model)]
        caches += tokens * sum(layers)
        logits = point.batch_size * int(model.config.vocab_size) * model.dtype.itemsize
        extras.append(logits + (tokens * min(layers) // 2 if point.new_tokens > 1 else 0))
    return caches + max(extras)


def available_bytes(root: Path = Path("/")) -> float:
    """Memory that this process may still fill: what the kernel calls available, and no more than the limits of the
    control groups that it is in leave. Infinite where the system does not say."""
    available = _numbers(root / "proc/meminfo").get("MemAvailable:", math.inf)
    return min([1024 * available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit less usage of each group up to the root, with the files' pages in it, which the kernel drops first."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage, prefix = _GROUPS_V1 if controllers else _GROUPS_V2
        group = Path(path.lstrip("/"))
        for folder in (root / mount / each for each in (group, *group.parents)):
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            except (OSError, ValueError):  # not there, or "max"
                continue
            pages = _numbers(folder / "memory.stat")
            yield left + pages.get(f"{prefix}active_file", 0) + pages.get(f"{prefix}inactive_file", 0)


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def peak_resident_gib(folder: Path, config: ProfileConfig, model_class: str) -> PeakMemory:
    """Load the checkpoint in `folder` in a fresh process, in the dtype it was saved in, and run it once.

    config: of one grid point; compiled or not, the plain forward pass is run, for the compiler's own memory is not the
    model's. model_class: where the child finds the model's class, "module:name"; code that lies in the folder is not
    run.
    Raises EvaluationError if the process fails, with its last words.
    """
    arguments = [str(folder.resolve()), config.model_dump_json(), model_class]
    told = last_line_of("evaluation.profile.peak_memory", arguments, f"peak memory of {folder}")
    return PeakMemory.model_validate_json(told)


def with_resident_peaks(
    report: ProfileReport, folder: Path, config: ProfileConfig, *, model_class: str, progress: Progress = silent
) -> ProfileReport:
    """The report with the peak memory of each grid point that has none and that did fit, one process each; as it is if
    the figures are not the CPU's.

    A child that fails, since the machine has not the memory for another copy of the model or for other reasons, costs
    its own figure only, with a line in the log.
    """
    if not report.device.startswith("cpu"):
        return report
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
    parser = argparse.ArgumentParser(prog="python -m evaluation.profile.peak_memory")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=ProfileConfig.model_validate_json)
    parser.add_argument("model_class")
    given = parser.parse_args(arguments)
    end_with_parent()

    import torch

    from evaluation.profile.compilation import set_attention_
    from evaluation.profile.timed_generation import Runner, random_prompt, timed_run

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
