"""Scores of coupled structures: the rows of q, k, v and the columns of o that go with a head, the rows of gate and up
and the column of down that go with a channel (LLM-Pruner, arXiv 2305.11627, section 3.1).

Shapes: O outputs, I inputs of a linear, K kv heads, G query heads per kv head, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pruning.families.experts import experts_of
from pruning.gradients.backward import walk_backwards
from pruning.ranking.job import RankingJob

if TYPE_CHECKING:
    from pruning.families import ModelFamily
    from pruning.plan import LayerShape

Level = Literal["element", "vector"]
Aggregation = Literal["sum", "mean", "max", "prod", "first"]
#: from a linear's role (q, k, v, o, gate, up, down; of an expert gate.0, up.0, ...) to the importance of each of its
#: weights, (O, I)
Importances = Mapping[str, Tensor]

_AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "prod": lambda parts: parts.prod(0),
    "first": lambda parts: parts[0],
}


def rank_layer(
    job: RankingJob, layer: int, importances: Importances, *, level: Level = "element", aggregation: Aggregation = "sum"
) -> None:
    """Write the orders of one layer.

    level: each weight counts by its absolute importance ("element"), or each row or column by the absolute value of its
    sum ("vector"). aggregation: over the linears of a structure, feature by feature; then features are added up.
    """
    shape, family = job.shapes[layer], job.decoder.family
    if shape.num_heads:
        query, group = _heads(importances, shape, family.head_dim(job.decoder.skeleton), level, aggregation)
        job.save_heads(layer, query, group)
    for expert in range(shape.num_experts) if shape.num_experts else (None,):
        end = "" if expert is None else f".{expert}"
        gate_up = [role for role in (f"gate{end}", f"up{end}") if role in importances]
        parts = [*(_rows(importances[role], level) for role in gate_up), _columns(importances[f"down{end}"], level)]
        job.save_channels(layer, _AGGREGATE[aggregation](torch.stack(parts)), expert)


def _heads(
    importances: Importances, shape: LayerShape, head_dim: int, level: Level, aggregation: Aggregation
) -> tuple[Tensor, Tensor]:
    """Scores of query heads alone (q and o), (H,), and of whole kv groups (q, k, v and o), (K,)."""
    aggregate = _AGGREGATE[aggregation]
    q_HD = _rows(importances["q"], level).reshape(-1, head_dim)
    o_HD = _columns(importances["o"], level).reshape(-1, head_dim)
    k_KD, v_KD = (_rows(importances[role], level).reshape(-1, head_dim) for role in "kv")
    q_KD, o_KD = (each.reshape(shape.num_kv_heads, shape.num_groups, head_dim).sum(1) for each in (q_HD, o_HD))
    query_H = aggregate(torch.stack([q_HD, o_HD])).sum(1)
    group_K = aggregate(torch.stack([q_KD, k_KD, v_KD, o_KD])).sum(1)
    return query_H, group_K


def _rows(importance_OI: Tensor, level: Level) -> Tensor:
    return importance_OI.abs().sum(1) if level == "element" else importance_OI.sum(1).abs()


def _columns(importance_OI: Tensor, level: Level) -> Tensor:
    return importance_OI.abs().sum(0) if level == "element" else importance_OI.sum(0).abs()


def weights(family: ModelFamily, layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer by role, float64 so that products of four do not vanish."""
    found = {role: rows.weight_OI.detach().double() for role, rows in family.projections(layer).items()}
    experts = experts_of(family, layer)
    for expert in range(experts.num_experts if experts else 0):
        assert experts is not None
        found |= {f"{role}.{expert}": part.double() for role, part in experts.parts(expert).items()}
    return found


def weights_of_layers(job: RankingJob) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The weights of every layer, one layer in memory at a time."""
    for index in range(job.decoder.num_layers):
        yield index, weights(job.decoder.family, job.decoder.layer(index, job.options.device))
        job.layer_done(index)


def rank_by_taylor(
    job: RankingJob, num_samples: int | None, *, level: Level = "element", aggregation: Aggregation = "sum"
) -> None:
    """Order heads and channels by weights times gradients of the loss on the first `num_samples` windows (None: all).

    Raises PruningError if a layer with its gradients does not fit the device, or a gradient is not finite.
    """
    family, ids_NL = job.decoder.family, job.calibration.input_ids_NL[:num_samples]
    walk = walk_backwards(
        job.decoder, ids_NL, job.options, progress=lambda share: job.progress(share, "gradients, layer by layer")
    )
    for found in walk:
        names = {id(parameter): name for name, parameter in found.module.named_parameters()}
        importances = {
            role: rows.weight_OI.detach().double()
            * rows.rows_of(found.gradients[names[id(rows.linear.weight)]]).double()
            for role, rows in family.projections(found.module).items()
        }
        experts = experts_of(family, found.module)
        if experts is not None:
            fused = experts.module.gate_up_proj, experts.module.down_proj
            gradients = [found.gradients[names[id(weight)]] for weight in fused]
            for expert in range(experts.num_experts):
                weights_of, gradients_of = experts.parts(expert), experts.parts(expert, *gradients)
                importances |= {
                    f"{role}.{expert}": part.double() * gradients_of[role].double() for role, part in weights_of.items()
                }
        rank_layer(job, found.layer, importances, level=level, aggregation=aggregation)
