"""Models that stay loaded from one measurement to the next: many suites of one checkpoint load it once.

Each device holds what was measured last on it, with the processes that have copies of it if there are any. A stage of
another kind gets the device empty (see tasks.devices.pool).
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infra.artifacts.store import ArtifactRef, ArtifactStore
from infra.child_process import end_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from evaluation.inference.replicas import ReplicaProcesses
    from tasks.devices.placement import Placement


@dataclass
class _Kept:
    """What one place keeps: models by the keys of their checkpoints, and a crew with copies of one of them.

    crew_of: key of the crew's checkpoint, and how each of its processes loads it.
    """

    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    replicas: ReplicaProcesses | None = None
    replicas_of: tuple[str, list[Mapping[str, Any]]] | None = None

    def dismiss(self) -> None:
        """End the crew's processes."""
        if self.replicas is not None:
            self.replicas.end()
        self.replicas = self.replicas_of = None


_lock = threading.Lock()

#: by place; only who holds the place touches what is on it
_kept: dict[Placement, _Kept] = {}


def load_kept(refs: Sequence[ArtifactRef], store: ArtifactStore, place: Placement) -> tuple[PreTrainedModel, ...]:
    """The models of these checkpoints in eval mode on the place, which must be the caller's; what else it keeps goes,
    and so does a crew that has copies of another checkpoint than the first.

    They must be left as they are.
    """
    from pruning.checkpoints.save_load import load_checkpoint

    kept = _kept_on(place)
    if kept.replicas_of is not None and kept.replicas_of[0] != refs[0].key:
        kept.dismiss()
    others = kept.models.keys() - {ref.key for ref in refs}
    for key in others:
        del kept.models[key]
    if others:
        _free(place)
    for ref in refs:
        if ref.key not in kept.models:
            kept.models[ref.key] = load_checkpoint(store.path(ref), **place.load).eval()
    return tuple(kept.models[ref.key] for ref in refs)


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

    kept, wanted = _kept_on(place), (ref.key, list(loads))
    try:
        if kept.replicas is None or kept.replicas_of != wanted or not kept.replicas.alive:
            kept.dismiss()
            copies = ReplicaProcesses(store.path(ref), load_checkpoint, loads, initializer=end_with_parent)
            kept.replicas, kept.replicas_of = copies, wanted
            kept.replicas.start()
        yield kept.replicas
    except BaseException:
        kept.dismiss()
        raise


def forget(place: Placement | None = None) -> None:
    """Keep nothing any more, on that place or anywhere; on CUDA not even the blocks that torch would use again."""
    with _lock:
        dropped = [_kept.pop(each) for each in list(_kept) if place in (None, each)]
    if not dropped and not _on_cuda(place):
        return
    while dropped:
        dropped.pop().dismiss()
    _free(place)


def _kept_on(place: Placement) -> _Kept:
    with _lock:
        return _kept.setdefault(place, _Kept())


def _free(place: Placement | None) -> None:
    gc.collect()
    if _on_cuda(place):
        sys.modules["torch"].cuda.empty_cache()


def _on_cuda(place: Placement | None) -> bool:
    """Whether this process uses CUDA, and the place, if it is one, is a part of it."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized() and (place is None or place.device.type == "cuda")
