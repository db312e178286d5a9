"""What the tensors of a checkpoint folder are: the one place that decides on their names, ties and dtype.

Both ways to load a checkpoint (as a whole, or layer by layer) and the import ask here, so that a folder is one model
for all of them or refused by all of them. Where transformers has an answer it is ours too: a base model's names get
their prefix, a head that differs from the embeddings it should be tied to stays, and mixed dtypes become one. What
transformers would drop or make up with a warning (a bias that the config does not know, a weight that is missing) is
refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pruning.checkpoints.folder import class_of_folder
from pruning.checkpoints.headers import DTYPES, Place, headers
from pruning.checkpoints.meta_model import meta_model
from pruning.checkpoints.published_experts import ExpertPart, PublishedExperts, fused_place
from pruning.errors import PruningError
from pruning.families import ModelFamily, family_of
from pruning.families.parts import check_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: old checkpoints keep tables of the rotary module, which every model computes for itself
_TABLES = re.compile(r"(^|\.)rotary_emb\.")


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint folder under the names of one model.

    config: of the model class; whether the head is tied, and the dtype, are as the tensors say. dtype: of all weights:
    the one that most are stored in. files: all that belong to the model. places: of every weight by its name in the
    model; a tied head has none. parts: of a weight that is stored expert by expert; its place is then that of the
    first one, in the shape of all. oddities: what a clean checkpoint would have otherwise, a clause each; empty for a
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
    parts: Mapping[str, Mapping[ExpertPart, Place]] = field(default_factory=dict)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embeddings."""
        return _tied(self.config)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These weights by their names in the model, in the dtype, each a copy of its own: a mapped file would stay
        resident as long as one of them lives.

        Raises PruningError for an unreadable file.
        """
        wanted = list(names)
        whole = {name: self.places[name] for name in wanted if name not in self.parts}
        read = self._read(whole)
        for name in wanted:
            if name in self.parts:  # one weight at a time is twice in memory
                found = self._read({place.name: place for place in self.parts[name].values()})
                fused = {part: found.pop(place.name) for part, place in self.parts[name].items()}
                read[name] = PublishedExperts(self.family).fuse(fused)
        return read

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in the model under the names that checkpoints of the family have."""
        return PublishedExperts(self.family).apart(tensors)

    def _read(self, places: Mapping[str, Place]) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
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
    stored = headers(folder)
    oddities: list[str] = []
    places, parts, extra = _named(model, family, stored, folder, oddities)
    _refuse_unused(model, family, extra, folder, oddities)
    _settle_tie_(config, family, places, folder, oddities)
    _check_whole(model, config, family, places, folder)
    dtype = _common_dtype(places, folder, oddities)
    if config.dtype not in (None, dtype):
        oddities.append(f"config.json says {dtype_name(config.dtype)} and the weights are {dtype_name(dtype)}")
    config.dtype = dtype
    files = frozenset(place.file for place in stored)
    return StoredTensors(folder, model_class, config, family, dtype, files, places, tuple(oddities), parts)


def _config(model_class: Any, folder: Path) -> Any:
    try:
        return model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the many checks of a config class raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise PruningError(
            f"{folder}/config.json is no config of a {model_class.__name__} ({reason.strip()}): fetch it again"
        ) from error


def _named(
    model: PreTrainedModel, family: ModelFamily, stored: Iterable[Place], folder: Path, oddities: list[str]
) -> tuple[dict[str, Place], dict[str, dict[ExpertPart, Place]], list[Place]]:
    """The tensors that the model has by their names in it, those of experts by the name of the one for all, and the
    others."""
    wanted, base, published = model.state_dict(), f"{model.base_model_prefix}.", PublishedExperts(family)
    places: dict[str, Place] = {}
    parts: dict[str, dict[ExpertPart, Place]] = {}
    extra: list[Place] = []
    prefixed = 0
    for place in stored:
        spellings = (place.name, base + place.name)
        name = next((ours for ours in map(published.renamed, spellings) if ours in wanted), None)
        part = next((each for each in map(published.part, spellings) if each and each.fused in wanted), None)
        found = part.fused if part else name
        prefixed += found is not None and found.startswith(base) and not place.name.startswith(base)
        if part is not None:
            parts.setdefault(part.fused, {})[part] = place
        elif name is None:
            extra.append(place)
        elif name in places:
            raise PruningError(
                f"{folder} holds {name} twice, as {places[name].name} and as {place.name}: take one of the two out"
            )
        else:
            places[name] = place
    for name, of_experts in parts.items():
        places[name] = fused_place(name, wanted[name].shape, of_experts, folder)
    if prefixed:
        oddities.append(f"{prefixed} tensors lack the prefix {base}")
    return places, parts, extra


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
        if place.dtype not in DTYPES:
            raise PruningError(
                f"{folder} holds {name} as {place.dtype}, which is no plain floating point: take the model unquantised"
            )
        sizes[place.dtype] += place.shape.numel()
    (most, _), *others = sizes.most_common()
    if others:
        said = ", ".join(dtype_name(DTYPES[dtype]) for dtype, _ in others)
        oddities.append(f"some weights are {said} where most are {dtype_name(DTYPES[most])}")
    return DTYPES[most]


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
