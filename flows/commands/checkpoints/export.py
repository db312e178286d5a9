"""`slimline export`: a run as one file, or one of its checkpoints for other programs."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.app import AsJson, app, prepared
from flows.commands.store import Run, in_units, progress_bar
from flows.errors import SpecError

if TYPE_CHECKING:
    from flows.checkpoints.export import Exported
    from infra.settings import Settings

Checkpoint = Annotated[
    str | None, typer.Option(metavar="NAME", help="Which checkpoint; by default the one that the run ends in.")
]


class Format(StrEnum):
    """What `slimline export` writes."""

    bundle = "bundle"
    hf = "hf"
    hf_uniform = "hf-uniform"
    gguf = "gguf"
    onnx = "onnx"


class GgufType(StrEnum):
    """What the matrices of a GGUF file are stored as."""

    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"
    f32 = "f32"


@app.command()
def export(
    run: Run,
    file: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="Where to write it; by default named after the run, here.")
    ] = None,
    form: Annotated[
        Format,
        typer.Option("--format", help="The whole run, a folder, one of equal layers, a file for llama.cpp."),
    ] = Format.bundle,
    checkpoint: Checkpoint = None,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="The same as PATH.")] = None,
    kind: Annotated[GgufType | None, typer.Option("--type", help="Of a GGUF file's matrices; f16 by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run with all its artifacts into one file (for `slimline import`), or a checkpoint for other programs."""
    settings = prepared()
    if file is not None and out is not None:
        raise SpecError(f"{file} and --out {out} both say where to write: give one of them")
    if kind is not None and form is not Format.gguf:
        raise SpecError(f"--type {kind.value} is of GGUF files: add --format gguf")
    if form is Format.onnx:
        raise SpecError(
            "--format onnx: ONNX files cannot be written, for optimum-onnx (0.1.0) needs transformers below 4.58 and "
            "checkpoints are of 5.14 or newer: take --format gguf, or hf-uniform for whatever reads stock models"
        )
    if form is not Format.bundle:
        _export_checkpoint(settings, run, checkpoint, form, kind or GgufType.f16, out or file, as_json)
        return
    if checkpoint is not None:
        raise SpecError(
            f"--checkpoint {checkpoint} goes with --format hf and the like: a bundle has all checkpoints of the run"
        )
    _export_bundle(settings, run, out or file, as_json)


def _export_bundle(settings: Settings, run: str, file: Path | None, as_json: bool) -> None:
    from flows.records.lookup import find_run
    from flows.records.retention import finished_artifacts
    from infra.artifacts.bundle_writer import contents_of, write_bundle
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore

    if file is not None and (not file.absolute().parent.is_dir() or file.is_dir()):
        raise SpecError(f"{file} cannot be written: give a file in a folder that exists")
    results, store = ResultsStore.of(settings), ArtifactStore(settings.store_root)
    row = find_run(results, run)
    file = file or Path(f"{row.name}.tar")
    rows = results.export_file(row.run_key).read_bytes()
    contents = contents_of(store, row.run_key, row.name, finished_artifacts(results, row.run_key), rows)
    with progress_bar("export") as (total, written):
        total(contents.bytes)
        write_bundle(store, contents, rows, file.absolute(), written)
    print(f"{row.run_key}: {len(contents.artifacts)} artifacts ({in_units(contents.bytes)}) in {file}")
    if as_json:
        print(json.dumps({"run_key": row.run_key, "artifacts": len(contents.artifacts), "bytes": contents.bytes}))


def _export_checkpoint(
    settings: Settings,
    run: str,
    checkpoint: str | None,
    form: Format,
    kind: GgufType,
    out: Path | None,
    as_json: bool,
) -> None:
    from flows.checkpoints.export import export_gguf, export_hf
    from flows.checkpoints.find import find_checkpoint
    from flows.records.export.write import safe_name
    from infra.artifacts.store import ArtifactStore
    from infra.results.store import ResultsStore
    from tasks.exporting.publishing import check_place

    results = ResultsStore.of(settings)
    found = find_checkpoint(results, ArtifactStore(settings.store_root), run, checkpoint)
    name = safe_name(found.name) + (f"-{kind.value.upper()}.gguf" if form is Format.gguf else "")
    place = (out or Path(name)).absolute()
    check_place(place)
    if form is Format.gguf:
        with progress_bar("export") as (_, written):
            exported = export_gguf(found, settings, place, kind.value, written)
    else:
        exported = export_hf(found, results, settings, place, stock=form is Format.hf_uniform)
    _say(exported, found.run.run_key, found.row.checkpoint, form, as_json)


def _say(exported: Exported, run_key: str, checkpoint: str, form: Format, as_json: bool) -> None:
    print(f"{run_key}: {checkpoint} as {form.value} ({in_units(exported.bytes)}) in {exported.out}")
    for note in exported.notes:
        print(f"note: {note}")
    if as_json:
        told = {"run_key": run_key, "checkpoint": checkpoint, "format": form.value, "bytes": exported.bytes}
        print(json.dumps(told | {"out": str(exported.out), "notes": list(exported.notes)}))
