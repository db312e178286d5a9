"""Part `transfers`: what a layer of the walk moves to and from an accelerator, counted on the pretended device."""

from __future__ import annotations

from pruning.checkpoints.decoder import ResidentDecoder
from pruning.methods import slimgpt
from pruning.walk.options import WalkOptions
from pruning.walk.state import MemoryWalkState
from tests.bench.materials import Materials
from tests.bench.options import Options, Shape, Windows
from tests.bench.random_tokens import random_calibration
from tests.bench.report import Figures, Result, protocol
from tests.bench.synthetic import random_llama
from tests.pretended.counts import counted
from tests.pretended.device import pretended
from tests.pretended.transfers import PLACES, layer_transfers

SHAPE = Shape(64, 176, 4, 3)
TOKENS = Windows(8, 32)
_BATCH_SIZE = 2


def run(materials: Materials, options: Options) -> Result:
    """Streams each way by where activations lie, and what the host waits for while one layer is pruned."""
    model, figures = random_llama(SHAPE), Figures()
    calibration = random_calibration(SHAPE.vocab, TOKENS)
    for place in PLACES:
        moved = layer_transfers(model, calibration.input_ids_NL, place, _BATCH_SIZE)
        figures[f"transfers_{place}_streams_in"] = round(moved.streams_in, 3)
        figures[f"transfers_{place}_streams_out"] = round(moved.streams_out, 3)
        figures[f"transfers_{place}_blocking_copies"] = moved.blocking
    with pretended() as device, counted() as counts:
        slimgpt.prune(
            ResidentDecoder(model),
            calibration,
            slimgpt.Config(sparsity=0.2, split="equal"),
            options=WalkOptions(device, _BATCH_SIZE),
            walk_state=MemoryWalkState(),
        )
    figures["transfers_waits_per_layer"] = round(counts.synchronisations / SHAPE.layers, 1)
    how = protocol(
        options,
        f"random Llama: {SHAPE.layers} layers, hidden {SHAPE.hidden}; {TOKENS} random tokens; bytes of one layer over "
        "those of the residual stream of all samples, weights and kept inputs left out; nothing fits but in `device`",
        batches=f"batches of {_BATCH_SIZE}",
    )
    return Result("transfers", how, figures)
