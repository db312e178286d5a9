"""Two models on the same items: the difference of every metric, its confidence interval, and whether it is chance.

Items that are hard for one model are hard for the other, so differences item by item vary far less than the scores do,
and show damage that two separate standard errors hide. Where answers are right or wrong, flips are a measure of damage
of their own: accuracy hides them where as many are lost as gained (arXiv 2407.09141). The tests are in
`evaluation.significance.resampling`: McNemar's for right or wrong, sign flips for any other score, and the
bootstrap for intervals.

Items are taken as independent of each other: neighbouring windows of one text are not quite.

Shapes: N items, R resamples, P the pair (measured, reference).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from evaluation.report import Average
from evaluation.samples import Sample
from evaluation.significance.resampling import RESAMPLES, Floats, mcnemar_p, resampled_means, sign_flip_p

Test = Literal["mcnemar", "sign_flip"]
_Place = tuple[str, str]
"""Task and metric."""

_NAMED = 3
"""So many parts of an average are named in a sentence."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """One metric of one task, the measured model beside the reference, on the same `num_items` items.

    difference = value - reference_value, within [low, high] at 95 % confidence. p_value: two-sided, of this test alone.
    num_lost, num_gained: items that the reference had right and the measured model has wrong, and the other way round;
    None of scores that are not right or wrong.
    """

    task: str
    metric: str
    value: float
    reference_value: float
    low: float
    high: float
    p_value: float
    test: Test
    num_items: int
    num_lost: int | None
    num_gained: int | None

    @property
    def difference(self) -> float:
        """value - reference_value, in the unit of the metric."""
        return self.value - self.reference_value


@dataclass(frozen=True)
class Unpaired:
    """A metric of a task that could not be compared, and why: half a sentence."""

    task: str
    metric: str
    reason: str


@dataclass(frozen=True)
class _Stratum:
    """The items of one task, and its share in the figure: 1 unless that is an average over tasks."""

    scores_NP: Floats
    weights_N: Floats
    share: float = 1.0

    @property
    def means_P(self) -> Floats:
        """Weighted means of both models."""
        sums = [math.fsum(column_N * self.weights_N) for column_N in self.scores_NP.T]
        return np.array(sums) / math.fsum(self.weights_N)

    @property
    def parts_N(self) -> Floats:
        """What each item adds to the difference, (N,)."""
        differences_N: Floats = (self.scores_NP[:, 0] - self.scores_NP[:, 1]) * self.weights_N
        return differences_N * (self.share / math.fsum(self.weights_N))


def pair(
    samples: Iterable[Sample],
    reference: Iterable[Sample],
    *,
    averages: Sequence[Average] = (),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[tuple[Paired, ...], tuple[Unpaired, ...]]:
    """Every metric of every task of which both models have samples, then the averages whose parts all could be paired.

    Parts of an average may be averages that come before it. Items are the same if their number, hash and weight are. If
    any item of a task is without its like, the task is not compared but reported, and so are the averages that it is a
    part of. Neither the order of the samples nor what else is compared changes a figure.
    """
    mine, theirs = _by_metric(samples), _by_metric(reference)
    strata: dict[_Place, list[_Stratum]] = {}
    paired: list[Paired] = []
    unpaired: list[Unpaired] = []
    for task, metric in sorted(mine.keys() & theirs.keys(), key=list(mine).index):
        try:
            stratum = _matched(mine[task, metric], theirs[task, metric], metric)
            paired.append(_compared(task, metric, [stratum], seed, resamples))
            strata[task, metric] = [stratum]
        except _NotPaired as error:
            unpaired.append(Unpaired(task, metric, str(error)))
    for average in averages:
        try:
            shared = _shared(average, strata)
            paired.append(_compared(average.task, average.metric, shared, seed, resamples))
            strata[average.task, average.metric] = shared
        except _NotPaired as error:
            unpaired.append(Unpaired(average.task, average.metric, str(error)))
    return tuple(paired), tuple(unpaired)


def is_exponential(metric: str) -> bool:
    """Whether a metric is exp of the mean of its samples' scores, as every perplexity is, and not the mean itself."""
    return "ppl" in metric or "perplexity" in metric


class _NotPaired(Exception):
    """Two results that cannot be compared; the message is the `reason` of an Unpaired."""


def _by_metric(samples: Iterable[Sample]) -> dict[_Place, list[Sample]]:
    """The samples that have a score, for each task and metric: items of two metrics may share their numbers."""
    samples_of: dict[_Place, list[Sample]] = {}
    for sample in samples:
        for metric in sample.scores:
            samples_of.setdefault((sample.task, metric), []).append(sample)
    return samples_of


