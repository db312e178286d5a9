"""Stage: the greedy order of every linear of the dense model, for methods that do not propagate errors."""

from __future__ import annotations

from tasks.requests import OrderRequest
from tasks.stage import Bench, stage


def fill(request: OrderRequest, bench: Bench) -> None:
    """Write one file per linear and unit."""
    from pruning.decoder import StreamedDecoder
    from tasks.walking import walk_options

    store = bench.store
    request.module.order(
        StreamedDecoder(store.path(request.checkpoint)),
        store.path(request.statistics),
        request.typed_config,
        bench.folder,
        options=walk_options(bench.workplace.settings, bench.place.device),
        progress=bench.progress,
    )


order = stage("order", fill, devices="one", imports=("pruning.decoder", "pruning.orders"))
