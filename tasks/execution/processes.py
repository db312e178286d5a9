"""Several processes of this machine that do one piece of work together, as a group of torch.distributed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from infra.child_process import end_with_parent
from infra.tracking.records import TRAINING
from tasks.devices.placement import device_names

if TYPE_CHECKING:
    import torch

    from infra.settings import Settings
    from pruning.distributed import ProcessGroup
    from tasks.execution.curves import Curves
    from tasks.execution.progress import Progress

log = logging.getLogger("slimline")


@dataclass(frozen=True)
class Reports:
    """Whom a piece of work tells how far it is and what it measured on the way."""

    progress: Progress
    curves: Curves


Job = Callable[["ProcessGroup", "torch.device", Reports], None]
"""What each process does; must be picklable (an instance of a class at the top of a module). What other processes than
the first report is dropped."""


@dataclass(frozen=True)
class _Failure:
    error: Exception


_DONE = None


def run_processes(size: int, job: Job, settings: Settings, reports: Reports, *, what: str, kept: str) -> None:
    """Run the job in so many processes, one per CUDA device or sharing the cores; an error of any is raised here.

    reports: called here with what the first process reports; what they raise ends them all. what, kept: for the
    message about a process that died.
    """
    spawn = multiprocessing.get_context("spawn")
    messages: Any = spawn.Queue()
    with tempfile.TemporaryDirectory(prefix="slimline-processes-") as folder:
        rendezvous = Path(folder) / "rendezvous"
        processes = [
            spawn.Process(target=_run_process, args=(rank, size, rendezvous, settings, job, messages), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _listen(processes, messages, reports, what, kept)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _listen(processes: list[Any], messages: Any, reports: Reports, what: str, kept: str) -> None:
    """Hand on messages until every process has said that it is done; raise the first error."""
    done = 0
    while done < len(processes):
        all_ended = not any(process.is_alive() for process in processes)  # before the queue is looked at
        try:
            message = messages.get(timeout=1.0)
        except Empty:
            _refuse_dead(processes, None, what, kept)
            if all_ended:
                raise RuntimeError(f"the processes ended before the {what} was done; run again to go on") from None
            continue
        if isinstance(message, _Failure):
            if isinstance(message.error, RuntimeError):  # perhaps only the echo of another one's end
                processes[0].join(timeout=1.0)
                _refuse_dead(processes, message.error, what, kept)
            raise message.error
        if message is _DONE:
            done += 1
        else:
            kind, *said = message
            getattr(reports, kind)(*said)


def _refuse_dead(processes: list[Any], cause: Exception | None, what: str, kept: str) -> None:
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        # the kernel kills with 9 when memory is short, and only what says so is tried again
        perhaps = ", perhaps out of memory" if codes[0] == -signal.SIGKILL else ""
        raise RuntimeError(
            f"a process of the {what} died (exit code {codes[0]}){perhaps}; {kept}; run again to go on"
        ) from cause


def _run_process(rank: int, size: int, rendezvous: Path, settings: Settings, job: Job, messages: Any) -> None:
    import torch
    import torch.distributed as dist

    from pruning.distributed import ProcessGroup

    end_with_parent()
    # as torchrun names them: accelerate, under the Trainer, knows by these that there is a group
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    try:
        names = device_names(settings.device)
        device = torch.device(names[rank % len(names)])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        backend = "nccl" if device.type == "cuda" else "gloo"
        process_group = ProcessGroup.join(backend, rendezvous.as_uri(), rank, size)

        job(process_group, device, _sent(messages.put) if rank == 0 else _sent(lambda message: None))
        dist.barrier()
        dist.destroy_process_group()
        messages.put(_DONE)
    except Exception as error:  # whatever it is, the parent raises it
        messages.put(_Failure(_sendable(error)))


def _sent(put: Callable[[tuple[Any, ...]], None]) -> Reports:
    """Reports that go to the parent."""

    def progress(share: float, message: str) -> None:
        put(("progress", share, message))

    def curves(step: int, values: Mapping[str, float], section: str = TRAINING) -> None:
        put(("curves", step, dict(values), section))

    return Reports(progress, curves)


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
