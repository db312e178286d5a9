"""A checkpoint in the form that was asked for, with its model card and its figures beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from infra.models.licence import Licence
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
    notes = gguf.export_gguf(found.folder, out, gguf_metadata(found, licence), kind, progress)
    return Exported(out, out.stat().st_size, tuple(notes))


def gguf_metadata(found: Found, licence: Licence | None) -> dict[str, Any]:
    """The keys general.* and slimline.* of a GGUF file; what is not known is left out."""
    row = found.row
    base = repository(row.model)
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": f"{short_name(row.model)} {row.checkpoint}",
        "general.basename": short_name(row.model),
        "general.tags": ["pruned", *(row.method or "").split("+"), "slimline"] if row.method else ["slimline"],
        "slimline.version": found.run.slimline_version,
        "slimline.run": found.run.run_key,
        "slimline.checkpoint": row.checkpoint,
        "slimline.checkpoint_key": row.checkpoint_key,
        "slimline.method": row.method,
        "slimline.recovery": row.recovery,
        "slimline.sparsity": row.total_sparsity,
    }
    if licence is not None:
        values |= {
            "general.license": licence.identifier,
            "general.license.name": licence.name,
            "general.license.link": licence.link,
        }
    if base is not None:
        owner, _, name = base.partition("/")
        values |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": name,
            "general.base_model.0.organization": owner,
            "general.base_model.0.repo_url": f"https://huggingface.co/{base}",
        }
    return {key: value for key, value in values.items() if value is not None}


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
