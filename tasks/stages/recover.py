"""Stage: a checkpoint repaired by training; killed, it goes on where its last training checkpoint was, and interrupted,
at that very step."""

from __future__ import annotations

from infra.sources.find import TextData
from tasks.execution.context import StageContext
from tasks.execution.interrupts import something_to_save
from tasks.execution.stage import stage
from tasks.requests import RecoverRequest


def record_data(request: RecoverRequest) -> tuple[TextData, tuple[str, ...]]:
    """The data set of the training records, and the columns that are read."""
    where = request.typed_config.data
    data = TextData(dataset=where.dataset, config=where.config, split=where.split, revision=where.revision)
    return data, where.columns


def fill(request: RecoverRequest, context: StageContext) -> None:
    """Write the repaired checkpoint and recovery.json (the loss curve)."""
    from infra.models.import_model import hand_on_tokenizer, load_tokenizer
    from pruning.checkpoints.load_check import check_saved
    from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint

    source = context.store.path(request.checkpoint)
    config = request.typed_config
    records = context.run_context.sources.records(*record_data(request))
    model, tokenizer = load_checkpoint(source), load_tokenizer(source)
    with something_to_save():
        report = request.module.recover(
            model,
            tokenizer,
            records,
            config,
            scratch=context.store.scratch(context.ref),
            device=context.place.device.type,
            progress=context.progress,
        )
        save_checkpoint(model.cpu(), None, context.folder, load_plan(source))
    check_saved(context.folder, model)
    hand_on_tokenizer(source, context.folder)
    (context.folder / "recovery.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


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
