"""Turns and the estimator, on a clock that does not tick by itself."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from evaluation.inference.global_state import torch_threads
from evaluation.profile.interleaved import (
    MIN_PAIRS,
    TurnRules,
    interleave,
    num_turn_threads,
    paired_ratio,
)


@dataclass
class Machine:
    """A clock, and models whose work takes as long as `slowness` (of the moment) says."""

    seconds: float = 0.0
    done: list[str] = field(default_factory=list)
    slow_from: float = math.inf

    def clock(self) -> float:
        return self.seconds

    def work(self, name: str, seconds: float) -> None:
        self.done.append(name)
        self.seconds += seconds * (10 if self.seconds >= self.slow_from else 1)


@dataclass
class FakeGeneration:
    machine: Machine
    name: str
    pace: float

    def prefill(self) -> None:
        self.machine.work(f"{self.name} prefill", 5 * self.pace)

    def choose(self) -> None:
        self.machine.work(f"{self.name} choose", 0)

    def decode(self, tokens: int) -> None:
        self.machine.work(f"{self.name} {tokens}", tokens * self.pace)


def models(machine: Machine, pace: float = 0.5) -> list[object]:
    return [lambda: FakeGeneration(machine, "dense", 1.0), lambda: FakeGeneration(machine, "pruned", pace)]


RULES = TurnRules(new_tokens=4, min_rounds=2, precision=0.01, seconds=0)


def test_who_goes_first_changes_from_turn_to_turn() -> None:
    machine = Machine()
    interleave(models(machine), RULES, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    first_round = machine.done[:10]
    assert first_round == [
        *("dense prefill", "pruned prefill", "dense choose", "pruned choose"),
        *("dense 1", "pruned 1", "pruned 1", "dense 1", "dense 1", "pruned 1"),
    ]
    assert machine.done[10:20] == [
        *("pruned prefill", "dense prefill", "dense choose", "pruned choose"),
        *("pruned 1", "dense 1", "dense 1", "pruned 1", "pruned 1", "dense 1"),
    ]
    assert machine.done[20:24] == first_round[:4]
    assert len(machine.done) == 3 * 10  # one round to warm up, two that count


class FirstPays(FakeGeneration):
    """Going first costs 5 %."""

    def prefill(self) -> None:
        self._taxed("prefill", 600 * self.pace)

    def decode(self, tokens: int) -> None:
        self._taxed("decode", tokens * self.pace)

    def _taxed(self, kind: str, seconds: float) -> None:
        first = sum(name == kind for name in self.machine.done) % 2 == 0
        self.machine.work(kind, seconds * (1.05 if first else 1.0))


@pytest.mark.parametrize("new_tokens, shortest_turn", [(2, 1), (5, 1), (128, 1), (128, 8), (512, 8), (100, 1)])
def test_a_model_is_as_fast_as_itself_whoever_goes_first(new_tokens: int, shortest_turn: int) -> None:
    machine = Machine()
    begin = [lambda: FirstPays(machine, "dense", 1.0)] * 2
    rules = TurnRules(new_tokens, min_rounds=20, precision=0.01, seconds=0, shortest_turn=shortest_turn)
    found = interleave(begin, rules, turn_clock=machine.clock, clock=machine.clock)
    assert found.decode is not None
    assert found.prefill.value == pytest.approx(1)
    assert found.decode.value == pytest.approx(1)


def test_a_round_of_even_turns_begins_the_other_way_round() -> None:
    machine = Machine()
    rules = TurnRules(new_tokens=3, min_rounds=1, precision=0.01, seconds=0)
    interleave(models(machine), rules, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    decoded = [name for name in machine.done if name.endswith(" 1")]
    assert decoded == ["dense 1", "pruned 1", "pruned 1", "dense 1", "pruned 1", "dense 1", "dense 1", "pruned 1"]


def test_ratios_are_those_of_the_paces() -> None:
    machine = Machine()
    found = interleave(models(machine, 0.8), RULES, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert found.decode is not None
    assert found.prefill.value == pytest.approx(0.8)
    assert found.decode.value == pytest.approx(0.8)
    assert (found.prefill.num_pairs, found.decode.num_pairs) == (2, 2 * 3)


def test_a_slow_spell_does_not_show() -> None:
    """It begins in the middle of a pair and stays: that pair is wrong by ten, all others are right."""
    machine = Machine(slow_from=40.5)
    rules = TurnRules(new_tokens=12, min_rounds=4, precision=0.01, seconds=0)
    found = interleave(models(machine, 0.8), rules, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert found.decode is not None
    assert found.decode.value == pytest.approx(0.8)


def test_turns_have_a_clock_of_their_own() -> None:
    """What others take of the machine is in the wall clock, and not in the ratio."""
    wall, own = Machine(), Machine()

    class Disturbed(FakeGeneration):
        def decode(self, tokens: int) -> None:
            super().decode(tokens)
            wall.seconds += tokens * self.pace + 7

    paces = {"dense": 1.0, "pruned": 0.8}
    begin = [lambda name=name: Disturbed(own, name, paces[name]) for name in paces]
    rules = TurnRules(new_tokens=4, min_rounds=1, precision=0.01, seconds=100)
    found = interleave(begin, rules, turn_clock=own.clock, clock=wall.clock)
    assert found.decode is not None
    assert found.decode.value == pytest.approx(0.8)
    assert wall.seconds > 100


def test_turns_leave_half_of_the_threads_to_others() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        with torch_threads(num_turn_threads("processor time")):
            assert torch.get_num_threads() == 2
        with torch_threads(num_turn_threads("wall clock")):
            assert torch.get_num_threads() == 5
        assert torch.get_num_threads() == 5
        torch.set_num_threads(1)
        assert num_turn_threads("processor time") == 1
    finally:
        torch.set_num_threads(before)


def test_turns_end_when_the_ratio_is_precise_or_time_is_over() -> None:
    machine = Machine()
    long = TurnRules(new_tokens=4, min_rounds=2, precision=0.01, seconds=10_000)
    found = interleave(models(machine), long, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert MIN_PAIRS <= found.prefill.num_pairs < 2 * MIN_PAIRS  # a spread is known, and it is none
    generator = random.Random(0)

    def noisy() -> list[object]:
        return [lambda name=name: FakeGeneration(machine, name, generator.lognormvariate(0, 0.5)) for name in "ab"]

    started = machine.seconds
    short = TurnRules(new_tokens=4, min_rounds=2, precision=0.0001, seconds=300)
    interleave(noisy(), short, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert 300 <= machine.seconds - started < 450


def test_a_turn_may_be_several_tokens() -> None:
    machine = Machine()
    rules = TurnRules(new_tokens=20, min_rounds=1, precision=0.01, seconds=0, shortest_turn=8)
    interleave(models(machine), rules, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert machine.done.count("dense 8") == 2 * 2


def test_a_long_generation_is_covered_to_its_end() -> None:
    rules = TurnRules(new_tokens=513, min_rounds=1, precision=0.01, seconds=0)
    assert (rules.tokens_per_turn, rules.decode_turns) == (8, 64)
    assert TurnRules(new_tokens=5, min_rounds=1, precision=0.01, seconds=0, shortest_turn=8).decode_turns == 1


def test_prompts_get_as_much_time_as_decoding() -> None:
    machine = Machine()
    rules = TurnRules(new_tokens=31, min_rounds=3, precision=0.01, seconds=0)
    found = interleave(models(machine), rules, turn_clock=machine.clock, clock=machine.clock)  # type: ignore[arg-type]
    assert found.decode is not None
    assert (found.prefill.num_pairs, found.decode.num_pairs) == (3 * 6, 3 * 30)  # a prompt takes as long as five tokens


def test_one_token_has_no_decode_ratio() -> None:
    machine = Machine()
    rules = TurnRules(new_tokens=1, min_rounds=2, precision=0.01, seconds=0)
    assert interleave(models(machine), rules, turn_clock=machine.clock, clock=machine.clock).decode is None  # type: ignore[arg-type]


def pairs_of(ratio: float, count: int, seed: int) -> list[tuple[float, float]]:
    """Times with noise on both sides and now and then a turn that another process took ten times over."""
    generator = random.Random(seed)

    def noise() -> float:
        return generator.lognormvariate(0, 0.1) * (10 if generator.random() < 0.05 else 1)

    return [(noise(), ratio * noise()) for _ in range(count)]


def test_the_standard_error_is_the_spread_of_repeated_measurements() -> None:
    found = [paired_ratio(pairs_of(0.8, 200, seed)) for seed in range(60)]
    values = [ratio.value for ratio in found]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    reported = sum(ratio.stderr or 0 for ratio in found) / len(found)
    assert mean == pytest.approx(0.8, rel=0.005)
    assert reported == pytest.approx(spread, rel=0.35)
    covered = sum((ratio.low or 9) <= 0.8 <= (ratio.high or 0) for ratio in found)
    assert covered >= 51  # 95 % of 60, less three standard deviations


def test_the_ratio_the_other_way_round_is_its_inverse() -> None:
    pairs = pairs_of(0.7, 50, 1)
    there, back = paired_ratio(pairs), paired_ratio([(own, reference) for reference, own in pairs])
    assert there.value * back.value == pytest.approx(1)


def test_few_pairs_say_nothing_about_their_spread() -> None:
    assert paired_ratio(pairs_of(0.8, MIN_PAIRS - 1, 0)).stderr is None
    assert paired_ratio([(2.0, 1.0)]).value == pytest.approx(0.5)
    assert paired_ratio(pairs_of(0.8, 100, 0)) == paired_ratio(pairs_of(0.8, 100, 0))
