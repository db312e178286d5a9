"""Part `stream`: a checkpoint of gigabytes pruned in little memory, and killed half-way."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from tests.bench.materials import Materials
from tests.bench.options import Options, Shape
from tests.bench.report import Figures, Result, Skipped, protocol
from tests.bench.stream_child import GIB, Job
from tests.bench.synthetic import layer_bytes, write_checkpoint
from tests.bench.timing import bar

ROOT = Path(__file__).resolve().parents[2]
SPARSITY = 0.2
#: source, work folder and pruned checkpoint lie on the disk together
_DISK_FACTOR = 3.5

#: sha256 of each weight file
Hashes = dict[str, str]


@dataclass(frozen=True)
class Run:
    """One finished child: (share, seconds) whenever it told them, and what it measured."""

    told: tuple[tuple[float, float], ...]
    libraries_gib: float
    peak_gib: float
    seconds: float
    check_seconds: float
    check_gib: float

    def at(self, share: float) -> float:
        """Seconds at which so much was done, between two reports by proportion."""
        for (before, start), (after, stop) in pairwise(self.told):
            if before <= share <= after and after > before:
                return start + (stop - start) * (share - before) / (after - before)
        raise AssertionError(f"the child never told {share}: {self.told}")

    @property
    def first_share(self) -> float:
        """What was there when the first layer was told: one layer of all, or more in a walk that went on."""
        return next(share for share, _ in self.told if share > 0)

    @property
    def end_of_walk(self) -> float:
        return self.told[-1][1]


def run(materials: Materials, options: Options) -> Result:
    """The whole depth, half of it, and a small one that is killed."""
    layers = max(2, math.ceil(options.stream_gib * GIB / layer_bytes(options.stream_shape)))
    layers += layers % 2
    whole, half = (replace(options.stream_shape, layers=count) for count in (layers, layers // 2))
    _check_disk(options, whole)
    with _checkpoint(options, whole) as (source, size):
        deep = _prune(options, whole, source, options.scratch / "deep")
    with _checkpoint(options, half) as (source, _):
        shallow, _ = undisturbed = _hashed(options, half, source, options.scratch / "shallow")
    middle = deep.at(0.5)
    figures: Figures = {
        "stream_model_gib": size / GIB,
        "stream_peak_gib": deep.peak_gib,
        "stream_peak_gib_half_depth": shallow.peak_gib,
        "stream_libraries_gib": deep.libraries_gib,
        "stream_seconds_per_layer_first_half": middle / (layers / 2),
        "stream_seconds_per_layer_second_half": (deep.end_of_walk - middle) / (layers / 2),
        "stream_time_ratio_double_depth": deep.seconds / shallow.seconds,
        "stream_seconds": deep.seconds,
        "stream_layers": layers,
        "stream_load_check_share": deep.check_seconds / deep.seconds,
        "stream_load_check_gib": deep.check_gib,
    }
    shape = options.stream_shape
    how = protocol(
        options,
        f"random Llama, {layers} layers, hidden {shape.hidden}, FFN {shape.intermediate}, {shape.heads} heads, "
        f"vocabulary {shape.vocab}, in sharded safetensors",
        f"prune_checkpoint at {SPARSITY:.0%}, split equal, {options.stream_tokens} random tokens, seed 0, in a process "
        "of its own; peak: VmHWM of that process, libraries included",
        f"resume: {options.kill_layers} layers, SIGKILL after half of them, sha256 of all weight files",
    )
    known = undisturbed if options.kill_layers == half.layers else None
    return Result("stream", how, figures | _killed(options, known))


def _killed(options: Options, undisturbed: tuple[Run, Hashes] | None) -> Figures:
    """The same small model pruned twice, once with a kill -9 in the middle. undisturbed: the other time, if that is
    known."""
    shape, killed = replace(options.stream_shape, layers=options.kill_layers), options.scratch / "killed"
    with _checkpoint(options, shape) as (source, _):
        whole, expected = undisturbed or _hashed(options, shape, source, options.scratch / "undisturbed")
        try:
            _kill_half_way(_job(options, shape, source, killed))
            again, found = _hashed(options, shape, source, killed)
        finally:
            shutil.rmtree(killed, ignore_errors=True)
    assert expected, "the pruned checkpoint has no weight files"
    return {
        "stream_resume_equal": expected == found,
        "stream_resume_layers_left": round((1 - again.first_share) * shape.layers),
        "stream_resume_seconds_over_whole": again.seconds / whole.seconds,
    }


def _job(options: Options, shape: Shape, source: Path, folder: Path) -> Job:
    """Paths are absolute: the child starts in the project's root."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job(
        source=str(source.absolute()),
        out=str((folder / "out").absolute()),
        work=str((folder / "work").absolute()),
        vocab=shape.vocab,
        count=options.stream_tokens.count,
        length=options.stream_tokens.length,
        batch_size=options.batch_size,
        device=options.device,
        sparsity=SPARSITY,
    )


def _prune(options: Options, shape: Shape, source: Path, folder: Path, *, keep: bool = False) -> Run:
    told: list[tuple[float, float]] = []
    last = ""
    try:
        with _child(_job(options, shape, source, folder)) as child, bar(f"prune {shape.layers} layers") as progress:
            for line in _lines(child):
                last = line
                if not line.startswith("{"):
                    share, seconds, message = line.split(" ", 2)
                    told.append((float(share), float(seconds)))
                    progress(float(share), message)
        return Run(told=tuple(told), **json.loads(last))
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _hashed(options: Options, shape: Shape, source: Path, folder: Path) -> tuple[Run, Hashes]:
    """A finished child and the hashes of the weight files that it wrote."""
    try:
        return _prune(options, shape, source, folder, keep=True), _weight_hashes(folder / "out")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kill_half_way(job: Job) -> None:
    """SIGKILL in the middle of the layer that follows the first half."""
    with _child(job, killed=True) as child:
        before = 0.0
        for line in _lines(child):
            share, seconds = (float(word) for word in line.split(" ", 2)[:2])
            if share >= 0.5:
                time.sleep((seconds - before) / 2)
                child.kill()
                return
            before = seconds


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    assert child.stdout is not None
    for line in child.stdout:
        yield line.rstrip("\n")


@contextmanager
def _child(job: Job, *, killed: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Its errors go to our standard error. Raises RuntimeError when it ends otherwise than expected."""
    child = subprocess.Popen(job.arguments(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield child
        child.wait()
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()
    if (child.returncode == -9) != killed or child.returncode not in (0, -9):
        raise RuntimeError(f"the child that prunes {job.source} ended with {child.returncode}: see its errors above")


@contextmanager
def _checkpoint(options: Options, shape: Shape) -> Iterator[tuple[Path, int]]:
    """A checkpoint folder for the length of the block, and its size in bytes."""
    folder = options.scratch / f"random-{shape.layers}"
    try:
        with bar(f"write a model of {shape.layers} layers") as progress:
            size = write_checkpoint(folder, shape, progress)
        yield folder, size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_disk(options: Options, shape: Shape) -> None:
    wanted = _DISK_FACTOR * shape.layers * layer_bytes(shape) / GIB
    free = shutil.disk_usage(options.scratch).free / GIB
    if free < wanted:
        raise Skipped(f"it needs {wanted:.1f} GiB of disk and has {free:.1f}; lower --stream-gib or give --scratch")


def _weight_hashes(folder: Path) -> Hashes:
    hashes = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            hashes[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
