"""What this machine does in a second, measured in a few seconds with the shapes of the work that is to be done."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.costs.work import DecoderSize, Rates, moments_work, solver_work

if TYPE_CHECKING:
    import torch

#: seconds that each rate is measured for, at least; the best of these is taken: what else runs only makes it slower
_SECONDS = 0.6
_TOKENS = 2048
#: a larger linear is solved here as one of this many inputs
_MOST_INPUTS = 2048
#: elements, more than caches hold
_LARGE_ARRAY = 2**25
_FILE_BYTES = 2**28


def measured_rates(size: DecoderSize, dtype: torch.dtype, device: torch.device, folder: Path) -> Rates:
    """Products and moments with the widths of the decoder's first layer, the solver on a made-up linear, the disk of
    `folder`, which must exist; a file of 256 MiB is written there and removed."""
    import torch

    from pruning.statistics.hessian import HessianAccumulator

    shape = size.shapes[0]
    num_inputs = min(max(size.inputs(shape)), _MOST_INPUTS)
    up_OI = torch.randn(max(size.inputs(shape)), size.hidden_size, device=device, dtype=dtype)
    X_TC = torch.randn(_TOKENS, size.hidden_size, device=device, dtype=dtype)
    X_TI = torch.randn(_TOKENS, num_inputs, device=device, dtype=dtype)
    accumulator = HessianAccumulator(num_inputs, device)
    large = torch.ones(_LARGE_ARRAY, device=device)
    return Rates(
        model_flops=2.0 * up_OI.numel() * _TOKENS / _best(lambda: X_TC @ up_OI.T, device),
        float32_flops=moments_work(num_inputs, _TOKENS).float32_flops / _best(lambda: accumulator.add(X_TI), device),
        float64_flops=_solver_rate(num_inputs, size.hidden_size, device),
        memory_bytes=2.0 * large.numel() * large.element_size() / _best(lambda: large.mul_(1.0), device),
        disk_bytes=_disk_rate(folder),
    )


def _solver_rate(num_inputs: int, num_outputs: int, device: torch.device) -> float:
    """Of what SlimGPT does with one FFN of which a third goes."""
    import torch

    from pruning.obs.elimination import dampen, prepare, refit
    from pruning.obs.groups import Groups, Solver, search
    from pruning.obs.rounds import halving_group_sizes
    from pruning.statistics.hessian import Hessian

    X_TI = torch.randn(2 * num_inputs, num_inputs, device=device)
    hessian = Hessian(X_TI.T @ X_TI / len(X_TI), len(X_TI))
    weight_OI = torch.randn(num_outputs, num_inputs, device=device)
    sizes = tuple(halving_group_sizes(num_inputs // 3))
    groups = Groups(torch.arange(num_inputs).unsqueeze(1), sizes)
    solver = Solver(0.01, grouped_cholesky=True, group_size=None, head_unit="kv_group")

    def solve() -> None:
        system = dampen("a linear", weight_OI, hessian, dampening_frac=0.01)
        found = search(prepare(system), groups, solver)
        kept_I = torch.ones(num_inputs, dtype=torch.bool)
        kept_I[list(found.order)] = False
        refit(system, kept_I.nonzero().squeeze(1).to(device))

    return solver_work(num_inputs, num_outputs, sizes).float64_flops / _best(solve, device)


def _disk_rate(folder: Path) -> float:
    content = os.urandom(2**22)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_FILE_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _FILE_BYTES / (time.perf_counter() - start)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of several calls, with all that was queued on the device."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()  # the first call pays for what later ones find ready
    end, best = time.perf_counter() + _SECONDS, timed()
    while time.perf_counter() < end:
        best = min(best, timed())
    return best
