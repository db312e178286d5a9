"""Speed and size of a model as plain numbers, each grid point with rows of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import JsonValue, TypeAdapter

from evaluation.report import Metric, Report

_HIGHER_IS_BETTER = ("tokens_per_s", "decode_tokens_per_s", "utilization_percent")

NO_RUNTIME = "llama.cpp's wheel is not installed (pip install slimline[llamacpp])"
RATIO_PROTOCOL = "interleaved turns in one process, interquartile mean of log ratios"


class Timing(Report):
    """Milliseconds over the timed runs: the median and the 90th percentile."""

    p50: float
    p90: float

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> Self:
        """Of at least one run."""
        import numpy as np

        p50, p90 = np.quantile(np.asarray(values_ms, dtype=np.float64), (0.5, 0.9)).tolist()
        return cls(p50=p50, p90=p90)


class Ratio(Report):
    """A time of the measured model over the reference's; below 1 is faster.

    stderr and the 95 % interval come from a bootstrap over the pairs; None where there are too few. num_pairs: turns
    that each model took.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    num_pairs: int


class Comparison(Report):
    """The reference (dense) model: its whole runs, taken in turns with those of the measured one, and the ratios.

    Ratios come from turns that are shorter than a run (a prompt, a decoded token), so that a slow spell of the machine
    strikes both models; on a CPU, of the time that the turns had the processor (see `evaluation.profile.interleaved`).
    latency_ratio weighs prefill and decode as the reference's latency is made up of them. No ratios: memory was too
    short for both models' caches at once. decode_ratio is None where one token is generated.
    """

    prefill_ms: Timing
    decode_ms_per_token: Timing | None
    latency_ms: Timing
    prefill_ratio: Ratio | None
    decode_ratio: Ratio | None
    latency_ratio: float | None


class Speed(Report):
    """One model at one grid point.

    prefill_ms: the forward pass over the prompt, logits of its last token. ttft_ms: time to first token, that pass and
    the choice of the most likely token. decode_ms_per_token: mean of the later tokens of a run, None where there are
    none. latency_ms: the whole generation, and tokens_per_s the tokens that the batch generates per second of its
    median: latency and throughput of arXiv 2402.02834. decode_tokens_per_s leaves the prompt out.
    """

    prefill_ms: Timing
    ttft_ms: Timing
    decode_ms_per_token: Timing | None
    latency_ms: Timing
    tokens_per_s: float
    decode_tokens_per_s: float | None

    @property
    def values(self) -> dict[str, float | None]:
        """By the names of metrics."""
        values: dict[str, float | None] = {}
        for name in ("prefill_ms", "ttft_ms", "decode_ms_per_token", "latency_ms"):
            timing = getattr(self, name)
            if timing is not None:
                values |= {f"{name}_p50": timing.p50, f"{name}_p90": timing.p90}
        return values | {"tokens_per_s": self.tokens_per_s, "decode_tokens_per_s": self.decode_tokens_per_s}


class PointReport(Report):
    """A grid point: sizes, and what was measured there. No `speed` means that the model did not fit into memory.

    attention_macs: multiply-accumulates of the attention scores and of the mixing of values by them, of the prompt's
    forward pass over the whole batch, each position with each other (what eager attention computes). peak_memory_gib:
    the most memory allocated on CUDA devices by this model alone, without the reference; on CPU resident memory, which
    `evaluation.profile.peak_memory` measures in a process of its own. power_w and utilization_percent: means while
    the model generates, None where the driver does not report them.
    """

    task: str
    batch_size: int
    prompt_len: int
    new_tokens: int
    attention_macs: int
    speed: Speed | None = None
    comparison: Comparison | None = None
    peak_memory_gib: float | None = None
    power_w: float | None = None
    utilization_percent: float | None = None

    def metrics(self, runs: int) -> Iterator[Metric]:
        """Rows of this point's task; a point that did not fit has the row "out_of_memory"."""
        values: dict[str, float | None] = {"attention_macs": self.attention_macs}
        if self.speed is None:
            values["out_of_memory"] = 1
        else:
            values |= self.speed.values
        values |= {
            "peak_memory_gib": self.peak_memory_gib,
            "power_w": self.power_w,
            "utilization_percent": self.utilization_percent,
        }
        yield from rows(self.task, values, runs)
        if self.comparison is not None:
            yield from self._ratios(self.comparison)

    def _ratios(self, comparison: Comparison) -> Iterator[Metric]:
        named = {"prefill_ratio": comparison.prefill_ratio, "decode_ratio": comparison.decode_ratio}
        for name, ratio in named.items():
            if ratio is not None:
                yield Metric(
                    task=self.task,
                    metric=name,
                    value=ratio.value,
                    stderr=ratio.stderr,
                    num_examples=ratio.num_pairs,
                    higher_is_better=False,
                )
        yield from rows(self.task, {"latency_ratio": comparison.latency_ratio}, None)


