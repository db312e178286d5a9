"""A checkpoint as a folder for whoever loads it without slimline: few weight files, a config that names no machine, the
modelling file of uneven layers, and a class of transformers' own where it has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from pruning.checkpoints.folder import WEIGHTS, with_own_modelling_file_
from pruning.checkpoints.headers import write_index
from pruning.checkpoints.load_check import check_copied
from pruning.checkpoints.save_load import PLAN_FILE
from pruning.checkpoints.stored_tensors import StoredTensors, stored_tensors
from pruning.errors import PruningError
from pruning.modeling import config_shapes
from pruning.plan import describe_shapes

#: of one weight file, as transformers writes them
MAX_SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"


def write_plain_folder(source: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the checkpoint in `source` into the empty folder `out`: weights, config, modelling file, generation config,
    plan.json; no tokenizer. It counts as written when it was loaded once, with equal logits.

    In memory at any time: one weight file. Raises PruningError if the source is no whole checkpoint or transformers
    refuses its generation config, UnsoundCheckpoint if what was written does not load.
    """
    stored = stored_tensors(source)
    _write_weights(stored, out, max_shard_bytes)
    config = json.loads((source / "config.json").read_bytes())
    # where a model once lay (_name_or_path) is nobody's business, and nothing reads it
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:  # where transformers before 5, and what is built on it, looks for it; else it takes 10000
        kept["rope_theta"] = theta
    (out / "config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with_own_modelling_file_(out)
    if (source / GENERATION).is_file():
        _check_generation(source)
        shutil.copyfile(source / GENERATION, out / GENERATION)
    if (source / PLAN_FILE).is_file():
        shutil.copyfile(source / PLAN_FILE, out / PLAN_FILE)
    check_copied(out, source)


def check_stock(source: Path) -> None:
    """Raise PruningError unless transformers' own class of the family loads the checkpoint: equal layers, which it can
    build."""
    stored = stored_tensors(source)
    if stored.config.model_type == stored.family.model_types[0]:
        return
    widths, stock = config_shapes(stored.config), stored.family.architectures[0]
    if len(set(widths)) > 1:
        raise PruningError(
            f"its layers differ ({describe_shapes(widths)}), and {stock} builds all of them equal: prune with "
            "`uniform: true`, or export it as hf, with the modelling file that builds them"
        )
    what = "biases on its output linears" if getattr(stored.config, "output_bias", False) else describe_shapes(widths)
    raise PruningError(
        f"its layers are equal, but {stock} cannot build them ({what}): prune with `uniform: true`, which takes only "
        "what it can, or export it as hf, with the modelling file that builds them"
    )


def _write_weights(stored: StoredTensors, out: Path, max_bytes: int) -> None:
    shards = list(_shards(stored, max_bytes))
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [WEIGHTS]
    for name, tensors in zip(names, shards, strict=True):
        save_file(stored.as_stored(stored.read(tensors)), out / name, metadata={"format": "pt"})
    if count > 1:
        write_index(out, names)


def _shards(stored: StoredTensors, max_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file; one that is larger than a file may be has a file of its own."""
    shard: list[str] = []
    size, item = 0, torch.empty(0, dtype=stored.dtype).element_size()
    for name, place in stored.places.items():
        tensor_size = place.shape.numel() * item
        if shard and size + tensor_size > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor_size
    yield shard


def _check_generation(source: Path) -> None:
    """transformers takes no generation config with values that cannot be: whoever loads the folder would fail."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(source, local_files_only=True).validate()
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise PruningError(
            f"the model's {GENERATION} has a value that transformers refuses ({reason[:300]}): "
            "mend or remove that file in the model and import it again"
        ) from error
