"""The order in which the experts of each layer go: by what they add to the stream (REAP, arXiv 2510.13999), or by how
often the router sends a token to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pruning.orders import Order
from pruning.ranking.job import RankingJob
from pruning.ranking.routing import Usage, expert_usage

if TYPE_CHECKING:
    from pruning.families import ModelFamily
    from pruning.plan import LayerShape

ExpertScore = Literal["reap", "contribution", "frequency"]

log = logging.getLogger("slimline")


def rank_experts(job: RankingJob, score: ExpertScore, prior_tokens: int) -> None:
    """Write the order of the experts of every layer, least worth first; what got no token is worth nothing, and of
    equals what comes first in the layer goes first."""
    names, unseen = experts_names(job.decoder.family, job.shapes), 0
    for layer, usage in enumerate(expert_usage(job.decoder, job.calibration.input_ids_NL, job.options)):
        if usage is not None:
            unseen += usage.counts.count(0)
            if job.options.process_group.leads:
                job.orders.save(names[layer], "expert", Order.of_scores(scores_of(usage, score, prior_tokens)))
        job.layer_done(layer)
    if unseen:
        log.warning(
            "%d of the model's experts got none of the calibration tokens and go first; raise num_samples or seq_len",
            unseen,
        )


def scores_of(usage: Usage, score: ExpertScore, prior_tokens: int) -> list[float]:
    """By expert; see pruning.methods.experts.OrderConfig."""
    match score:
        case "frequency":
            return [count / usage.num_tokens for count in usage.counts]
        case "contribution":
            return [norm / usage.num_tokens for norm in usage.norms]
        case "reap":
            pairs = zip(usage.norms, usage.counts, strict=True)
            return [norm / (count + prior_tokens) if count else 0.0 for norm, count in pairs]


def experts_names(family: ModelFamily, shapes: Sequence[LayerShape]) -> dict[int, str]:
    """By layer with experts, the dotted name of these: "model.layers.3.mlp.experts"."""
    assert family.experts is not None
    block = f"{family.mlp_name}.{family.experts.module_name}"
    return {layer: f"{family.layers_path}.{layer}.{block}" for layer, shape in enumerate(shapes) if shape.num_experts}
