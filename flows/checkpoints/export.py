"""A checkpoint in the form that was asked for, with its model card and its figures beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.checkpoints.eval_results import eval_results
from flows.checkpoints.find import base_licence
from flows.checkpoints.model_card import Card, model_card
from flows.checkpoints.public import public, repository, short_name
from flows.records.export import lm_eval_results
from flows.records.export.evaluated import Evaluated, evaluated
from flows.records.export.write import in_words, safe_name

if TYPE_CHECKING:
    from flows.checkpoints.find import Found
    from infra.exporting.gguf_file import Type
    from infra.results.store import ResultsStore
    from infra.settings import Settings


@dataclass(frozen=True)
class Exported:
    """What was written where; notes: sentences that the user should read."""

    out: Path
    bytes: int
    notes: tuple[str, ...] = ()


def export_hf(found: Found, results: ResultsStore, settings: Settings, out: Path, *, stock: bool) -> Exported:
    """Write the Hugging Face folder `out`. stock: refuse what transformers' own class cannot load.

    Raises PruningError or InfraError with the way out; nothing is left at `out` then.
    """
    from tasks.exporting.hf_folder import export_hf_folder

    licence, along = base_licence(found, settings)
    card = Card(found, licence, results.metrics(found.run.run_key))
    texts = {"README.md": model_card(card)} | result_files(found, results)
    export_hf_folder(found.folder, out, texts, along, stock=stock)
    return Exported(out, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()))


def export_gguf(found: Found, settings: Settings, out: Path, kind: Type, progress: Callable[[int], None]) -> Exported:
    """Write the GGUF file `out`. progress: told the bytes of each tensor that is written. Raises as `export_hf`."""
    from tasks.exporting import gguf

    licence, _ = base_licence(found, settings)
    row = found.row
    made = {
        "version": found.run.slimline_version,
        "run": found.run.run_key,
        "checkpoint": row.checkpoint,
        "checkpoint_key": row.checkpoint_key,
        "method": row.method,
        "recovery": row.recovery,
        "sparsity": row.total_sparsity,
    }
    metadata = gguf.gguf_metadata(repository(row.model), licence, made)
    metadata |= {"general.name": f"{short_name(row.model)} {row.checkpoint}", "general.basename": short_name(row.model)}
    notes = gguf.export_gguf(found.folder, out, metadata, kind, progress)
    return Exported(out, out.stat().st_size, tuple(notes))


def result_files(found: Found, results: ResultsStore) -> dict[str, str]:
    """What the run measured of the checkpoint, by file name: for the hub, and as lm-eval writes it; none if nothing."""
    files: dict[str, str] = {}
    for checkpoint in _measured(found, results):
        content = public(in_words(lm_eval_results.lm_eval_results(checkpoint, safe_name(checkpoint.name))))
        name = str(lm_eval_results.file_name(checkpoint))
        files[name] = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files |= eval_results(checkpoint)
    return files


def _measured(found: Found, results: ResultsStore) -> Sequence[Evaluated]:
    return [each for each in evaluated(results, found.run) if each.checkpoint == found.row.checkpoint]
