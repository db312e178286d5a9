"""How this machine runs the layer walk: on one device, or in several processes that share the samples."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from evaluation.inference.child_process import end_with_parent
from tasks.devices.placement import device_names
from tasks.execution.stage import StageContext

if TYPE_CHECKING:
    from infra.settings import Settings
    from pruning.walk.sequential import WalkOptions
    from tasks.execution.progress import Progress

#: called with the options and a progress; must be picklable (an instance of a class at the top of a module)
WalkJob = Callable[["WalkOptions", "Progress"], None]


def run_walk(context: StageContext, job: WalkJob) -> None:
    """Run the job, in as many processes as the settings say; an error of any of them is raised here."""
    settings = context.run_context.settings
    if settings.walk_processes == 1:
        job(walk_options(settings, context.place.device), context.progress)
        return
    _run_processes(settings, job, context.progress)


def walk_options(settings: Settings, device: Any, **more: Any) -> WalkOptions:
    """Batch size and memory budget from the settings. more: further fields of WalkOptions."""
    from pruning.walk.sequential import WalkOptions

    budget = settings.activation_budget_gib
    return WalkOptions(
        device=device,
        batch_size=settings.walk_batch_size,
        activation_budget_bytes=None if budget is None else int(budget * 2**30),
        **more,
    )


def _run_processes(settings: Settings, job: WalkJob, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    size = settings.walk_processes
    messages: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="slimline-team-") as folder:
        process_group = [
            context.Process(
                target=_member, args=(rank, size, Path(folder) / "meeting", settings, job, messages), daemon=True
            )
            for rank in range(size)
        ]
        for member in process_group:
            member.start()
        try:
            _listen(process_group, messages, progress)
        finally:
            for member in process_group:
                member.terminate()
                member.join()


def _listen(process_group: list[Any], messages: Any, progress: Progress) -> None:
    """Hand on progress until every process has ended; raise the first error."""
    ended = 0
    while ended < len(process_group):
        try:
            message = messages.get(timeout=1.0)
        except Empty:
            if messages.empty():
                _refuse_dead(process_group, None)
            continue
        if isinstance(message, Exception):
            if isinstance(message, RuntimeError):  # perhaps only the echo of another one's end
                process_group[0].join(timeout=1.0)
                _refuse_dead(process_group, message)
            raise message
        if message is None:
            ended += 1
        else:
            progress(*message)


def _refuse_dead(process_group: list[Any], cause: Exception | None) -> None:
    codes = [member.exitcode for member in process_group if member.exitcode]
    if codes:
        # the kernel kills with 9 when memory is short, and only what says so is tried again
        perhaps = ", perhaps out of memory" if codes[0] == -signal.SIGKILL else ""
        raise RuntimeError(
            f"a process of the walk died (exit code {codes[0]}){perhaps}; the finished layers are kept; "
            "run again to go on"
        ) from cause


def _member(rank: int, size: int, meeting: Path, settings: Settings, job: WalkJob, messages: Any) -> None:
    """One process of the team."""
    import torch
    import torch.distributed as dist

    from pruning.distributed import ProcessGroup

    end_with_parent()
    try:
        names = device_names(settings.device)
        device = torch.device(names[rank % len(names)])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        backend = "nccl" if device.type == "cuda" else "gloo"
        process_group = ProcessGroup.join(backend, meeting.as_uri(), rank, size)

        def tell(share: float, message: str) -> None:
            if rank == 0:
                messages.put((share, message))

        job(walk_options(settings, device, process_group=process_group), tell)
        dist.barrier()
        dist.destroy_process_group()
        messages.put(None)
    except Exception as error:  # whatever it is, the parent raises it
        messages.put(error)
