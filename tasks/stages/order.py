"""Stage: the greedy order of every linear of the dense model, for methods that do not propagate errors."""

from __future__ import annotations

from tasks.execution.context import StageContext
from tasks.execution.stage import stage
from tasks.requests import OrderRequest


def fill(request: OrderRequest, context: StageContext) -> None:
    """Write one file per linear and unit."""
    from pruning.checkpoints.decoder import StreamedDecoder
    from tasks.stages.walk_processes import walk_options

    store = context.store
    request.module.order(
        StreamedDecoder(store.path(request.checkpoint)),
        store.path(request.statistics),
        request.typed_config,
        context.folder,
        options=walk_options(context.run_context.settings, context.place.device),
        progress=context.progress,
    )


order = stage("order", fill, devices="one", imports=("pruning.checkpoints.decoder", "pruning.layerwise.orders"))
