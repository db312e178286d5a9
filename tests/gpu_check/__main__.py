"""python -m tests.gpu_check [--device cuda:0] [--out build] [--help]"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from infra.provenance import git_revision, versions
from tests.gpu_check.agreement import agreement_of_family, resume_is_equal, two_processes_agree
from tests.gpu_check.full_speed import BILLION, SMALL, full_speed
from tests.tiny import FAMILIES, LATER_FAMILIES

#: most of a difference that another order of sums explains
_MOST = {"logits": 1e-3, "perplexity": 1e-3, "lora_loss": 1e-2}


def main(arguments: list[str] | None = None) -> int:
    """Run all; returns 1 if something differs."""
    options = _options(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    device, started = torch.device(options.device), time.perf_counter()
    figures: dict[str, Any] = {"machine": _machine(device), "dry_run": device.type == "cpu", "families": {}}
    with tempfile.TemporaryDirectory(prefix="slimline-gpu-check-") as folder:
        for family in options.families:
            figures["families"][family] = agreement_of_family(family, device, Path(folder) / family)
        figures["resume_equal"] = resume_is_equal(device, Path(folder) / "resume")
        figures["two_processes_equal"] = two_processes_agree(device, Path(folder) / "group")
        shape = SMALL if device.type == "cpu" else BILLION
        figures["full_speed"] = full_speed(shape, device, Path(folder) / "speed")
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["failures"] = failures(figures)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(report(figures))
    return 1 if figures["failures"] else 0


def failures(figures: dict[str, Any]) -> list[str]:
    """What differs from the CPU by more than rounding, a sentence each."""
    found = []
    for family, values in figures["families"].items():
        if not values["plan_equal"]:
            found.append(f"{family}: another plan")
        found += [
            f"{family}: {name} differs by {values[name]:.2g}" for name in _MOST if not values[name] <= _MOST[name]
        ]
    words = {"resume_equal": "a killed walk ended with other weights", "two_processes_equal": "two processes disagree"}
    return found + [sentence for name, sentence in words.items() if figures[name] is False]


def report(figures: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# slimline gpu-check", "", *(f"* {name}: {value}" for name, value in figures["machine"].items())]
    lines += ["* a dry run on the CPU: it compares the CPU with itself"] if figures["dry_run"] else []
    lines += ["", "| family | plan | logits | perplexity | LoRA loss |", "|---|---|---|---|---|"]
    for family, values in figures["families"].items():
        shown = " | ".join(f"{values[name]:.1e}" for name in _MOST)
        lines.append(f"| {family} | {'equal' if values['plan_equal'] else 'DIFFERS'} | {shown} |")
    shown = {True: "equal", False: "DIFFER", None: "not tried: fewer than two GPUs"}
    lines += ["", f"Weights after a kill: {shown[figures['resume_equal']]}. Two processes: "]
    lines[-1] += f"{shown[figures['two_processes_equal']]}."
    speed = figures["full_speed"]
    lines += ["", f"## {speed['protocol']}", "", "| part | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in speed["seconds"].items()]
    lines += ["", *(f"* {name}: {value}" for name, value in speed.items() if name not in ("protocol", "seconds"))]
    lines += ["", *(f"FAILED: {sentence}" for sentence in figures["failures"]), f"{figures['seconds']} s in all."]
    return "\n".join(lines) + "\n"


def _machine(device: torch.device) -> dict[str, Any]:
    libraries = versions()
    found: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "transformers": libraries.get("transformers", "unknown"),
        "slimline": git_revision() or libraries.get("slimline", "unknown"),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return found


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description="Does this GPU give the same?")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of gpu.json (%(default)s)")
    parser.add_argument("--families", type=_names, default=(*FAMILIES, *LATER_FAMILIES), metavar="NAME,NAME")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
