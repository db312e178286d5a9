"""Speed and size of a model over a grid of batch sizes and lengths, alone or beside a reference in the same process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.global_state import torch_threads
from evaluation.inference.oom import free_memory, short_of_memory
from evaluation.inference.options import Progress, part_of, silent
from evaluation.profile.compilation import (
    check_compiler,
    is_offloaded,
    only_compiled,
    place_,
    runner_of,
    set_attention_,
)
from evaluation.profile.config import GridPoint, ProfileConfig
from evaluation.profile.device import Meter, Reading, device_name, mean_reading, meter_of
from evaluation.profile.interleaved import TURN_CLOCKS, TurnRatios, TurnRules, interleave, num_turn_threads
from evaluation.profile.peak_memory import available_bytes, least_bytes
from evaluation.profile.report import Comparison, PointReport, ProfileReport, Speed, Timing
from evaluation.profile.sizes import (
    attention_macs,
    attention_shapes,
    count_parameters,
    linear_macs_per_token,
    weight_bytes,
)
from evaluation.profile.timed_generation import Generation, Runner, TimedRun, random_prompt, timed_run
from evaluation.report import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("slimline")

T = TypeVar("T")

_CUDA_TOKENS_PER_TURN = 8
_LLM_PRUNER_LENGTH = 64
"""Tokens for which LLM-Pruner prints multiply-accumulates."""


def profile(
    model: PreTrainedModel,
    config: ProfileConfig,
    *,
    reference: PreTrainedModel | None = None,
    device: str | torch.device = "cpu",
    meter: Meter | None = None,
    progress: Progress = silent,
) -> ProfileReport:
    """Time `model` on `device`, to which it (and the reference) is moved, in the dtype it has; a model that was loaded
    with a device map stays spread. The reference may come on the host, and goes there when both do not fit.

    Latencies come from whole runs of one model, alternating with the reference's; ratios to it from shorter turns (see
    `interleaved`). A grid point that does not fit into memory is reported as such and the others go on. meter: reads
    power and utilisation; None asks the device. Raises EvaluationError if the lengths exceed the model's positions, for
    an attention implementation that the model does not have, and for `compile` where it would not be done.
    """
    if reference is not None and is_offloaded(reference) and not is_offloaded(model):
        log.warning("the reference does not fit beside the model, no ratios")
        reference = None
    models = [model] if reference is None else [reference, model]
    for each in models:
        config.check_lengths(getattr(each.config, "max_position_embeddings", None))
    if config.compile:
        check_compiler(device)
    place_(model, device)
    for each in models:
        set_attention_(each, config.attn_implementation)
    with eval_mode(*models), only_compiled(compiled=config.compile):
        shapes = attention_shapes(model)
        runners = [runner_of(each, compiled=config.compile) for each in models]
        profiler = _GridProfiler(config, runners, torch.device(device), meter or meter_of(_devices(model)))
        points = []
        for index, point in enumerate(config.points):
            part = part_of(progress, index, index + 1, len(config.points))
            report = profiler.measure(point, partial(_named, part, point.task) if len(config.points) > 1 else part)
            macs = attention_macs(shapes, batch_size=point.batch_size, length=point.prompt_len)
            points.append(report.model_copy(update={"attention_macs": macs}))
    per_token = linear_macs_per_token(model)
    return ProfileReport(
        num_parameters=count_parameters(model),
        num_decoder_parameters=count_parameters(model.get_decoder().get_submodule("layers")),
        linear_macs_per_token=per_token,
        macs_64_tokens=_LLM_PRUNER_LENGTH * per_token + attention_macs(shapes, batch_size=1, length=_LLM_PRUNER_LENGTH),
        weights_gib=weight_bytes(model) / GIB,
        kv_cache_bytes_per_token=sum(shape.cache_bytes_per_token for shape in shapes),
        points=tuple(points),
        device=str(model.device),
        device_name=device_name(str(model.device)),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        ratio_clock=_turn_clock(model),
        ratio_threads=num_turn_threads(_turn_clock(model)),
        **config.model_dump(include={"compile", "warmup", "runs", "ratio_precision", "ratio_seconds"}),
    )


@dataclass(frozen=True)
class _GridProfiler:
    """runners: the reference, if there is one, and the measured model, which is the last."""

    config: ProfileConfig
    runners: Sequence[Runner]
    device: torch.device
    meter: Meter | None

    def measure(self, point: GridPoint, progress: Progress) -> PointReport:
        """All figures of one grid point, as many of them as memory allows."""
        report = PointReport(**point.model_dump(), attention_macs=0)
        figures = partial(self._figures, point, progress)
        measured = self._fitting(lambda: figures(self.runners))
        if measured is None and len(self.runners) == 2:
            place_(self.runners[0].model, "cpu")
            free_memory()
            measured = self._fitting(lambda: figures(self.runners[1:]))
        if measured is None:
            log.warning("%s: out of memory, no figures for this grid point", _sizes(point))
            return report
        runs, update = measured
        if len(self.runners) == 2:
            update["comparison"] = self._comparison(point, runs, progress)
        return report.model_copy(update=update)

    def _figures(
        self, point: GridPoint, progress: Progress, runners: Sequence[Runner]
    ) -> tuple[list[list[TimedRun]], dict[str, Any]]:
        """The runs of each model, which is brought to the device, and what is reported of the last model alone."""
        for runner in runners:
            place_(runner.model, self.device)
            self._check_room(point, [runner])
        runs = self._whole_runs(point, progress, runners)
        peak, reading, last = self._peak_cuda_gib(point), Reading(), runners[-1]
        if self.meter is not None:
            prompt_BL = random_prompt(last.model, point, self.config.seed)
            reading = mean_reading(self.meter, lambda: timed_run(last, prompt_BL, point.new_tokens))
        return runs, {"speed": _speed(runs[-1], point), "peak_memory_gib": peak} | vars(reading)

    def _check_room(self, point: GridPoint, runners: Sequence[Runner]) -> None:
        """Raise MemoryError if the host cannot hold a generation of each runner at once: on CPU no allocation fails,
        but the kernel kills the process that fills it."""
        if any(runner.device.type != "cpu" for runner in runners):
            return
        needed, left = least_bytes([runner.model for runner in runners], point), available_bytes()
        if needed > left:
            free_memory()
            left = available_bytes()
        if needed > left:
            message = "%s: needs at least %.2f GiB of memory, and %.2f GiB are there"
            log.warning(message, _sizes(point), needed / GIB, left / GIB)
            raise MemoryError

    def _whole_runs(self, point: GridPoint, progress: Progress, runners: Sequence[Runner]) -> list[list[TimedRun]]:
        """The timed runs of each model: one after the other, who goes first changes (ABBA)."""
        prompts = self._prompts(point, runners)
        runs: list[list[TimedRun]] = [[] for _ in runners]
        total = self.config.warmup + self.config.runs
        for number in range(total):
            order = range(len(runners)) if number % 2 == 0 else reversed(range(len(runners)))
            for index in order:
                run = timed_run(runners[index], prompts[index], point.new_tokens)
                if number >= self.config.warmup:
                    runs[index].append(run)
            share = (number + 1) / total
            progress(share / len(self.runners), f"{number + 1} of {total} runs")
        return runs

    def _comparison(self, point: GridPoint, runs: list[list[TimedRun]], progress: Progress) -> Comparison | None:
        """None if the reference did not fit beside the model."""
        if len(runs) == 1:
            log.warning("%s: the reference does not fit beside the model, no ratios", _sizes(point))
            return None
        ratios = self._fitting(lambda: self._turns(point, progress))
        if ratios is None:
            log.warning("%s: the caches of both models do not fit at once, no ratios", _sizes(point))
        reference = _speed(runs[0], point)
        latency_ratio = None
        if ratios:
            share = min(1.0, reference.ttft_ms.p50 / reference.latency_ms.p50)
            latency_ratio = share * ratios.prefill.value + (1 - share) * (ratios.decode or ratios.prefill).value
        return Comparison(
            prefill_ms=reference.prefill_ms,
            decode_ms_per_token=reference.decode_ms_per_token,
            latency_ms=reference.latency_ms,
            prefill_ratio=ratios.prefill if ratios else None,
            decode_ratio=ratios.decode if ratios else None,
            latency_ratio=latency_ratio,
        )

    def _turns(self, point: GridPoint, progress: Progress) -> TurnRatios:
        self._check_room(point, self.runners)
        on_cuda = any(runner.device.type == "cuda" for runner in self.runners)
        rules = TurnRules(
            new_tokens=point.new_tokens,
            min_rounds=self.config.runs,
            precision=self.config.ratio_precision,
            seconds=self.config.ratio_seconds,
            shortest_turn=_CUDA_TOKENS_PER_TURN if on_cuda else 1,
        )
        prompts = self._prompts(point, self.runners)
        begin = [partial(Generation, runner, prompt) for runner, prompt in zip(self.runners, prompts, strict=True)]
        clock_name = _turn_clock(self.runners[-1].model)
        with torch_threads(num_turn_threads(clock_name)):
            return interleave(
                begin,
                rules,
                turn_clock=TURN_CLOCKS[clock_name],
                progress=lambda share, message: progress((1 + share) / 2, message),
            )

    def _prompts(self, point: GridPoint, runners: Sequence[Runner]) -> list[Tensor]:
        return [random_prompt(runner.model, point, self.config.seed) for runner in runners]

    def _peak_cuda_gib(self, point: GridPoint) -> float | None:
        """Peak of one run, without whatever else (the reference) lives on the devices; None on CPU."""
        runner = self.runners[-1]
        devices = _devices(runner.model)
        if any(device.type != "cuda" for device in devices):
            return None
        others = sum(map(torch.cuda.memory_allocated, devices)) - weight_bytes(runner.model)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        timed_run(runner, random_prompt(runner.model, point, self.config.seed), point.new_tokens)
        return (sum(map(torch.cuda.max_memory_allocated, devices)) - others) / GIB

    def _fitting(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None if memory runs out."""
        try:
            return work()
        except Exception as error:
            if not short_of_memory(error):
                raise
            # the traceback holds the tensors that fill the memory
            error.__traceback__ = None
        free_memory()
        return None


