"""Speed and size of a model, alone or turn and turn about with a reference in the same process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from evaluation.device import device_name
from evaluation.eval_mode import eval_mode
from evaluation.generation import TimedRun, random_prompt, timed_run
from evaluation.profile_config import ProfileConfig
from evaluation.report import GIB, Comparison, ProfileReport, Timing
from evaluation.suite import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def profile(
    model: PreTrainedModel,
    config: ProfileConfig,
    *,
    reference: PreTrainedModel | None = None,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> ProfileReport:
    """Time `model` on `device`, to which it (and the reference) is moved, in the dtype it has; a model that was loaded
    with a device map stays spread.

    With a reference the runs alternate, reference first: the machine's slow spells strike both, and the ratios of
    paired runs stay meaningful where the milliseconds do not. Raises EvaluationError if the lengths exceed the model's
    positions.
    """
    models = [model] if reference is None else [reference, model]
    for each in models:
        each.to(device)
    with eval_mode(*models):
        runs = _alternate(models, config, progress)
        peak = _peak_cuda_gib(model, config)
    own = runs[-1]
    decode = _timing([run.decode_ms_per_token for run in own])
    return ProfileReport(
        prefill_ms=_timing([run.prefill_ms for run in own]),
        decode_ms_per_token=decode,
        tokens_per_s=1000 * config.batch_size / decode.p50,
        num_parameters=_count(model),
        num_decoder_parameters=_count(model.get_decoder().get_submodule("layers")),
        linear_macs_per_token=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        weights_gib=_weight_bytes(model) / GIB,
        kv_cache_bytes_per_token=own[0].kv_cache_bytes_per_token,
        peak_memory_gib=peak,
        comparison=None if reference is None else _comparison(runs[0], own),
        device=str(model.device),
        device_name=device_name(str(model.device)),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        **config.model_dump(exclude={"seed"}),
    )


def _alternate(models: Sequence[PreTrainedModel], config: ProfileConfig, progress: Progress) -> list[list[TimedRun]]:
    """The timed runs of each model, taken in turns."""
    prompts = [random_prompt(model, config) for model in models]
    runs: list[list[TimedRun]] = [[] for _ in models]
    total = config.warmup + config.runs
    for turn in range(total):
        for model, prompt_BL, kept in zip(models, prompts, runs, strict=True):
            run = timed_run(model, prompt_BL, config.new_tokens)
            if turn >= config.warmup:
                kept.append(run)
        progress((turn + 1) / total, f"{turn + 1} of {total} runs")
    return runs


def _comparison(reference: list[TimedRun], own: list[TimedRun]) -> Comparison:
    pairs = list(zip(reference, own, strict=True))
    return Comparison(
        prefill_ms=_timing([run.prefill_ms for run in reference]),
        decode_ms_per_token=_timing([run.decode_ms_per_token for run in reference]),
        prefill_ratio=statistics.median(b.prefill_ms / a.prefill_ms for a, b in pairs),
        decode_ratio=statistics.median(b.decode_ms_per_token / a.decode_ms_per_token for a, b in pairs),
    )


def _timing(values_ms: list[float]) -> Timing:
    values = torch.tensor(values_ms, dtype=torch.float64)
    return Timing(p50=float(values.quantile(0.5)), p90=float(values.quantile(0.9)))


def _peak_cuda_gib(model: PreTrainedModel, config: ProfileConfig) -> float | None:
    """Peak of one run, without whatever else (the reference) lives on the device; None on CPU."""
    if model.device.type != "cuda":
        return None
    others = torch.cuda.memory_allocated(model.device) - _weight_bytes(model)
    torch.cuda.reset_peak_memory_stats(model.device)
    timed_run(model, random_prompt(model, config), config.new_tokens)
    return (torch.cuda.max_memory_allocated(model.device) - others) / GIB


def _count(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _weight_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