def _matched(mine: Sequence[Sample], theirs: Sequence[Sample], metric: str) -> _Stratum:
    """The items side by side, by their numbers. Raises _NotPaired unless each has its like."""
    here, there = _by_item(mine), _by_item(theirs)
    both = sorted(here.keys() & there.keys())
    unlike = sum(_asked(here[item]) != _asked(there[item]) for item in both)
    alone = len(here) + len(there) - 2 * len(both)
    if unlike or alone:
        raise _NotPaired(
            f"the items differ: {len(here)} beside {len(there)}, of which {alone} are on one side only and {unlike} "
            "were asked otherwise"
        )
    scores_NP = np.array([(here[item].scores[metric], there[item].scores[metric]) for item in both], dtype=np.float64)
    broken = int((~np.isfinite(scores_NP)).any(1).sum())
    if broken:
        raise _NotPaired(f"{broken} of {len(both)} items have no finite score")
    return _Stratum(scores_NP, np.array([here[item].weight for item in both], dtype=np.float64))


def _by_item(samples: Sequence[Sample]) -> Mapping[int, Sample]:
    by_item = {sample.item: sample for sample in samples}
    if len(by_item) < len(samples):
        raise _NotPaired(f"{len(samples) - len(by_item)} of {len(samples)} items have the number of another")
    return by_item


def _asked(sample: Sample) -> tuple[str, float]:
    return sample.item_hash, sample.weight


def _shared(average: Average, strata: Mapping[_Place, Sequence[_Stratum]]) -> list[_Stratum]:
    """The tasks with their shares in an average; strata: of each part the tasks that it is itself the average of.

    Raises _NotPaired if a part has none.
    """
    missing = [part for part in average.parts if part not in strata]
    if missing:
        raise _NotPaired(f"its part{'s' if len(missing) > 1 else ''} {_named(missing)} could not be compared")
    groups = [strata[part] for part in average.parts]
    by_items = average.weighted_by == "items"
    sizes = [sum(len(stratum.weights_N) for stratum in group) if by_items else 1 for group in groups]
    return [
        replace(stratum, share=stratum.share * size / sum(sizes))
        for group, size in zip(groups, sizes, strict=True)
        for stratum in group
    ]


def _named(places: Sequence[_Place]) -> str:
    names = ", ".join(f"{task}/{metric}" for task, metric in places[:_NAMED])
    return f"{names} and {len(places) - _NAMED} more" if len(places) > _NAMED else names


def _compared(task: str, metric: str, strata: Sequence[_Stratum], seed: int, resamples: int) -> Paired:
    # a generator for each figure, so that none depends on what else is compared
    generator = np.random.default_rng([seed, zlib.crc32(f"{task}/{metric}".encode())])
    means_P = np.sum([stratum.share * stratum.means_P for stratum in strata], axis=0)
    value, reference_value = _figures(means_P, metric).tolist()
    if not math.isfinite(value - reference_value):
        raise _NotPaired(f"{value:g} beside {reference_value:g}: one is beyond all numbers")
    low, high = _interval(strata, metric, generator, resamples)
    flips = _flips(strata)
    test, p_value = _tested(strata, flips, generator, resamples)
    return Paired(
        task=task,
        metric=metric,
        value=value,
        reference_value=reference_value,
        low=low,
        high=high,
        p_value=p_value,
        test=test,
        num_items=sum(len(stratum.weights_N) for stratum in strata),
        num_lost=flips[0] if flips else None,
        num_gained=flips[1] if flips else None,
    )


def _interval(
    strata: Sequence[_Stratum], metric: str, generator: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """The bootstrap's confidence interval of the difference of the figures."""
    means_RP = np.zeros((resamples, 2))
    for stratum in strata:
        drawn_RP = resampled_means(stratum.scores_NP, stratum.weights_N, generator, resamples=resamples)
        means_RP += stratum.share * drawn_RP
    figures_RP = _figures(means_RP, metric)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures_RP[:, 0] - figures_RP[:, 1], (tail, 1 - tail)).tolist()
    return low, high


def _tested(
    strata: Sequence[_Stratum], flips: tuple[int, int] | None, generator: np.random.Generator, resamples: int
) -> tuple[Test, float]:
    # in an average items of several tasks may count differently: how many flipped does not say what they weigh
    if flips is not None and len(strata) == 1:
        return "mcnemar", mcnemar_p(*flips)
    parts_N = np.concatenate([stratum.parts_N for stratum in strata])
    return "sign_flip", sign_flip_p(parts_N, generator, resamples=resamples)


def _figures(means: Floats, metric: str) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(means) if is_exponential(metric) else means


def _flips(strata: Sequence[_Stratum]) -> tuple[int, int] | None:
    """Items lost and gained, if all scores are right or wrong and all items of a task count the same."""
    for stratum in strata:
        if not np.isin(stratum.scores_NP, (0.0, 1.0)).all() or len(np.unique(stratum.weights_N)) > 1:
            return None
    differences_N = np.concatenate([stratum.scores_NP[:, 0] - stratum.scores_NP[:, 1] for stratum in strata])
    return int((differences_N < 0).sum()), int((differences_N > 0).sum())
