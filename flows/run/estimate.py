"""`slimline plan --estimate`: how long prunings will take here, from counted work and measured rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from flows.run.graph import StageGraph
from flows.run.preflight import decoder_layer
from infra.models.import_model import ModelCard, describe
from infra.results.rows import DENSE
from pruning.costs.work import DecoderSize, Rates, Windows
from pruning.families import LayerCost
from pruning.plan import LayerShape
from tasks.execution.context import RunContext
from tasks.requests import CalibrateRequest, PruneRequest

#: bytes of a weight
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_VOCABULARY = 32_000
_PAPERS_WINDOWS = Windows(256 * 2048, 0, 2048)
ASSUMED = (
    "counted one thing after another, with nothing overlapped and activations where the model computes; of the splits "
    "that auto tries three, the second of which wins; the disk at the rate at which it writes"
)


class _Llama(NamedTuple):
    """theirs: by sparsity, the seconds on an A100 that SlimGPT (arXiv 2412.18110) gives for it, if it does."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_layers: int
    theirs: Mapping[float, int] = MappingProxyType({})


_LLAMAS = (
    _Llama("LLaMA-7B", 4096, 32, 32, 11008, 32, MappingProxyType({0.2: 678, 0.5: 1074})),
    _Llama("LLaMA-13B", 5120, 40, 40, 13824, 40, MappingProxyType({0.2: 1417, 0.5: 2475})),
    _Llama("Llama-2-70B", 8192, 64, 8, 28672, 80),
)


@dataclass(frozen=True)
class Estimate:
    """Seconds by part; none if what the stage does is not counted."""

    name: str
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Estimates:
    """rates: of this machine. device, dtype: where and in what they were measured. stages: those that are to run.
    published: of the models of the paper's table, with its seconds on an A100 where it gives any."""

    rates: Rates
    device: str
    dtype: str
    stages: tuple[Estimate, ...]
    published: tuple[tuple[Estimate, int | None], ...]


def estimate(graph: StageGraph, run_context: RunContext) -> Estimates:
    """Measures this machine, which takes a few seconds. Raises PruningError for a sparsity that cannot be reached."""
    import torch

    from tasks.devices.placement import device_names
    from tasks.devices.rates import measured_rates

    model, settings = graph.spec.model, run_context.settings
    card = describe(run_context.sources.find(model.id, "model", revision=model.revision))
    dtype = model.dtype if model.dtype in _ITEM_BYTES else (card.dtype or "float32")
    size = _size_of_card(card, _ITEM_BYTES.get(dtype, 4))
    device = torch.device(device_names(settings.device)[0])
    settings.store_root.mkdir(parents=True, exist_ok=True)
    rates = measured_rates(size or _size_of_llama(_LLAMAS[0], 4), getattr(torch, dtype), device, settings.store_root)
    windows = {
        stage.ref.key: Windows(
            stage.request.num_samples * stage.request.seq_len,
            stage.request.num_heldout * stage.request.seq_len,
            stage.request.seq_len,
        )
        for stage in graph.stages
        if isinstance(stage.request, CalibrateRequest)
    }
    stages = []
    for stage in graph.stages:
        if not run_context.store.has(stage.ref):
            request, parts = stage.request, {}
            if (
                size is not None
                and isinstance(request, PruneRequest)
                and request.checkpoint == graph.checkpoints[DENSE]
            ):
                parts = _parts(request, size, windows, rates)
            stages.append(Estimate(stage.name, parts))
    return Estimates(rates, str(device), dtype, tuple(stages), tuple(_published(rates, _ITEM_BYTES.get(dtype, 4))))


def lines(estimates: Estimates) -> list[str]:
    """In words, for a terminal."""
    rates = estimates.rates
    said = [
        f"this machine ({estimates.device}): products {rates.model_flops / 1e9:.4g} GFLOP/s in {estimates.dtype}, "
        f"second moments {rates.float32_flops / 1e9:.4g}, solver {rates.float64_flops / 1e9:.4g}, "
        f"memory {rates.memory_bytes / 1e9:.4g} GB/s, disk {rates.disk_bytes / 1e9:.4g} GB/s"
    ]
    for each in estimates.stages:
        said.append(f"about {_seconds(each)}" if each.parts else f"not counted  {each.name}")
    said.append("the paper's setting, 256 x 2048 tokens (SlimGPT, arXiv 2412.18110; there on one A100):")
    for each, theirs in estimates.published:
        said.append(f"about {_seconds(each)}" + (f"; the paper: {theirs} s" if theirs else ""))
    said.append(ASSUMED)
    return said


def as_json(estimates: Estimates) -> list[dict[str, Any]]:
    """For the last line of `--json`: of each stage its seconds, None where it is not counted."""
    return [
        {"name": each.name, "seconds": each.seconds if each.parts else None, "parts": dict(each.parts)}
        for each in estimates.stages
    ]


def _seconds(each: Estimate) -> str:
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in each.parts.items())
    return f"{each.seconds:.3g} s  {each.name}  ({parts})"


def _parts(request: PruneRequest, size: DecoderSize, windows: Mapping[str, Windows], rates: Rates) -> dict[str, float]:
    """Nothing for a method that does not count its work, and for one that was given the model's Hessians."""
    if not hasattr(request.module, "work") or request.statistics is not None or request.calibration is None:
        return {}
    work = request.module.work(request.typed_config, size, windows[request.calibration.key])
    return {name: rates.seconds(part) for name, part in work.items()}


def _published(rates: Rates, item_bytes: int) -> list[tuple[Estimate, int | None]]:
    from pruning.methods import slimgpt

    found: list[tuple[Estimate, int | None]] = []
    for llama in _LLAMAS:
        for sparsity in (0.2, 0.5):
            config = slimgpt.Config(sparsity=sparsity, split="equal", head_unit="kv_group")
            work = slimgpt.work(config, _size_of_llama(llama, item_bytes), _PAPERS_WINDOWS)
            parts = {part: rates.seconds(amount) for part, amount in work.items()}
            found.append((Estimate(f"{llama.name} at {100 * sparsity:.0f} %", parts), llama.theirs.get(sparsity)))
    return found


def _size_of_card(card: ModelCard, item_bytes: int) -> DecoderSize | None:
    """None where the headers do not tell the widths, and for experts: what they cost is not counted."""
    layer = decoder_layer(card)
    if layer is None:
        return None
    shape, cost, head_dim = layer
    if shape.num_experts:
        return None
    shapes = (shape,) * card.num_layers
    beside = (card.num_parameters or 0) - sum(map(cost.parameters, shapes))
    return DecoderSize(shapes, cost, head_dim, card.hidden_size, max(0, beside) // card.hidden_size, item_bytes)


def _size_of_llama(llama: _Llama, item_bytes: int) -> DecoderSize:
    hidden, head_dim = llama.hidden_size, llama.hidden_size // llama.num_heads
    shape = LayerShape(
        num_heads=llama.num_heads, num_kv_heads=llama.num_kv_heads, intermediate_size=llama.intermediate_size
    )
    per_head = 2 * head_dim * hidden
    cost = LayerCost(per_query_head=per_head, per_kv_head=per_head, per_channel=3 * hidden, fixed=2 * hidden)
    return DecoderSize((shape,) * llama.num_layers, cost, head_dim, hidden, _VOCABULARY, item_bytes)
