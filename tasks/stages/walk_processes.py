"""How this machine runs the layer walk: on one device, or in several processes that share the samples."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from infra.child_process import end_with_parent
from tasks.devices.placement import device_names
from tasks.execution.context import StageContext

log = logging.getLogger("slimline")

if TYPE_CHECKING:
    from infra.settings import Settings
    from pruning.walk.sequential import WalkOptions
    from tasks.execution.progress import Progress

#: called with the options and a progress; must be picklable (an instance of a class at the top of a module)
WalkJob = Callable[["WalkOptions", "Progress"], None]


def run_walk(context: StageContext, job: WalkJob) -> None:
    """Run the job, in as many processes as the settings say; an error of any of them is raised here.

    Activations beyond the budget lie in the stage's scratch folder, on the disk whose room was checked.
    """
    from pruning.walk.activations import FOLDER_PREFIX

    settings, folder = context.run_context.settings, context.store.scratch(context.ref)
    for left in folder.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
        shutil.rmtree(left)
    if settings.walk_processes == 1:
        job(walk_options(settings, context.place.device, activation_folder=folder), context.progress)
        return
    _run_processes(settings, job, folder, context.progress)


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


def _run_processes(settings: Settings, job: WalkJob, scratch: Path, progress: Progress) -> None:
    spawn = multiprocessing.get_context("spawn")
    size = settings.walk_processes
    messages: Any = spawn.Queue()
    with tempfile.TemporaryDirectory(prefix="slimline-walk-") as folder:
        rendezvous = Path(folder) / "rendezvous"
        processes = [
            spawn.Process(
                target=_run_process, args=(rank, size, rendezvous, settings, job, scratch, messages), daemon=True
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _listen(processes, messages, progress)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _listen(processes: list[Any], messages: Any, progress: Progress) -> None:
    """Hand on progress until every process has said that it is done; raise the first error."""
    done = 0
    while done < len(processes):
        all_ended = not any(process.is_alive() for process in processes)  # before the queue is looked at
        try:
            message = messages.get(timeout=1.0)
        except Empty:
            _refuse_dead(processes, None)
            if all_ended:
                raise RuntimeError("the processes ended before the walk was done; run again to go on") from None
            continue
        if isinstance(message, Exception):
            if isinstance(message, RuntimeError):  # perhaps only the echo of another one's end
                processes[0].join(timeout=1.0)
                _refuse_dead(processes, message)
            raise message
        if message is None:
            done += 1
        else:
            progress(*message)


def _refuse_dead(processes: list[Any], cause: Exception | None) -> None:
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        # the kernel kills with 9 when memory is short, and only what says so is tried again
        perhaps = ", perhaps out of memory" if codes[0] == -signal.SIGKILL else ""
        raise RuntimeError(
            f"a process of the walk died (exit code {codes[0]}){perhaps}; the finished layers are kept; "
            "run again to go on"
        ) from cause


def _run_process(
    rank: int, size: int, rendezvous: Path, settings: Settings, job: WalkJob, scratch: Path, messages: Any
) -> None:
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
        process_group = ProcessGroup.join(backend, rendezvous.as_uri(), rank, size)

        def report(share: float, message: str) -> None:
            if rank == 0:
                messages.put((share, message))

        job(walk_options(settings, device, process_group=process_group, activation_folder=scratch), report)
        dist.barrier()
        dist.destroy_process_group()
        messages.put(None)
    except Exception as error:  # whatever it is, the parent raises it
        messages.put(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error if the parent can rebuild it, else a RuntimeError with its type and words: a queue pickles in a thread
    of its own, where an error that cannot be pickled would be lost."""
    try:
        ForkingPickler.dumps(error)
        if type(deepcopy(error)) is type(error):  # rebuilt as the parent does it
            return error
    except Exception as reason:  # classes may raise what they like
        log.debug("%s cannot be pickled: %s", type(error).__name__, reason)
    return RuntimeError(f"{type(error).__name__}: {error}")
