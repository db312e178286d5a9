"""The device a figure was measured on: its name, and its power and utilisation while a model generates, where the
driver reports them; nothing is made up where not. Importable without torch, which costs seconds."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from evaluation.profile.timed_generation import Clock


@dataclass(frozen=True)
class Reading:
    """What a device says at one moment: watts, and the share of time in which it computed, in percent."""

    power_w: float | None = None
    utilization_percent: float | None = None


Meter = Callable[[], Reading]

_SETTLE_S = 1.0
"""NVML reports means of up to the last second: earlier readings would be of what ran before."""

_SAMPLE_S = 2.0
_INTERVAL_S = 0.1


def device_name(device: str) -> str:
    """The model name of a device, "cpu" or "cuda:0" and the like. For the CPU it costs no import of torch."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return processor_name() if device == "cpu" else device


def processor_name() -> str:
    """The model name of the host's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def meter_of(devices: tuple[torch.device, ...]) -> Meter | None:
    """A meter over all the devices that a model is on: watts summed, utilisation averaged. None where the driver
    not CUDA (or ROCm), or the package nvidia-ml-py is not installed."""
    if not devices or any(device.type != "cuda" for device in devices):
        return None
    import torch

    def read() -> Reading:
        shares = [_answer(torch.cuda.utilization, device) for device in devices]
        known, known_shares = _all_known([_watts(device) for device in devices]), _all_known(shares)
        return Reading(
            power_w=sum(known) if known else None,
            utilization_percent=statistics.fmean(known_shares) if known_shares else None,
        )

    return None if read() == Reading() else read


def mean_reading(meter: Meter, work: Callable[[], object], *, clock: Clock = time.monotonic) -> Reading:
    """Repeat `work` for three seconds; means of the readings of all but the first, each quantity over those that have
    it."""
    started = clock()
    while clock() - started < _SETTLE_S:
        work()
    with _readings(meter) as readings:
        started = clock()
        while clock() - started < _SAMPLE_S:
            work()
    watts = [reading.power_w for reading in readings if reading.power_w is not None]
    shares = [reading.utilization_percent for reading in readings if reading.utilization_percent is not None]
    return Reading(statistics.fmean(watts) if watts else None, statistics.fmean(shares) if shares else None)


@contextmanager
def _readings(meter: Meter) -> Iterator[list[Reading]]:
    """Readings are taken beside the block, and one at its end."""
    readings: list[Reading] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_INTERVAL_S):
            readings.append(meter())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield readings
        readings.append(meter())
    finally:
        done.set()
        thread.join()


def _watts(device: torch.device) -> float | None:
    """torch gives the power of NVIDIA's devices in milliwatts, and of AMD's in watts with 0 for what is not known."""
    import torch

    power = _answer(torch.cuda.power_draw, device)
    if torch.version.hip:
        return power or None
    return None if power is None else power / 1000


def _answer(ask: Callable[[torch.device], object], device: torch.device) -> float | None:
    """NVML has an error for each thing that a device does not know, torch one for a package that is not there, and
    AMD's library the word "N/A"."""
    try:
        answer = ask(device)
    except Exception:  # of classes that exist only where NVML does
        return None
    return answer if isinstance(answer, int | float) else None


def _all_known(values: list[float | None]) -> list[float]:
    """The values, or none of them if one is not known: a sum over a part of the devices would be no figure."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