class ProfileReport(Report):
    """Speed and size of one model, with the conditions that make the figures mean something.

    `linear_macs_per_token` counts one multiply-accumulate per weight of every nn.Linear, lm_head included.
    `macs_64_tokens` is what LLM-Pruner (arXiv 2305.11627) prints: linears and attention over one sequence of 64 tokens
    (its counter adds norms, rotary embedding and softmax, together below 0.1 %). `kv_cache_bytes_per_token` is of one
    sequence, over all layers. `checkpoint_bytes` counts the files of weights on disk; None for a model without folder.
    """

    num_parameters: int
    num_decoder_parameters: int
    linear_macs_per_token: int
    macs_64_tokens: int
    weights_gib: float
    kv_cache_bytes_per_token: int
    checkpoint_bytes: int | None = None
    points: tuple[PointReport, ...]
    device: str
    device_name: str
    dtype: str
    threads: int
    attn_implementation: str | None
    compile: bool
    warmup: int
    runs: int
    ratio_clock: str
    ratio_threads: int
    ratio_precision: float
    ratio_seconds: float

    def metrics(self) -> tuple[Metric, ...]:
        """The same figures as rows: sizes under task "profile", each grid point's under its own task."""
        sizes = (
            "num_parameters",
            "num_decoder_parameters",
            "linear_macs_per_token",
            "macs_64_tokens",
            "weights_gib",
            "kv_cache_bytes_per_token",
            "checkpoint_bytes",
        )
        metrics = list(rows("profile", {name: getattr(self, name) for name in sizes}, None))
        for point in self.points:
            metrics += point.metrics(self.runs)
        return tuple(metrics)

    def conditions(self) -> dict[str, JsonValue]:
        """What must be printed beside the figures: where and how they were taken, and the sizes of all grid points."""
        taken = self.model_dump(
            mode="json",
            include={"device_name", "dtype", "threads", "attn_implementation", "compile", "warmup", "runs"},
        )
        axes = ("batch_size", "prompt_len", "new_tokens")
        sizes = {axis: list(dict.fromkeys(getattr(point, axis) for point in self.points)) for axis in axes}
        taken |= {axis: values[0] if len(values) == 1 else values for axis, values in sizes.items()}
        if any(point.comparison for point in self.points):
            taken["ratio"] = f"{RATIO_PROTOCOL}, {self.ratio_clock}"
            taken["ratio_threads"] = self.ratio_threads
            taken |= {"ratio_precision": self.ratio_precision, "ratio_seconds": self.ratio_seconds}
        return taken


class FileProfile(Report):
    """Size of a GGUF file and llama.cpp's speed with it on the CPU, one sequence at a time.

    runtime: which llama.cpp on which processor; "" and no speed where its wheel is not installed. threads: that it had.
    """

    file_bytes: int
    prompt_len: int
    new_tokens: int
    warmup: int
    runs: int
    runtime: str
    threads: int | None = None
    speed: Speed | None = None

    def metrics(self) -> tuple[Metric, ...]:
        """The size under task "profile", the speed under "profile llama.cpp"."""
        speed = self.speed.values if self.speed else {}
        size = rows("profile", {"file_bytes": self.file_bytes}, None)
        return (*size, *rows("profile llama.cpp", speed, self.runs))

    def conditions(self) -> dict[str, JsonValue]:
        """What must be printed beside the figures: how the speed was taken, or why there is none."""
        if self.speed is None:
            return {"runtime": f"none, so no tokens/s: {NO_RUNTIME}"}
        return self.model_dump(mode="json", exclude={"file_bytes", "speed"})


def read_profile(text: str) -> ProfileReport | FileProfile:
    """A report of one kind or the other from its JSON."""
    found: ProfileReport | FileProfile = TypeAdapter(ProfileReport | FileProfile).validate_json(text)
    return found


def rows(task: str, values: dict[str, float | None], runs: int | None) -> Iterator[Metric]:
    """Metrics of a task, without those that are None."""
    for name, value in values.items():
        if value is not None:
            yield Metric(
                task=task, metric=name, value=value, num_examples=runs, higher_is_better=name in _HIGHER_IS_BETTER
            )
