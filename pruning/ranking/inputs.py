"""Scores from the inputs of the output linears: one walk over the dense model, one layer at a time.

Shapes: I inputs of an output linear, K kv heads, G query heads per kv head, D columns of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pruning.families.forward import SubLayerKind
from pruning.ranking.job import RankingJob
from pruning.statistics.moments import Moments, MomentsAccumulator
from pruning.walk.sequential import walk_layers

#: score of every input column of an output linear, (I,), from its weight, rows times how much they count in the stream
ColumnScores = Callable[[SubLayerKind, Tensor, Moments], Tensor]


def rank_by_inputs(job: RankingJob, scores: ColumnScores, *, mean: bool = False, keep_means: bool = False) -> None:
    """Order heads and channels by `scores` of the columns they own in o_proj and down_proj.

    mean: heads and kv groups score the mean of their columns instead of the sum. keep_means: write the means of the
    inputs beside the orders, for a repair by biases. Raises PruningError if an input is not finite.
    """
    decoder = job.decoder
    head_dim, add = decoder.family.head_dim(decoder.skeleton), torch.mean if mean else torch.sum
    for sub_layer in walk_layers(decoder, job.calibration.input_ids_NL, job.options, accumulator=MomentsAccumulator):
        moments: Moments = sub_layer.statistic
        scores_I = scores(sub_layer.kind, sub_layer.counting_weight_OI, moments).double()
        if sub_layer.kind == "attention":
            shape = job.shapes[sub_layer.layer]
            scores_KGD = scores_I.reshape(shape.num_kv_heads, shape.num_groups, head_dim)
            scores_KG, scores_K = add(scores_KGD, (2,)), add(scores_KGD, (1, 2))
            job.save_heads(sub_layer.layer, scores_KG.flatten(), scores_K)
        else:
            job.save_channels(sub_layer.layer, scores_I, sub_layer.expert)
            if sub_layer.ends_layer:
                job.layer_done(sub_layer.layer)
        if keep_means and job.options.process_group.leads:
            job.orders.save_mean(sub_layer.name, moments.mean_I)


def column_energy(weight_OI: Tensor) -> Tensor:
    """Sum of W² of every input column, (I,) float32."""
    return weight_OI.float().square().sum(0)