def _speed(runs: Sequence[TimedRun], point: GridPoint) -> Speed:
    latency = Timing.of([run.latency_ms for run in runs])
    decode_ms = [run.decode_ms_per_token for run in runs if run.decode_ms_per_token is not None]
    decode = Timing.of(decode_ms) if decode_ms else None
    return Speed(
        prefill_ms=Timing.of([run.prefill_ms for run in runs]),
        ttft_ms=Timing.of([run.ttft_ms for run in runs]),
        decode_ms_per_token=decode,
        latency_ms=latency,
        tokens_per_s=1000 * point.batch_size * point.new_tokens / latency.p50,
        decode_tokens_per_s=1000 * point.batch_size / decode.p50 if decode else None,
    )


def _turn_clock(model: PreTrainedModel) -> str:
    """A CPU's own time where the model computes on CPU; an accelerator's work is not in it."""
    on_cpu = all(device.type == "cpu" for device in _devices(model))
    return "processor time" if on_cpu else "wall clock"


def _devices(model: PreTrainedModel) -> tuple[torch.device, ...]:
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _sizes(point: GridPoint) -> str:
    return f"batch {point.batch_size}, prompt {point.prompt_len}, {point.new_tokens} new tokens"


def _named(progress: Progress, task: str, share: float, message: str) -> None:
    progress(share, f"{task}: {message}")
