"""Where a stage may compute: the devices of this machine, and what they are called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.profile.device import processor_name
from infra.errors import SettingsInvalid

if TYPE_CHECKING:
    import torch

BALANCED = "balanced"
#: one of them is there wherever torch can have a CUDA device: NVIDIA on Linux, in a container, on Tegra; ROCm; WSL2
GPU_DRIVERS = (
    *("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvgpu", "/dev/nvhost-gpu"),
    *("/dev/kfd", "/dev/dxg"),
)


@dataclass(frozen=True)
class Placement:
    """Where a stage puts its model: on one device, or (device_map) spread over all of them.

    device: where computation happens, for a spread model the first device. accelerators: what the host calls the
    devices it computes on; none for the CPU.
    """

    device: torch.device
    device_map: str | None = None
    accelerators: tuple[str, ...] = ()

    @property
    def load(self) -> dict[str, Any]:
        """Keyword arguments for load_checkpoint."""
        return {"device_map": self.device_map} if self.device_map else {"device": self.device}


def accelerator_name(device: str) -> str | None:
    """What a device is called on its host, whatever CUDA_VISIBLE_DEVICES makes of it; None for the CPU, which several
    processes may use at once."""
    import torch

    if device.startswith("cuda"):
        return f"cuda-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    return None if torch.device(device).type in ("cpu", "meta") else device


def device_names(setting: str) -> tuple[str, ...]:
    """Torch device names for a setting: "auto" is every CUDA device, or the CPU if there is none; "balanced" the same,
    each model spread over them. Raises SettingsInvalid for a device this machine does not have."""
    import torch

    if torch.cuda.device_count():
        _let_segments_grow()
    if setting in ("auto", BALANCED):
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)
    if setting.startswith("cuda"):
        index = int(setting.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise SettingsInvalid(
                f"SLIMLINE_DEVICE={setting}: this machine has {torch.cuda.device_count()} CUDA devices; "
                f"set it to auto, balanced, cpu or one of them"
            )
        return (f"cuda:{index}",)
    try:
        torch.empty(0, device=setting)
    except (RuntimeError, AssertionError) as error:
        raise SettingsInvalid(
            f"SLIMLINE_DEVICE={setting}: torch has no such device here; set it to auto or cpu"
        ) from error
    return (setting,)


def _let_segments_grow() -> None:
    """Let CUDA's allocator, before its first use in this process or a child of it, grow its segments instead of keeping
    pieces that fit nothing: batches, Hessians and layers differ in size. What the user has set is left."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # its name since torch 2.9
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def device_label(setting: str) -> str:
    """What a profile is a profile of: the name of the accelerator, or of the processor and its number of cores."""
    cpu = f"cpu {processor_name()} ({os.cpu_count()} cores)"
    # torch costs seconds to import and a fully cached run does not need it: no driver, no CUDA device
    if setting == "cpu" or (setting in ("auto", BALANCED) and not any(Path(path).exists() for path in GPU_DRIVERS)):
        return cpu
    import torch

    names = device_names(setting)
    if names[0] == "cpu":
        return cpu
    if not names[0].startswith("cuda"):
        return f"{names[0]} {processor_name()}"
    name = str(torch.cuda.get_device_name(names[0]))
    return f"{len(names)} x {name} (balanced)" if setting == BALANCED and len(names) > 1 else name
