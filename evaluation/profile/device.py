"""The name of the device a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def device_name(device: str) -> str:
    """The model name of a device, "cpu" or "cuda:0" and the like. For the CPU it costs no import of torch."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return _cpu_name() if device == "cpu" else device


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()
