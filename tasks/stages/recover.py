"""Stage: a checkpoint repaired by training; killed, it goes on where its last training checkpoint was, and interrupted,
at that very step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.sources.find import Sources, TextData
from pruning.training.data import PlainText, RecordData, WatchedText, data_read
from tasks.devices.placement import device_names
from tasks.execution.context import StageContext
from tasks.execution.interrupts import something_to_save
from tasks.execution.processes import Reports, run_processes
from tasks.execution.stage import stage
from tasks.requests import RecoverRequest

if TYPE_CHECKING:
    import torch

    from infra.settings import Settings
    from pruning.distributed import ProcessGroup
    from pruning.recovery import RecoveryInputs


def text_data(data: RecordData | PlainText) -> TextData:
    """A data set that a training reads, as it is read."""
    values = data.model_dump(include=set(TextData.model_fields))
    return TextData(**values)


def training_processes(settings: Settings) -> int:
    """How many processes share the batches of one training: by default one per CUDA device."""
    if settings.train_processes is not None:
        return settings.train_processes
    return len(device_names(settings.device))


def read_data(module: Any, config: Any, sources: Sources) -> dict[str, Any]:
    """What a plug-in reads by its options, as fields of its RecoveryInputs."""
    read: dict[str, Any] = {}
    for data in data_read(module, config):
        if isinstance(data, RecordData):
            read["records"] = sources.records(text_data(data), data.columns)
        elif isinstance(data, WatchedText):
            read["watched"] = _Rows(sources, text_data(data))
        else:
            read["texts"] = _Texts(sources, text_data(data), config.seed)
    return read


@dataclass(frozen=True)
class _Job:
    """What each process of a training does; the leader writes."""

    request: RecoverRequest
    source: Path
    teacher: Path | None
    calibration: Path | None
    sources: Sources
    scratch: Path
    out: Path
    sharded: bool | None

    def alone(self, device: torch.device, reports: Reports) -> None:
        """In this process."""
        self._train(device, reports, 0, 1)

    def __call__(self, process_group: ProcessGroup, device: torch.device, reports: Reports) -> None:
        """In one of a group."""
        self._train(device, reports, process_group.rank, process_group.size)

    def _train(self, device: torch.device, reports: Reports, rank: int, size: int) -> None:
        from infra.models.import_model import load_tokenizer
        from pruning.checkpoints.load_check import check_saved
        from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
        from pruning.training.options import TrainingRun

        model, tokenizer = load_checkpoint(self.source), load_tokenizer(self.source)
        report = self.request.module.recover(
            model,
            tokenizer,
            self._inputs(),
            self.request.typed_config,
            TrainingRun(self.scratch, device, reports.progress, reports.curves, self.out, rank, size, self.sharded),
        )
        if rank == 0:
            save_checkpoint(model.cpu(), None, self.out, load_plan(self.source))
            check_saved(self.out, model)
            (self.out / "recovery.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")

    def _inputs(self) -> RecoveryInputs:
        from infra.models.import_model import load_tokenizer
        from pruning.calibration import CalibrationSet
        from pruning.checkpoints.save_load import load_checkpoint, load_plan
        from pruning.recovery import RecoveryInputs

        read = read_data(self.request.module, self.request.typed_config, self.sources)
        if (teacher := self.teacher) is not None:
            read["teacher"] = lambda: load_checkpoint(teacher)
            read["teacher_tokenizer"] = lambda: load_tokenizer(teacher)
        if self.calibration is not None:
            read["calibration"] = CalibrationSet.load(self.calibration)
        return RecoveryInputs(identity=repr(self.request.sources), plan=load_plan(self.source), **read)


@dataclass(frozen=True)
class _Rows:
    sources: Sources
    data: TextData

    def __call__(self) -> Iterator[str]:
        return iter(self.sources.texts(self.data))


@dataclass(frozen=True)
class _Texts:
    sources: Sources
    data: TextData
    seed: int

    def __call__(self) -> Iterator[str]:
        return self.sources.shuffled_texts(self.data, self.seed)


def fill(request: RecoverRequest, context: StageContext) -> None:
    """Write the repaired checkpoint and recovery.json (its curves), with the adapters if it was made with some."""
    from infra.models.import_model import hand_on_tokenizer

    store, settings = context.store, context.run_context.settings
    source = store.path(request.checkpoint)
    teacher, calibration = (store.path(ref) if ref else None for ref in (request.teacher, request.calibration))
    scratch = store.scratch(context.ref)
    sources = context.run_context.sources
    job = _Job(request, source, teacher, calibration, sources, scratch, context.folder, settings.train_sharded)
    size, reports = training_processes(settings), Reports(context.progress, context.curves)
    with something_to_save():
        if size == 1:
            job.alone(context.place.device, reports)
        else:
            kept = "its last training checkpoint is kept"
            run_processes(size, job, settings, reports, what="training", kept=kept)
    hand_on_tokenizer(source, context.folder)


recover = stage(
    "recover",
    fill,
    devices="all",
    imports=(
        "datasets",
        "peft",
        "pruning.checkpoints.load_check",
        "transformers.trainer",
        "transformers.models.auto.tokenization_auto",
    ),
)
