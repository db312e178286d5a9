"""How this machine runs the layer walk: on one device, or in several processes that share the samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.execution.context import StageContext
from tasks.execution.processes import Reports, run_processes

if TYPE_CHECKING:
    import torch

    from infra.settings import Settings
    from pruning.distributed import ProcessGroup
    from pruning.walk.options import WalkOptions
    from tasks.execution.curves import Curves
    from tasks.execution.progress import Progress

#: called with the options, a progress and curves; must be picklable (an instance of a class at the top of a module)
WalkJob = Callable[["WalkOptions", "Progress", "Curves"], None]


def run_walk(context: StageContext, job: WalkJob) -> None:
    """Run the job, in as many processes as the settings say; an error of any of them is raised here.

    Activations beyond the budget lie in the stage's scratch folder, on the disk whose room was checked.
    """
    from pruning.activations.activations import FOLDER_PREFIX

    settings, folder = context.run_context.settings, context.store.scratch(context.ref)
    for left in folder.glob(f"{FOLDER_PREFIX}*"):  # of a killed process
        shutil.rmtree(left)
    if settings.walk_processes == 1:
        options = walk_options(settings, context.place.device, activation_folder=folder)
        job(options, context.progress, context.curves)
        return
    together, reports = _Together(job, settings, folder), Reports(context.progress, context.curves)
    kept = "the finished layers are kept"
    run_processes(settings.walk_processes, together, settings, reports, what="walk", kept=kept)


def walk_options(settings: Settings, device: Any, **more: Any) -> WalkOptions:
    """Batch size and memory budgets from the settings. more: further fields of WalkOptions."""
    from pruning.host_memory import activation_budget
    from pruning.walk.options import WalkOptions

    on_device, num_processes = settings.device_activation_budget_gib, settings.walk_processes
    return WalkOptions(
        device=device,
        batch_size=settings.walk_batch_size,
        activation_budget_bytes=activation_budget(settings.activation_budget_gib, num_processes=num_processes),
        device_budget_bytes=None if on_device is None else int(on_device * 2**30),
        **more,
    )


@dataclass(frozen=True)
class _Together:
    """The job in one process of a group."""

    job: WalkJob
    settings: Settings
    scratch: Path

    def __call__(self, process_group: ProcessGroup, device: torch.device, reports: Reports) -> None:
        options = walk_options(self.settings, device, process_group=process_group, activation_folder=self.scratch)
        self.job(options, reports.progress, reports.curves)
