"""How a checkpoint was made, read from the manifests in the store: they say it of every checkpoint, whoever made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra import registry
from infra.artifacts.manifest import Manifest
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.tracking.records import DataInput
from pruning.methods import asked_number
from tasks.requests import PruneRequest

#: what a param says where there is nothing to say: charts need a value of every run
NONE = "none"


@dataclass(frozen=True)
class Lineage:
    """The manifests of a checkpoint's stages from the import on, and of the calibration sets that they read."""

    made: tuple[Manifest, ...]
    calibrations: tuple[Manifest, ...]

    @property
    def pruned(self) -> tuple[Manifest, ...]:
        """Of the steps that made it smaller."""
        return tuple(each for each in self.made if each.ref.key.startswith("prune-"))

    @property
    def recovered(self) -> tuple[Manifest, ...]:
        """Of the steps that trained it."""
        return tuple(each for each in self.made if each.ref.key.startswith("recover-"))

    @property
    def sparsity(self) -> float | None:
        """The share of the decoder that was removed, if one step removed it; 0 of a dense model. None where a step made
        the vocabulary smaller: such a model has no like among those of a budget."""
        if not self.pruned:
            return 0.0
        if any(map(_is_of_vocabulary, self.pruned)):
            return None
        asked = [_config(each).get("sparsity") for each in self.pruned]
        return float(asked[0]) if len(asked) == 1 and asked[0] is not None else None

    def params(self, model: str) -> dict[str, str]:
        """Short ones, in which the checkpoints of all runs can be compared; each has all of them."""
        splits = [str(_config(each)["split"] or "default") for each in self.pruned if "split" in _config(each)]
        return {
            "model": model or NONE,
            "method": _joined(_plugin(each) for each in self.pruned),
            "sparsity": _joined(map(_amount, self.pruned)) if self.pruned else "0",
            "split": _joined(splits),
            "recovery": _joined(_plugin(each) for each in self.recovered),
            "calibration": _joined(dict.fromkeys(map(_windows, self.calibrations))),
        }

    def inputs(self) -> Iterator[DataInput]:
        """The data sets by which it was made."""
        for calibration in self.calibrations:
            yield _input(calibration.request.get("source"), "calibration", calibration.request)
        for each in self.made:
            yield from inputs_of(each, "calibration" if _is_of_vocabulary(each) else "training")

    def steps(self) -> list[dict[str, Any]]:
        """Each step with all its options, as JSON can hold it."""
        return [
            {"key": each.ref.key, "plugin": each.request["plugin"], "config": each.request.get("config")}
            for each in self.made
            if "plugin" in each.request
        ]


def lineage_of(ref: ArtifactRef, store: ArtifactStore) -> Lineage:
    """The lineage of a checkpoint, as far back as the store goes."""
    made: list[Manifest] = []
    calibrations: list[Manifest] = []
    next_one: ArtifactRef | None = ref
    while next_one is not None and store.has(next_one):
        manifest = store.manifest(next_one)
        made.insert(0, manifest)
        calibration = _reference(manifest, "calibration")
        if calibration is not None and store.has(calibration):
            calibrations.insert(0, store.manifest(calibration))
        next_one = _reference(manifest, "checkpoint")
    return Lineage(tuple(made), tuple(calibrations))


def inputs_of(manifest: Manifest, context: str) -> Iterator[DataInput]:
    """The data sets that a stage read itself."""
    given = manifest.request.get("sources")
    sources = given if isinstance(given, list) else []
    for source in sources:
        yield _input(source, context, _config(manifest) if len(sources) == 1 else {})


def _reference(manifest: Manifest, field: str) -> ArtifactRef | None:
    given = manifest.request.get(field)
    return ArtifactRef.model_validate(given) if given else None


def _config(manifest: Manifest) -> Mapping[str, Any]:
    config = manifest.request.get("config")
    return config if isinstance(config, dict) else {}


def _plugin(manifest: Manifest) -> str:
    return str(manifest.request.get("plugin", NONE))


def _is_of_vocabulary(manifest: Manifest) -> bool:
    package, name = PruneRequest.package, _plugin(manifest)
    known = name in registry.available(package)  # not those of another version of the code
    return known and hasattr(registry.load(package, name, PruneRequest.noun), "rebuild")


def _amount(manifest: Manifest) -> str:
    config = _config(manifest)
    if config.get("sparsity") is not None:
        return f"{config['sparsity']:g}"
    return asked_number(config) or NONE


def _windows(calibration: Manifest) -> str:
    asked = calibration.request
    return f"{_name(asked.get('source'))} {asked.get('num_samples')}x{asked.get('seq_len')} seed {asked.get('seed')}"


def _joined(words: Iterable[str]) -> str:
    return "+".join(words) or NONE


def _name(identity: Any) -> str:
    return str(identity.get("repo_id", "local data")) if isinstance(identity, dict) else "local data"


def _input(identity: Any, context: str, options: Mapping[str, Any]) -> DataInput:
    """identity: what tells the data set from any other; options: of the stage that read it."""
    identity = identity if isinstance(identity, dict) else {}
    given: Sequence[str] = [str(identity[word]) for word in ("content", "revision") if identity.get(word)]
    digest = given[0] if given else hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    hub = {"path": str(identity["repo_id"])} if "repo_id" in identity else {}
    named = {"config_name": options.get("config"), "split": options.get("split")}
    parts = {word: value for word, value in named.items() if isinstance(value, str)} if hub else {}
    return DataInput(name=_name(identity), digest=digest, context=context, hub=hub | parts)
