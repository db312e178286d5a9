"""Peak memory on CPU, taken in a process that loads and runs one model and nothing else.

    python -m evaluation.peak_memory FOLDER '{"prompt_len": 128}' [--trust-remote-code]

A worker's own high-water mark would include every model it held before. The child reads VmHWM and not
getrusage's ru_maxrss, because Linux lets a child inherit its parent's ru_maxrss across fork and exec.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evaluation.errors import EvaluationError
from evaluation.profile_config import ProfileConfig
from evaluation.report import GIB


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


def peak_resident_gib(folder: Path, config: ProfileConfig, *, trust_remote_code: bool) -> PeakMemory:
    """Load the checkpoint in `folder` in a fresh process, in the dtype it was saved in, and run it once.

    `trust_remote_code` runs the modelling file that lies in the folder (checkpoints with uneven layers need it): say
    yes only for a folder you made. Raises EvaluationError if the process fails, with its last words.
    """
    command = [sys.executable, "-m", "evaluation.peak_memory", str(folder.resolve()), config.model_dump_json()]
    command += ["--trust-remote-code"] if trust_remote_code else []
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EvaluationError(f"peak memory of {folder} could not be measured: {words[-1]}")
    return PeakMemory.model_validate_json(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """The child: prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.peak_memory")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=ProfileConfig.model_validate_json)
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args(arguments)

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from evaluation.generation import random_prompt, timed_run

    trust = given.trust_remote_code
    shape = AutoConfig.from_pretrained(given.folder, local_files_only=True, trust_remote_code=trust)
    with torch.device("meta"):  # imports the modelling code, allocates nothing
        AutoModelForCausalLM.from_config(shape, trust_remote_code=trust)
    libraries = _high_water_gib()
    model = AutoModelForCausalLM.from_pretrained(
        given.folder, dtype="auto", local_files_only=True, trust_remote_code=trust
    )
    timed_run(model, random_prompt(model, given.config), given.config.new_tokens)
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
