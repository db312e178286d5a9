"""Power and utilisation of a device while a model generates, where the device tells; nothing is made up where not."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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


def meter_of(devices: tuple[torch.device, ...]) -> Meter | None:
    """A meter over all the devices that a model is on: watts summed, utilisation averaged. None where they do not tell:
    not CUDA (or ROCm), or the package nvidia-ml-py is not installed."""
    if not devices or any(device.type != "cuda" for device in devices):
        return None

    def read() -> Reading:
        shares = [_told(torch.cuda.utilization, device) for device in devices]
        known, known_shares = _all_known([_watts(device) for device in devices]), _all_known(shares)
        return Reading(
            power_w=sum(known) if known else None,
            utilization_percent=statistics.fmean(known_shares) if known_shares else None,
        )

    return None if read() == Reading() else read


def mean_reading(meter: Meter, work: Callable[[], object], *, clock: Clock = time.monotonic) -> Reading:
    """Repeat `work` for three seconds; means of the readings of all but the first."""
    samples = _Samples()
    started = clock()
    while clock() - started < _SETTLE_S:
        work()
    with _sampled(meter, samples):
        started = clock()
        while clock() - started < _SAMPLE_S:
            work()
    return samples.mean()


@dataclass
class _Samples:
    readings: list[Reading] = field(default_factory=list)

    def mean(self) -> Reading:
        """Each quantity over the readings that have it."""
        watts = [reading.power_w for reading in self.readings if reading.power_w is not None]
        shares = [reading.utilization_percent for reading in self.readings if reading.utilization_percent is not None]
        return Reading(statistics.fmean(watts) if watts else None, statistics.fmean(shares) if shares else None)


@contextmanager
def _sampled(meter: Meter, samples: _Samples) -> Iterator[None]:
    """Readings are taken beside the block, and one at its end."""
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_INTERVAL_S):
            samples.readings.append(meter())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
        samples.readings.append(meter())
    finally:
        done.set()
        thread.join()


def _watts(device: torch.device) -> float | None:
    """torch tells NVIDIA's devices in milliwatts, and AMD's in watts with 0 for what it does not know."""
    told = _told(torch.cuda.power_draw, device)
    if torch.version.hip:
        return told or None
    return None if told is None else told / 1000


def _told(ask: Callable[[torch.device], object], device: torch.device) -> float | None:
    """NVML has an error for each thing that a device does not know, torch one for a package that is not there, and
    AMD's library the word "N/A"."""
    try:
        told = ask(device)
    except Exception:  # of classes that exist only where NVML does
        return None
    return told if isinstance(told, int | float) else None


def _all_known(values: list[float | None]) -> list[float]:
    """The values, or none of them if one is not known: a sum over a part of the devices would be no figure."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
