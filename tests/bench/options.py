"""What a benchmark run can be told; the defaults are the sizes that figures are quoted for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Windows:
    """So many windows of so many tokens; on the command line "64x1024"."""

    count: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Windows:
        count, _, length = text.partition("x")
        if not (count.isdigit() and length.isdigit() and int(count) and int(length)):
            raise argparse.ArgumentTypeError(f"{text!r} is not windows x tokens: write it like 64x1024")
        return cls(int(count), int(length))

    def __str__(self) -> str:
        return f"{self.count} x {self.length}"


@dataclass(frozen=True)
class Shape:
    """A synthetic Llama: as many kv heads as heads, heads of 64 columns where hidden allows it."""

    hidden: int
    intermediate: int
    heads: int
    layers: int
    vocab: int = 2048

    @classmethod
    def of_width(cls, hidden: int, layers: int) -> Shape:
        """The proportions of Llama: an FFN of 2.75 times the hidden size."""
        return cls(hidden, hidden * 11 // 4, max(1, hidden // 64), layers)


@dataclass(frozen=True)
class Growth:
    """The axes of the part `growth`; one of them moves while the others stay at `base` (and the first of tokens)."""

    base: Shape = Shape(512, 1408, 8, 4)
    depths: tuple[int, ...] = (2, 4, 8)
    widths: tuple[int, ...] = (256, 512, 1024)
    tokens: tuple[Windows, ...] = (Windows(8, 256), Windows(16, 256), Windows(32, 256))
    percents: tuple[int, ...] = (10, 20, 50, 70)
    repeats: int = 3


@dataclass(frozen=True)
class ProfileSizes:
    """Options of the profile in the part `profile`; the seconds are at most spent on the ratios of one run."""

    prompt_len: int = 128
    new_tokens: int = 32
    warmup: int = 0
    runs: int = 2
    ratio_precision: float = 0.01
    ratio_seconds: float = 180.0


@dataclass(frozen=True)
class Options:
    """Everything but the choice of parts."""

    model: Path | None = None
    mirror: str | None = None
    device: str = "cpu"
    batch_size: int = 8
    out: Path = Path("build")
    scratch: Path = Path("build/bench-scratch")
    tokens: Windows = Windows(64, 1024)
    num_heldout: int = 4
    naive_tokens: Windows = Windows(8, 1024)
    stream_tokens: Windows = Windows(8, 128)
    stream_gib: float = 4.0
    stream_shape: Shape = Shape(1024, 2816, 16, 1)
    kill_layers: int = 8
    head_unit: Literal["kv_group", "query_head"] | None = None
    group_size: int = 128
    p1_calibration: Windows = Windows(32, 512)
    p1_windows: Windows = Windows(8, 1024)
    ordering_percent: int = 50
    ordering_samples: tuple[int, ...] = (8, 32, 128)
    ordering_lengths: tuple[int, ...] = (64, 256, 512, 1024)
    growth: Growth = Growth()
    profile: ProfileSizes = ProfileSizes()
    profile_processes: int = 3
    results_runs: int = 1000
    results_metrics: int = 1000
    zero_shot_limit: int = 200
    few_shot_limit: int = 20
    few_shot_subjects: tuple[str, ...] = ("anatomy", "astronomy", "nutrition", "philosophy", "sociology")
    pruned: Path | None = None
    lm_eval_limit: int = 100
    lm_eval_tasks: tuple[str, ...] = (
        *("piqa", "arc_easy", "hellaswag", "winogrande", "openbookqa"),
        *("mmlu_anatomy", "mmlu_astronomy", "mmlu_nutrition", "mmlu_philosophy", "mmlu_sociology"),
        *("longbench_hotpotqa", "longbench_qasper", "longbench_trec"),
    )


def parse_options(arguments: list[str] | None, parts: tuple[str, ...]) -> tuple[tuple[str, ...], Options]:
    """The parts asked for (all if none is named) and the options."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Benchmarks of slimline, side by side.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(parts)} (default: all)")
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a checkpoint folder (default: the offline SmolLM2-135M-Instruct)")
    add("--mirror", help="where C4 and WikiText-2 lie, as in SLIMLINE_MIRROR (default: that variable)")
    add("--device", default=defaults.device)
    add("--batch-size", type=int, default=defaults.batch_size, help="windows per forward pass")
    add("--out", type=Path, default=defaults.out, help="folder of bench.json and bench.md (default: %(default)s)")
    add("--scratch", type=Path, default=defaults.scratch, help="folder for models, removed afterwards (%(default)s)")
    windows = {"type": Windows.parse, "metavar": "NxL"}
    add("--tokens", default=defaults.tokens, help="calibration of `speed` (default: %(default)s)", **windows)
    add("--naive-tokens", default=defaults.naive_tokens, help="of `naive` (default: %(default)s)", **windows)
    add("--stream-tokens", default=defaults.stream_tokens, help="of `stream` (default: %(default)s)", **windows)
    add("--stream-gib", type=float, default=defaults.stream_gib, help="size of the streamed model (%(default)s)")
    add("--kill-layers", type=int, default=defaults.kill_layers, help="depth of the model that is killed (%(default)s)")
    add("--head-unit", choices=("kv_group", "query_head"), help="of `ordering` (default: the method's, row by row)")
    add("--group-size", type=int, default=defaults.group_size, help="of the -DGS row of `ordering` (%(default)s)")
    add("--results-runs", type=int, default=defaults.results_runs, help="in the store of `results` (%(default)s)")
    add("--results-metrics", type=int, default=defaults.results_metrics, help="of each of its runs (%(default)s)")
    add("--zero-shot-limit", type=int, default=defaults.zero_shot_limit, help="documents a task of `zero_shot`")
    add("--few-shot-limit", type=int, default=defaults.few_shot_limit, help="questions a subject of `few_shot`")
    add("--few-shot-subjects", type=_names, default=defaults.few_shot_subjects, metavar="NAME,NAME", help="of MMLU")
    add("--pruned", type=Path, metavar="FOLDER", help="`lm_eval`'s pruned checkpoint (default: pruned by 20 %% here)")
    add("--lm-eval-limit", type=int, default=defaults.lm_eval_limit, help="documents a task of `lm_eval` (%(default)s)")
    tasks = "of `lm_eval`: any lm-eval task, mmlu_<subject>, longbench_<task> (default: 5 + 5 + 3)"
    add("--lm-eval-tasks", type=_names, default=defaults.lm_eval_tasks, metavar="NAME,NAME", help=tasks)
    given = vars(parser.parse_args(arguments))
    asked = tuple(given.pop("parts")) or parts
    if unknown := [part for part in asked if part not in parts]:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(parts)}")
    return asked, Options(**given)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
