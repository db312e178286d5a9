"""Stage: a checkpoint repaired by training; killed, it goes on where its last training checkpoint was, and interrupted,
at that very step."""

from __future__ import annotations

from infra.sources import TextData
from tasks.interrupts import something_to_save
from tasks.requests import RecoverRequest
from tasks.stage import Bench, stage


def record_data(request: RecoverRequest) -> tuple[TextData, tuple[str, ...]]:
    """The data set of the training records, and the columns that are read."""
    where = request.typed_config.data
    data = TextData(dataset=where.dataset, config=where.config, split=where.split, revision=where.revision)
    return data, where.columns


def fill(request: RecoverRequest, bench: Bench) -> None:
    """Write the repaired checkpoint and recovery.json (the loss curve)."""
    from infra.models import hand_on_tokenizer, load_tokenizer
    from pruning.checkpoint import load_checkpoint, load_plan, save_checkpoint
    from pruning.load_check import check_saved

    source = bench.store.path(request.checkpoint)
    config = request.typed_config
    records = bench.workplace.sources.records(*record_data(request))
    model, tokenizer = load_checkpoint(source), load_tokenizer(source)
    with something_to_save():
        report = request.module.recover(
            model,
            tokenizer,
            records,
            config,
            scratch=bench.store.scratch(bench.ref),
            device=bench.place.device.type,
            progress=bench.progress,
        )
        save_checkpoint(model.cpu(), None, bench.folder, load_plan(source))
    check_saved(bench.folder, model)
    hand_on_tokenizer(source, bench.folder)
    (bench.folder / "recovery.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")


recover = stage(
    "recover",
    fill,
    devices="all",
    imports=(
        "datasets",
        "peft",
        "pruning.load_check",
        "transformers.trainer",
        "transformers.models.auto.tokenization_auto",
    ),
)
