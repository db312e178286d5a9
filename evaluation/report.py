"""The reports that leave this room: plain numbers, each with the protocol under which it was taken."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue

GIB = 2**30
"""Bytes in a GiB, the unit of every memory figure here."""


class Report(BaseModel):
    """Frozen, refuses unknown keys; infinity (the ppl of a broken model) survives a round trip through JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Metric(Report):
    """One number of one task.

    `stderr` is None where none can be computed (one window, one example). `num_examples` counts documents for lm-eval
    tasks, windows for perplexity and timed runs for a profile. `task_version` is lm-eval's version of the task.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    num_fewshot: int | None = None
    num_examples: int | None = None
    task_version: str | None = None
    higher_is_better: bool


class EvalReport(Report):
    """All metrics of one suite. `protocol` holds whatever must be printed beside the figures to reproduce them."""

    suite: str
    metrics: tuple[Metric, ...]
    protocol: dict[str, JsonValue]


class Timing(Report):
    """Milliseconds over the timed runs: the median and the 90th percentile."""

    p50: float
    p90: float


class Comparison(Report):
    """The reference (dense) model, timed turn and turn about with the measured one in the same process.

    A ratio is the measured model's time over the reference's (below 1 is faster): the median of the ratios of paired
    runs, so that a slow spell of the machine strikes both sides.
    """

    prefill_ms: Timing
    decode_ms_per_token: Timing
    prefill_ratio: float
    decode_ratio: float


class ProfileReport(Report):
    """Speed and size of one model, with the conditions that make the figures mean something.

    `tokens_per_s` counts decoded tokens of the whole batch. `linear_macs_per_token` counts one multiply-accumulate per
    weight of every nn.Linear, lm_head included; attention scores are left out, for they depend on the length.
    `peak_memory_gib` is the most memory allocated on a CUDA device by this model alone; None on CPU, where
    `evaluation.peak_memory` measures it in a process of its own.
    """

    prefill_ms: Timing
    decode_ms_per_token: Timing
    tokens_per_s: float
    num_parameters: int
    num_decoder_parameters: int
    linear_macs_per_token: int
    weights_gib: float
    kv_cache_bytes_per_token: int
    peak_memory_gib: float | None
    comparison: Comparison | None
    device: str
    device_name: str
    dtype: str
    threads: int
    attn_implementation: str | None
    batch_size: int
    prompt_len: int
    new_tokens: int
    warmup: int
    runs: int

    def metrics(self) -> tuple[Metric, ...]:
        """The same figures as rows of task "profile", for tables that hold one number a row."""
        comparison = self.comparison
        values: dict[str, float | None] = {
            "prefill_ms_p50": self.prefill_ms.p50,
            "prefill_ms_p90": self.prefill_ms.p90,
            "decode_ms_per_token_p50": self.decode_ms_per_token.p50,
            "decode_ms_per_token_p90": self.decode_ms_per_token.p90,
            "tokens_per_s": self.tokens_per_s,
            "num_parameters": self.num_parameters,
            "num_decoder_parameters": self.num_decoder_parameters,
            "linear_macs_per_token": self.linear_macs_per_token,
            "weights_gib": self.weights_gib,
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "peak_memory_gib": self.peak_memory_gib,
            "prefill_ratio": comparison.prefill_ratio if comparison else None,
            "decode_ratio": comparison.decode_ratio if comparison else None,
        }
        return tuple(
            Metric(
                task="profile",
                metric=name,
                value=value,
                num_examples=self.runs,
                higher_is_better=name == "tokens_per_s",
            )
            for name, value in values.items()
            if value is not None
        )
