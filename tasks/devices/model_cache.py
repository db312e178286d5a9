"""Models that stay loaded from one measurement to the next: many suites of one checkpoint load it once.

Each device holds what was measured last on it, with the processes that have copies of it if there are any. A stage of
another kind gets the device empty (see tasks.devices.pool).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluation.inference.oom import free_memory
from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.child_process import end_with_parent
from tasks.devices.exported import FILE, load_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evaluation.inference.replicas import ReplicaProcesses
    from tasks.devices.placement import Placement


@dataclass
class _Cached:
    """What one place keeps: models by the keys of their checkpoints or files, and processes with copies of one of them.

    replicas_of: key of their checkpoint, and how each process loads it.
    """

    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    replicas: ReplicaProcesses | None = None
    replicas_of: tuple[str, list[Mapping[str, Any]]] | None = None

    def end_replicas(self) -> None:
        """End the processes, if there are any."""
        if self.replicas is not None:
            self.replicas.end()
        self.replicas = self.replicas_of = None


_lock = threading.Lock()

#: by place; only who holds the place touches what is on it
_cache: dict[Placement, _Cached] = {}


def load_cached(refs: Sequence[ArtifactRef], store: ArtifactStore, place: Placement) -> tuple[PreTrainedModel, ...]:
    """The models of these checkpoints (or of files exported from some) in eval mode on the place, which must be the
    caller's; what else is cached goes, and so do processes that have copies of another checkpoint than the first.

    They must be left as they are.
    """
    cached = _cached_on(place)
    if cached.replicas_of is not None and cached.replicas_of[0] != refs[0].key:
        cached.end_replicas()
    others = cached.models.keys() - {ref.key for ref in refs}
    for key in others:
        del cached.models[key]
    if others:
        free_memory()
    for ref in refs:
        if ref.key not in cached.models:
            cached.models[ref.key] = _loaded(ref, store, place).eval()
    return tuple(cached.models[ref.key] for ref in refs)


def _loaded(ref: ArtifactRef, store: ArtifactStore, place: Placement) -> PreTrainedModel:
    from pruning.checkpoints.save_load import load_checkpoint

    if ref.kind != "export":
        return load_checkpoint(store.path(ref), **place.load)
    checkpoint = ArtifactRef.model_validate(store.manifest(ref).request["checkpoint"])
    return load_gguf(store.path(checkpoint), store.path(ref) / FILE, **place.load)


@contextmanager
def cached_replicas(
    ref: ArtifactRef, store: ArtifactStore, place: Placement, loads: Sequence[Mapping[str, Any]]
) -> Iterator[ReplicaProcesses]:
    """Processes with copies of a checkpoint beside its model on the place: those of the measurement before, unless one
    of them died. They go with the model, or when the block fails.

    loads: as for ReplicaProcesses.
    """
    from evaluation.inference.replicas import ReplicaProcesses
    from pruning.checkpoints.save_load import load_checkpoint

    cached, wanted = _cached_on(place), (ref.key, list(loads))
    try:
        if cached.replicas is None or cached.replicas_of != wanted or not cached.replicas.alive:
            cached.end_replicas()
            copies = ReplicaProcesses(store.path(ref), load_checkpoint, loads, initializer=end_with_parent)
            cached.replicas, cached.replicas_of = copies, wanted
            cached.replicas.start()
        yield cached.replicas
    except BaseException:
        cached.end_replicas()
        raise


def evict(place: Placement | None = None) -> None:
    """Keep nothing any more, on that place or anywhere; on CUDA not even the blocks that torch would use again."""
    with _lock:
        dropped = [_cache.pop(each) for each in list(_cache) if place in (None, each)]
    if not dropped and not _on_cuda(place):
        return
    while dropped:
        dropped.pop().end_replicas()
    free_memory()


def _cached_on(place: Placement) -> _Cached:
    with _lock:
        return _cache.setdefault(place, _Cached())


def _on_cuda(place: Placement | None) -> bool:
    """Whether this process uses CUDA, and the place, if it is one, is a part of it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and (place is None or place.device.type == "cuda")
