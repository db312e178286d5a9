"""Models that stay loaded from one measurement to the next: many suites of one checkpoint load it once.

Each device holds what was measured last on it. A stage of another kind gets the device empty.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from infra.artifacts import ArtifactRef, ArtifactStore
from tasks.devices import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_lock = threading.Lock()

#: by place, then by the key of the checkpoint; only who holds the place touches what is on it
_kept: dict[Placement, dict[str, PreTrainedModel]] = {}


def load_kept(refs: Sequence[ArtifactRef], store: ArtifactStore, place: Placement) -> tuple[PreTrainedModel, ...]:
    """The models of these checkpoints in eval mode on the place, which must be the caller's; what else it keeps goes.

    They must be left as they are.
    """
    from pruning.checkpoint import load_checkpoint

    with _lock:
        before = _kept.pop(place, {})
    models = {ref.key: before[ref.key] for ref in refs if ref.key in before}
    if before.keys() - models.keys():
        before.clear()
        _free(place)
    for ref in refs:
        if ref.key not in models:
            models[ref.key] = load_checkpoint(store.path(ref), **place.load).eval()
    with _lock:
        _kept[place] = models
    return tuple(models[ref.key] for ref in refs)


def forget(place: Placement | None = None) -> None:
    """Keep nothing any more, on that place or anywhere."""
    with _lock:
        dropped = [_kept.pop(each) for each in list(_kept) if place in (None, each)]
    if dropped:
        dropped.clear()
        _free(place)


def _free(place: Placement | None) -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and (place is None or place.device.type == "cuda"):
        torch.cuda.empty_cache()
