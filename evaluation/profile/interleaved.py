"""Two models that generate turn and turn about in one process, for the ratio of their times.

A turn is the forward pass over the prompt, or a decoded token: short enough that a slow spell of the machine strikes
both models. Who goes first changes from turn to turn of a kind (ABBA), and from one round's first decoding turn to the
next's, so that being first is no advantage. These times are used for ratios only: the models push each other out of the
processor's caches.

On a CPU a turn is clocked by the processor time of the thread that computes, which takes part in every operation: on an
idle machine that is the wall clock; on a busy one it leaves out while others have the core. Waiting comes in slices of
the scheduler, as long as a turn and the same for a small model as for a large one: by the wall clock pairs scatter six
times as much (SmolLM2-135M, two cores, load 6) and their ratio leans towards 1. The turns take half of the threads,
for a thread that waits for another one that lost its core spends processor time too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.inference.options import Progress, silent
from evaluation.profile.report import Ratio
from evaluation.profile.timed_generation import Clock

Floats = NDArray[np.float64]

TURN_CLOCKS: dict[str, Clock] = {"wall clock": time.perf_counter, "processor time": time.thread_time}
"""Clocks for turns, by the names that they have in reports."""

MOST_TURNS = 64
"""Decoding turns of one round: of a longer generation each turn is several tokens, so that all its lengths count."""

_MOST_PREFILLS = 16
"""Prompts of one round, which may take as much time as its decoding: their ratio needs as many pairs."""

_GROWTH = 1.25
"""The precision is looked at when there are so many times more rounds: bootstrapping takes time too."""

MIN_PAIRS = 8
"""Fewer of them say nothing about their own spread."""

_RESAMPLES = 400


def num_turn_threads(clock_name: str) -> int:
    """Half of torch's threads by processor time, all of them by the wall clock."""
    threads = torch.get_num_threads()
    return max(1, threads // 2) if clock_name == "processor time" else threads


class Generating(Protocol):
    """A generation in parts of which each has ended when its call returns."""

    def prefill(self) -> None:
        """The forward pass over the prompt."""

    def choose(self) -> None:
        """The first token."""

    def decode(self, tokens: int) -> None:
        """So many further tokens."""


@dataclass(frozen=True)
class TurnRules:
    """Turns are taken for `min_rounds` rounds, then until every ratio's standard error is `precision` of it or
    `seconds` are over. shortest_turn: tokens of a decoding turn at least; on CUDA a turn of one token would mostly
    measure the wait for the device."""

    new_tokens: int
    min_rounds: int
    precision: float
    seconds: float
    shortest_turn: int = 1

    @property
    def tokens_per_turn(self) -> int:
        """Tokens of a decoding turn; 0 if there is nothing to decode."""
        steps = self.new_tokens - 1
        return min(steps, max(self.shortest_turn, -(-steps // MOST_TURNS)))

    @property
    def decode_turns(self) -> int:
        """Whole decoding turns of one round; what is left over is not decoded."""
        return (self.new_tokens - 1) // self.tokens_per_turn if self.tokens_per_turn else 0


@dataclass(frozen=True)
class TurnRatios:
    """Of the prompt's forward pass, and of a decoded token; None where there was no turn of that kind."""

    prefill: Ratio
    decode: Ratio | None


def interleave(
    begin: Sequence[Callable[[], Generating]],
    rules: TurnRules,
    *,
    turn_clock: Clock = time.perf_counter,
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> TurnRatios:
    """begin: starts a generation of the reference, and one of the measured model. turn_clock: times the turns; clock:
    all of them together. The first round is not counted."""
    timer = _PairTimer(begin, rules, turn_clock)
    timer.round()
    timer.clear()
    started, rounds, look_at = clock(), 0, rules.min_rounds
    while True:
        timer.round()
        rounds += 1
        spent = clock() - started
        progress(min(1.0, spent / rules.seconds) if rules.seconds else 1.0, f"{rounds} rounds of turns")
        over = spent >= rules.seconds
        if rounds < rules.min_rounds or (rounds < look_at and not over):
            continue
        look_at = max(look_at + 1, int(look_at * _GROWTH))
        ratios = timer.ratios()
        prefill_precise, decode_precise = _precise(ratios.prefill, rules), _precise(ratios.decode, rules)
        if over or (prefill_precise and decode_precise):
            return ratios
        timer.skip(prefill=prefill_precise, decode=decode_precise)


def _precise(ratio: Ratio | None, rules: TurnRules) -> bool:
    if ratio is None:
        return True
    return ratio.stderr is not None and ratio.stderr <= rules.precision * ratio.value


class _PairTimer:
    """The pairs (reference, measured) of seconds that were taken so far."""

    def __init__(self, begin: Sequence[Callable[[], Generating]], rules: TurnRules, clock: Clock) -> None:
        self._begin = begin
        self._rules = rules
        self._clock = clock
        self._first_prefills, self._first_decodes = 0, 0
        self._prefills, self._most_prefills = 1, _MOST_PREFILLS
        self._decodes = True
        self.clear()

    def clear(self) -> None:
        """Drop all pairs: those of the first round are of a cold machine."""
        self._prefill: list[tuple[float, float]] = []
        self._decode: list[tuple[float, float]] = []

    def skip(self, *, prefill: bool, decode: bool) -> None:
        """Spend the coming rounds on what is not precise yet."""
        self._decodes = not decode
        self._most_prefills = 1 if prefill else _MOST_PREFILLS
        self._prefills = min(self._prefills, self._most_prefills)

    def round(self) -> None:
        """Some prompts, and then decoding in turns after the last of them."""
        started = self._clock()
        for _ in range(self._prefills):
            generations = [begin() for begin in self._begin]
            works = [generation.prefill for generation in generations]
            self._prefill.append(self._pair(works, first=self._first_prefills))
            self._first_prefills = 1 - self._first_prefills
        prefilled = self._clock()
        if not self._decodes:
            return
        for generation in generations:
            generation.choose()
        turn = self._rules.tokens_per_turn
        for index in range(self._rules.decode_turns):
            works = [partial(generation.decode, turn) for generation in generations]
            self._decode.append(self._pair(works, first=(self._first_decodes + index) % 2))
        self._first_decodes = 1 - self._first_decodes
        # as much time for prompts as for decoding, by this round's
        prefill_s, decode_s = (prefilled - started) / self._prefills, self._clock() - prefilled
        self._prefills = max(1, min(self._most_prefills, round(decode_s / prefill_s))) if prefill_s else 1

    def ratios(self) -> TurnRatios:
        """The ratios over all pairs so far."""
        return TurnRatios(paired_ratio(self._prefill), paired_ratio(self._decode) if self._decode else None)

    def _pair(self, works: Sequence[Callable[[], None]], *, first: int) -> tuple[float, float]:
        seconds = [0.0, 0.0]
        for index in (first, 1 - first):
            start = self._clock()
            works[index]()
            seconds[index] = self._clock() - start
        return seconds[0], seconds[1]


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The second time over the first, from (reference, own) pairs of any one unit; the same pairs, the same answer.

    What other processes take is added to one side of a pair or to the other, at times ten times over: means follow such
    outliers, and the median wastes much of what the pairs say. The interquartile mean of the logarithms does neither,
    and is the same (with the sign turned) whichever model is called the reference.
    """
    logs_N = np.log(np.asarray(pairs, dtype=np.float64))
    logs_N = logs_N[:, 1] - logs_N[:, 0]
    value = math.exp(float(_middle_mean(logs_N)))
    if len(logs_N) < MIN_PAIRS:
        return Ratio(value=value, stderr=None, low=None, high=None, num_pairs=len(logs_N))
    drawn_RN = np.random.default_rng(0).integers(len(logs_N), size=(_RESAMPLES, len(logs_N)))
    means_R = _middle_mean(logs_N[drawn_RN])
    low, high = np.exp(np.quantile(means_R, (0.025, 0.975)))
    stderr = value * float(np.std(means_R, ddof=1))
    return Ratio(value=value, stderr=stderr, low=float(low), high=float(high), num_pairs=len(logs_N))


def _middle_mean(values_N: Floats) -> Floats:
    """Mean of the middle half along the last axis."""
    count = values_N.shape[-1]
    cut = count // 4
    return np.asarray(np.sort(values_N, axis=-1)[..., cut : count - cut].mean(-1))
