"""What the tensors of a checkpoint folder are: the one place that decides on their names, ties and dtype.

Both ways to load a checkpoint (as a whole, or layer by layer) and the import ask here, so that a folder is one model
for all of them or refused by all of them. Where transformers has an answer it is ours too: a base model's names get
their prefix, a head that differs from the embeddings it should be tied to stays, and mixed dtypes become one. What
transformers would drop or make up with a warning (a bias that the config does not know, a weight that is missing) is
refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruning.checkpoints.folder import INDEX, WEIGHTS, class_of_folder
from pruning.checkpoints.meta_model import meta_model
from pruning.errors import PruningError
from pruning.families import ModelFamily, family_of
from pruning.families.parts import check_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: old checkpoints keep tables of the rotary module, which every model computes for itself
_TABLES = re.compile(r"(^|\.)rotary_emb\.")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its file, its name in there, and what the file says of it."""

    file: Path
    name: str
    shape: torch.Size
    dtype: str


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint folder under the names of one model.

    config: of the model class; whether the head is tied, and the dtype, are as the tensors say. dtype: of all weights:
    the one that most are stored in. files: all that belong to the model. places: of every weight by its name in the
    model; a tied head has none. oddities: what a clean checkpoint would have otherwise, a clause each; empty for a
    clean one.
    """

    folder: Path
    model_class: Any
    config: Any
    family: ModelFamily
    dtype: torch.dtype
    files: frozenset[Path]
    places: dict[str, Place]
    oddities: tuple[str, ...]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        return _tied(self.config)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These weights by their names in the model, in the dtype, each a copy of its own: a mapped file would stay
        resident as long as one of them lives.

        Raises PruningError for an unreadable file.
        """
        read: dict[str, Tensor] = {}
        places = {name: self.places[name] for name in names}
        for file in sorted({place.file for place in places.values()}):
            try:
                with safe_open(file, framework="pt") as shard:
                    for name, place in sorted(places.items()):
                        if place.file == file:
                            read[name] = self._in_dtype(name, shard.get_tensor(place.name))
            except (SafetensorError, OSError) as error:
                raise PruningError(f"cannot load the weights in {file}: {error}") from error
        return read

    def _in_dtype(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == self.dtype:
            return tensor.clone()
        cast = tensor.to(self.dtype)
        if not bool(cast.isfinite().all()):
            raise PruningError(
                f"{name} in {self.folder} has values that {dtype_name(self.dtype)}, which most weights are stored in, "
                "cannot hold: import the model in float32 or bfloat16"
            )
        return cast


def stored_tensors(folder: Path) -> StoredTensors:
    """What the folder holds.

    Raises PruningError if it is no checkpoint of a supported family, has only pickled weights, lacks or misshapes a
    weight, holds one twice, one that the model would not compute with, or one that is no plain floating point.
    """
    model_class = class_of_folder(folder)
    config = _config(model_class, folder)
    model = meta_model(model_class, config)
    family = family_of(model)
    check_parts(family, model)
    stored = _headers(folder)
    oddities: list[str] = []
    places, extra = _named(model, stored, folder, oddities)
    _refuse_unused(model, family, extra, folder, oddities)
    _settle_tie_(config, family, places, folder, oddities)
    _check_whole(model, config, family, places, folder)
    dtype = _common_dtype(places, folder, oddities)
    if config.dtype not in (None, dtype):
        oddities.append(f"config.json says {dtype_name(config.dtype)} and the weights are {dtype_name(dtype)}")
    config.dtype = dtype
    files = frozenset(place.file for place in stored)
    return StoredTensors(folder, model_class, config, family, dtype, files, places, tuple(oddities))


def write_index(folder: Path, files: Iterable[str]) -> dict[str, torch.Size]:
    """Write the index of these weight files of a folder, and return the shapes of the tensors in them."""
    weight_map: dict[str, str] = {}
    shapes: dict[str, torch.Size] = {}
    total = 0
    for file in files:
        for place in _header(folder / file):
            weight_map[place.name], shapes[place.name] = file, place.shape
            total += place.shape.numel() * _DTYPES[place.dtype].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return shapes


def _config(model_class: Any, folder: Path) -> Any:
    try:
        return model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the many checks of a config class raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise PruningError(
            f"{folder}/config.json is no config of a {model_class.__name__} ({reason.strip()}): fetch it again"
        ) from error


def _headers(folder: Path) -> list[Place]:
    """The tensors in the files that transformers reads, which need not be all that lie in the folder."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise PruningError(f"{folder} has neither {WEIGHTS} nor {INDEX}, so which of its files is the model?")
    try:
        files = sorted({str(name) for name in json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningError(f"{folder / INDEX} is no index of shards ({error!r}): fetch it again") from error
    # what a missing file should hold is missing, and said by name
    return [place for file in files if (folder / file).is_file() for place in _header(folder / file)]


def _header(file: Path) -> list[Place]:
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return [Place(file, name, torch.Size(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise PruningError(f"cannot load the weights in {file}: {error}") from error


def _named(
    model: PreTrainedModel, stored: Iterable[Place], folder: Path, oddities: list[str]
) -> tuple[dict[str, Place], list[Place]]:
    """The tensors that the model has by their names in it, and the others."""
    wanted, base = model.state_dict().keys(), f"{model.base_model_prefix}."
    places: dict[str, Place] = {}
    extra: list[Place] = []
    for place in stored:
        name = next((name for name in (place.name, base + place.name) if name in wanted), None)
        if name is None:
            extra.append(place)
        elif name in places:
            raise PruningError(
                f"{folder} holds {name} twice, as {places[name].name} and as {place.name}: take one of the two out"
            )
        else:
            places[name] = place
    if renamed := [name for name, place in places.items() if name != place.name]:
        oddities.append(f"{len(renamed)} tensors lack the prefix {base}")
    return places, extra


def _refuse_unused(
    model: PreTrainedModel, family: ModelFamily, extra: Iterable[Place], folder: Path, oddities: list[str]
) -> None:
    """A further weight of a part that the model has would be computed with, if the config were the one it came with;
    parts that the model does not have (a value head, layers beyond the last) change nothing."""
    base = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.named_modules() if name and name != model.base_model_prefix}
    layers = tuple(f"{family.layers_path}.{index}." for index in range(len(family.layers(model))))
    left = []
    for place in extra:
        names = place.name, base + place.name
        inside = any(name.startswith(layers) or name.rpartition(".")[0] in parts for name in names)
        if inside and not _TABLES.search(place.name):
            raise PruningError(
                f"{folder} holds {place.name}, which a {type(model).__name__} of its config.json does not compute "
                "with: take the config.json that belongs to the weights"
            )
        if not _TABLES.search(place.name):
            left.append(place.name)
    if left:
        oddities.append(f"{len(left)} tensors are of no part of the model, the first is {left[0]}")


def _settle_tie_(config: Any, family: ModelFamily, places: dict[str, Place], folder: Path, oddities: list[str]) -> None:
    """A tied head is none of the tensors: a stored copy is left out, and one that differs means that it is not tied."""
    if not _tied(config):
        return
    head, embeddings = f"{family.head_path}.weight", f"{family.embeddings_path}.weight"
    if head not in places:
        return
    if embeddings not in places:
        places[embeddings] = places.pop(head)
        oddities.append(f"the tied embeddings are stored as {head}")
    elif _equal(places[head], places[embeddings]):
        del places[head]
        oddities.append(f"the tied {head} is stored as well")
    else:
        config.tie_word_embeddings = False
        oddities.append(f"config.json ties {head} to the embeddings, but the two differ: it is kept as it is stored")


def _tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _equal(one: Place, other: Place) -> bool:
    """Whether two stored matrices are the same, read a part at a time."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rows = max(1, 2**24 // max(1, one.shape[1:].numel()))
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        mine, theirs = a.get_slice(one.name), b.get_slice(other.name)
        return all(
            torch.equal(mine[start : start + rows], theirs[start : start + rows])
            for start in range(0, one.shape[0], rows)
        )


def _check_whole(
    model: PreTrainedModel, config: Any, family: ModelFamily, places: Mapping[str, Place], folder: Path
) -> None:
    tied = {f"{family.head_path}.weight"} if _tied(config) else set()
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    missing = [name for name in wanted if name not in places]
    if missing:
        raise PruningError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}: save it again")
    for name, shape in wanted.items():
        if places[name].shape != shape:
            raise PruningError(
                f"{folder} misshapes a weight, save it again: {name} is {list(places[name].shape)} and its config.json "
                f"says {list(shape)}"
            )


def _common_dtype(places: Mapping[str, Place], folder: Path, oddities: list[str]) -> torch.dtype:
    """The dtype that most weights are stored in: transformers computes in one."""
    sizes: Counter[str] = Counter()
    for name, place in places.items():
        if place.dtype not in _DTYPES:
            raise PruningError(
                f"{folder} holds {name} as {place.dtype}, which is no plain floating point: take the model unquantised"
            )
        sizes[place.dtype] += place.shape.numel()
    (most, _), *others = sizes.most_common()
    if others:
        said = ", ".join(dtype_name(_DTYPES[dtype]) for dtype, _ in others)
        oddities.append(f"some weights are {said} where most are {dtype_name(_DTYPES[most])}")
    return _DTYPES[most]


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
