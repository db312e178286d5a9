"""Pruning from one checkpoint folder to another without ever holding the model.

In memory at any time: embeddings, final norm and head, two decoder layers, one Hessian with its factors, and as much of
the activations as the budget allows. Finished layers lie in a work folder; a killed run called again with the same one
goes on at the layer where it was, and its result is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from pruning.checkpoints.decoder import StreamedDecoder
from pruning.checkpoints.headers import write_index
from pruning.checkpoints.load_check import check_pruned
from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.save_load import PLAN_FILE, load_plan
from pruning.errors import PruningError
from pruning.modeling import pruned_config
from pruning.walk.durable_state import DurableWalkState
from pruning.walk.state import no_listener

if TYPE_CHECKING:
    from pruning.calibration import CalibrationSet
    from pruning.plan import PruningPlan
    from pruning.walk.options import WalkOptions
    from pruning.walk.state import OnEntry, Pruned


def prune_checkpoint(
    source: Path,
    out: Path,
    module: Any,
    calibration: CalibrationSet,
    config: Any,
    *,
    statistics: Path | None = None,
    orders: Path | None = None,
    options: WalkOptions,
    work: Path,
    progress: Callable[[float, str], None] = lambda share, message: None,
    on_entry: OnEntry = no_listener,
) -> Pruned:
    """Prune the checkpoint in `source` by the method `module` and write the smaller one into `out` (weights, config,
    plan.json; no tokenizer).

    work: folder of finished layers, to be kept until `out` is whole; it belongs to this pruning alone. on_entry: called
    with each finished layer, those that a killed run had finished included. With several processes
    (options.process_group) all call this with the same folders and the leader writes `out`, and loads it once. Raises
    PruningError as the method does, if the source is no checkpoint of a supported family, or if the work folder holds
    layers of another pruning; UnsoundCheckpoint if what was written is not what was pruned.
    """
    decoder = StreamedDecoder(source)
    _claim(work, _identity(source, module, calibration, config))
    walk_state = DurableWalkState(work, options.process_group, on_entry=on_entry)
    pruned: Pruned = module.prune(
        decoder,
        calibration,
        config,
        statistics=statistics,
        orders=orders,
        options=options,
        walk_state=walk_state,
        progress=progress,
    )
    if options.process_group.leads:
        before = load_plan(source)
        assemble_checkpoint(decoder, walk_state.shards, pruned.plan, out)
        plan = pruned.plan if before is None else before.compose(pruned.plan)
        (out / PLAN_FILE).write_text(plan.model_dump_json(), encoding="utf-8")
        check_pruned(out, source, pruned.plan)
    return pruned


def _identity(source: Path, module: Any, calibration: CalibrationSet, config: Any) -> str:
    """What makes one pruning another: method, options, calibration tokens and weight files (by name and size)."""
    tokens = torch.cat([calibration.input_ids_NL, calibration.heldout_ids_ML])
    files = sorted((file.name, file.stat().st_size) for file in source.glob("*.safetensors"))
    digest = hashlib.sha256(tokens.numpy().tobytes())
    digest.update(json.dumps([module.__name__, module.VERSION, config.model_dump(mode="json"), files]).encode())
    return digest.hexdigest()


def _claim(work: Path, identity: str) -> None:
    """Mark the work folder as this pruning's. Every process of a group writes the same, none sees it half written."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / "pruning.sha256"
    if mark.is_file() and mark.read_text(encoding="utf-8") != identity:
        raise PruningError(
            f"{work} holds finished layers of another pruning (other options, calibration or model); give another work "
            "folder or delete it"
        )
    unfinished = work / f"{mark.name}.{os.getpid()}"
    unfinished.write_text(identity, encoding="utf-8")
    os.replace(unfinished, mark)


def assemble_checkpoint(decoder: StreamedDecoder, layer_files: list[Path], plan: PruningPlan, out: Path) -> None:
    """Make a checkpoint folder of the layers' finished files and what of the source lies outside the layers.

    The files are linked (copied, if `out` is on another disk), so that an interrupted assembly can be repeated.
    """
    out.mkdir(parents=True, exist_ok=True)
    count = len(layer_files) + 1
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    skeleton, prefix = decoder.skeleton, f"{decoder.family.layers_path}."
    outside = {
        name: parameter.contiguous()  # a tied head is not named
        for name, parameter in skeleton.named_parameters()
        if not name.startswith(prefix)
    }
    save_file(outside, out / names[0], metadata={"format": "pt"})
    for file, name in zip(layer_files, names[1:], strict=True):
        _link(file, out / name)
    model_class, config = pruned_config(
        skeleton.config,
        decoder.family,
        decoder.family.head_dim(skeleton),
        tuple(layer.layer for layer in plan.layers),
        plan.shapes,
        output_bias=plan.output_bias,
    )
    write_index(out, names)
    config.architectures = [model_class.__name__]
    config.dtype = skeleton.config.dtype
    if getattr(model_class, "_auto_class", None) is not None:
        custom_object_save(meta_model(model_class, config), out, config=config)
    config.save_pretrained(out)
    generation = decoder.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
