"""Optimal Brain Surgeon against brute force: every formula equals an explicit least-squares problem in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning.allocation.budget import HeadUnit
from pruning.errors import PruningError
from pruning.obs import elimination, in_place, rounds
from pruning.obs.groups import head_groups
from pruning.plan import LayerShape
from pruning.statistics.hessian import Hessian
from tests.pruning.captured import prepared

DAMPENING = 0.01
CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Case:
    """A random linear with correlated inputs, its OBS problem, and the same thing as a least-squares problem."""

    def __init__(
        self, *, inputs: int = 12, outputs: int = 5, tokens: int = 60, seed: int = 0, dead: Sequence[int] = ()
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mixing_II = randn(inputs, inputs) / inputs**0.5 + torch.eye(inputs, dtype=torch.float64)
        X_TI = randn(tokens, inputs) @ mixing_II
        X_TI[:, list(dead)] = 0
        self.W_OI = randn(outputs, inputs)
        self.H_II = X_TI.T @ X_TI / tokens
        self.problem = prepared("o_proj", self.W_OI, Hessian(self.H_II, tokens), dampening_frac=DAMPENING)
        penalty = DAMPENING * float(self.H_II.diagonal().mean())
        rows = [X_TI.numpy() / tokens**0.5, penalty**0.5 * np.eye(inputs)]
        self.A = np.concatenate(rows)
        self.target = self.A @ self.W_OI.numpy().T

    def solve(self, removed: Sequence[int]) -> tuple[Tensor, float]:
        """W' (O, I) and min of |(W - W') X|²/T + penalty |W - W'|² over all W' whose removed columns are zero."""
        kept = [column for column in range(self.A.shape[1]) if column not in removed]
        solution = np.linalg.lstsq(self.A[:, kept], self.target, rcond=None)[0]
        W_OI = torch.zeros_like(self.W_OI)
        W_OI[:, kept] = torch.from_numpy(solution.T)
        return W_OI, float(((self.target - self.A[:, kept] @ solution) ** 2).sum())


def groups(inputs: int, size: int) -> Tensor:
    return torch.arange(inputs).reshape(-1, size)


def ones(count: int) -> list[int]:
    return [1] * count


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_score_is_the_explicit_least_squares_cost(size: int, seed: int) -> None:
    case = Case(seed=seed)
    scores = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, size))
    explicit = [case.solve(group.tolist())[1] for group in groups(12, size)]
    torch.testing.assert_close(scores, torch.tensor(explicit, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("removed", [[3], [0, 5, 11], [1, 2, 3, 4, 6, 7]])
def test_elimination_is_the_explicit_least_squares_solution(removed: list[int]) -> None:
    case = Case(seed=1)
    W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
    error = elimination.eliminate_(W_OI, inverse_II, torch.tensor(removed))
    explicit_OI, minimum = case.solve(removed)
    torch.testing.assert_close(W_OI, explicit_OI, **CLOSE)
    assert error == pytest.approx(minimum, rel=1e-8)
    assert not W_OI[:, removed].any()


def test_down_dated_inverse_is_the_inverse_of_what_remains() -> None:
    case = Case(seed=2)
    W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
    for removed in ([4, 5], [0], [9, 10, 11]):
        elimination.eliminate_(W_OI, inverse_II, torch.tensor(removed))
    kept, gone = [1, 2, 3, 6, 7, 8], [0, 4, 5, 9, 10, 11]
    torch.testing.assert_close(inverse_II[kept][:, kept], case.problem.dampened()[kept][:, kept].inverse(), **CLOSE)
    assert not inverse_II[gone].any()
    assert not inverse_II[:, gone].any()


def test_grouped_cholesky_equals_one_column_after_another() -> None:
    case = Case(seed=3)
    joint = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, 4))
    for group, score in zip(groups(12, 4), joint.tolist(), strict=True):
        W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
        errors = [elimination.eliminate_(W_OI, inverse_II, column.reshape(1)) for column in group]
        assert sum(errors) == pytest.approx(score, rel=1e-10)


def test_without_grouped_cholesky_columns_count_as_if_alone() -> None:
    case = Case(seed=4)
    alone = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, 1))
    ablated = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, 4), conditional=False)
    joint = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, 4))
    torch.testing.assert_close(ablated, alone.reshape(-1, 4).sum(1), **CLOSE)
    assert not torch.allclose(ablated, joint, rtol=1e-3)


@pytest.mark.parametrize(("size", "sizes"), [(1, [4, 2, 1]), (1, ones(7)), (4, ones(2))])
def test_refit_equals_down_dates_and_lstsq(size: int, sizes: list[int]) -> None:
    case = Case(seed=5)
    columns_ND = groups(12, size)
    found = elimination.eliminate_groups(case.problem, columns_ND, iter(sizes))
    W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
    done = 0
    for gone in found.rounds:
        elimination.eliminate_(W_OI, inverse_II, columns_ND[list(found.order[done:gone])].flatten())
        done = gone
    removed = columns_ND[list(found.order)].flatten().tolist()
    kept_K = torch.tensor([column for column in range(12) if column not in removed])
    explicit_OI, minimum = case.solve(removed)
    refit_OK = elimination.refit(case.problem, kept_K)
    torch.testing.assert_close(refit_OK, W_OI[:, kept_K], **CLOSE)
    torch.testing.assert_close(refit_OK, explicit_OI[:, kept_K], **CLOSE)
    assert found.errors[-1] == pytest.approx(minimum, rel=1e-8)


def test_refit_of_nothing_kept() -> None:
    assert elimination.refit(Case().problem, torch.tensor([], dtype=torch.int64)).shape == (5, 0)


@pytest.mark.parametrize("seed", range(5))
def test_compensation_is_never_worse_than_plain_removal(seed: int) -> None:
    # on the calibration tokens, without the dampening in the measure
    case = Case(seed=seed)
    found = elimination.eliminate_groups(case.problem, groups(12, 1), iter([3, 3]))
    plain_OI, compensated_OI = case.W_OI.clone(), torch.zeros_like(case.W_OI)
    plain_OI[:, list(found.order)] = 0
    kept_K = torch.tensor([column for column in range(12) if column not in found.order])
    compensated_OI[:, kept_K] = elimination.refit(case.problem, kept_K)
    compensated = elimination.output_error(case.W_OI, compensated_OI, case.H_II)
    assert compensated < elimination.output_error(case.W_OI, plain_OI, case.H_II)
    assert compensated <= found.errors[-1]  # the prediction also counts the dampening


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_what_brute_force_takes_each_round(size: int, seed: int) -> None:
    case = Case(seed=seed + 10)
    columns = groups(12, size).tolist()
    found = elimination.eliminate_groups(case.problem, groups(12, size), iter(ones(3)))
    gone: list[int] = []
    for round_number, chosen in enumerate(found.order):
        removed = [column for group in gone for column in columns[group]]
        costs = {g: case.solve(removed + columns[g])[1] for g in range(len(columns)) if g not in gone}
        assert chosen == min(costs, key=lambda group: costs[group])
        assert found.errors[round_number] == pytest.approx(costs[chosen], rel=1e-8)
        gone.append(chosen)
    assert found.rounds == (1, 2, 3)


def test_a_round_takes_the_smallest_scores_together() -> None:
    case = Case(seed=6)
    scores = elimination.group_scores(case.problem.W_OI, case.problem.inverse_II, groups(12, 1))
    found = elimination.eliminate_groups(case.problem, groups(12, 1), iter([4]))
    assert list(found.order) == scores.argsort()[:4].tolist()
    assert found.errors[0] == pytest.approx(case.solve(found.order)[1], rel=1e-8)


def test_fixed_size_one_is_nested_and_its_error_grows() -> None:
    case = Case(seed=7)
    runs = [
        elimination.eliminate_groups(case.problem, groups(12, 1), rounds.fixed_group_sizes(n, 1)) for n in range(12)
    ]
    for fewer, more in pairwise(runs):
        assert more.order[:-1] == fewer.order
        assert more.errors[:-1] == fewer.errors
    assert all(a <= b for a, b in pairwise(runs[-1].errors))


def test_eligible_restricts_every_round() -> None:
    case = Case(seed=8)

    def upper_half(live_N: Tensor) -> Tensor:
        return live_N & (torch.arange(12) >= 6)

    found = elimination.eliminate_groups(case.problem, groups(12, 1), iter(ones(6)), eligible=upper_half)
    assert sorted(found.order) == [6, 7, 8, 9, 10, 11]


@settings(max_examples=30, deadline=None)
@given(
    permutation=st.permutations(range(12)),
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_order_and_errors_do_not_depend_on_how_inputs_are_numbered(
    permutation: list[int], seed: int, sizes: list[int]
) -> None:
    case = Case(seed=seed)
    index = torch.tensor(permutation)
    permuted = prepared(
        "o_proj", case.W_OI[:, index], Hessian(case.H_II[index][:, index], 60), dampening_frac=DAMPENING
    )
    found = elimination.eliminate_groups(case.problem, groups(12, 1), iter(sizes))
    other = elimination.eliminate_groups(permuted, groups(12, 1), iter(sizes))
    assert tuple(permutation[column] for column in other.order) == found.order
    assert other.errors == pytest.approx(found.errors, rel=1e-8)


COLUMNS = {1: 48, 3: 16, 4: 12, 8: 6}
"""Groups of so many columns, and how many of them 48 inputs make."""


def plain(case: Case, columns_ND: Tensor, sizes: Sequence[int]) -> elimination.Elimination:
    """The definition: scores, found and down-dates on whole matrices, nothing dropped, nothing made afresh."""
    W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
    live, order, rounds, errors = list(range(len(columns_ND))), [], [], []
    for size in sizes:
        scores = elimination.group_scores(W_OI, inverse_II, columns_ND[live])
        chosen = [live[place] for place in scores.argsort()[:size].tolist()]
        errors.append(
            (errors[-1] if errors else 0.0) + elimination.eliminate_(W_OI, inverse_II, columns_ND[chosen].flatten())
        )
        live = [group for group in live if group not in chosen]
        order += chosen
        rounds.append(len(order))
    return elimination.Elimination(tuple(order), tuple(rounds), tuple(errors))


def assert_same_elimination(actual: elimination.Elimination, expected: elimination.Elimination) -> None:
    assert actual.order == expected.order
    assert actual.rounds == expected.rounds
    assert actual.errors == pytest.approx(expected.errors, rel=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("size", COLUMNS)
def test_dropping_gone_columns_changes_nothing(size: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(inputs=48, tokens=200, seed=11, dead=(5,))
    monkeypatch.setattr(elimination, "COMPACT_SHARE", share)
    for sizes in (ones(COLUMNS[size]), [COLUMNS[size] // 2, 1, 1], [COLUMNS[size]]):
        columns_ND = groups(48, size)
        found = elimination.eliminate_groups(case.problem, columns_ND, iter(sizes))
        assert_same_elimination(found, plain(case, columns_ND, sizes))


def refitted(problem: elimination.Problem, removed: Sequence[int]) -> tuple[Tensor, float]:
    """The refitted weight (O, I) without the columns, and its error as `removal_error` has it."""
    gone_I = torch.zeros(problem.W_OI.shape[1], dtype=torch.bool)
    gone_I[list(removed)] = True
    pruned_OI = torch.zeros_like(problem.W_OI)
    pruned_OI[:, ~gone_I] = elimination.refit(problem, (~gone_I).nonzero().flatten())
    return pruned_OI, elimination.removal_error(problem, pruned_OI, gone_I.nonzero().flatten())


@pytest.mark.parametrize("removed", [[], [3], [0, 5, 11], list(range(12))])
def test_error_of_a_refit_is_the_explicit_least_squares_cost(removed: list[int]) -> None:
    case = Case(seed=15)
    pruned_OI, error = refitted(case.problem, removed)
    assert error == pytest.approx(case.solve(removed)[1], rel=1e-8)
    explicit = elimination.output_error(case.problem.W_OI, pruned_OI, case.problem.dampened())
    assert error == pytest.approx(explicit, rel=1e-8)


def ill_conditioned(noise: float) -> Case:
    """Inputs of a quarter of the rank but for some noise, whose square is the condition's inverse."""
    case = Case(inputs=96, outputs=32, tokens=288, seed=3)
    generator = torch.Generator().manual_seed(3)
    factors = [
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((288, 24), (24, 96), (288, 96))
    ]
    X_TI = factors[0] @ factors[1] / 96**0.5 + noise * factors[2]
    case.problem = prepared("o_proj", case.W_OI, Hessian(X_TI.T @ X_TI / 288, 288), dampening_frac=1e-15)
    return case


@pytest.mark.parametrize(("noise", "agreement"), [(1e-3, 1e-9), (1e-4, 1e-7), (3e-6, 1e-4)])
@pytest.mark.parametrize("size", [1, 8])
def test_ill_conditioned_down_dates_predict_what_the_refit_costs(noise: float, agreement: float, size: int) -> None:
    # 3e-6 is about as far as `prepare` goes; no inverse need be made afresh on the way
    problem = ill_conditioned(noise).problem
    assert 1e-13 < problem.rcond < 1e-7
    for sizes in (ones(90 // size), [48 // size, 42 // size]):
        found = elimination.eliminate_groups(problem, groups(96, size), iter(sizes))
        _, error = refitted(problem, groups(96, size)[list(found.order)].flatten().tolist())
        assert found.errors[-1] == pytest.approx(error, rel=agreement)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 3, 4]), count=st.integers(1, 9), more=st.integers(1, 5))
def test_a_longer_run_begins_like_a_shorter_one(seed: int, size: int, count: int, more: int) -> None:
    case, columns_ND = Case(inputs=24, seed=seed), groups(24, size)
    count, total = min(count, len(columns_ND) - 1), min(count + more, len(columns_ND))
    short, long = (
        elimination.eliminate_groups(case.problem, columns_ND, iter(ones(rounds))) for rounds in (count, total)
    )
    assert long.order[:count] == short.order
    assert long.rounds[:count] == short.rounds
    assert long.errors[:count] == short.errors


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), removed=st.lists(st.sets(st.integers(0, 11), min_size=1), min_size=1, max_size=4))
def test_down_dates_are_re_inversions(seed: int, removed: list[set[int]]) -> None:
    case, gone = Case(seed=seed), set[int]()
    W_OI, inverse_II = case.problem.W_OI.clone(), case.problem.inverse_II.clone()
    error = 0.0
    for columns in removed:
        if fresh := sorted(columns - gone):
            error += elimination.eliminate_(W_OI, inverse_II, torch.tensor(fresh))
            gone |= columns
    kept = [column for column in range(12) if column not in gone]
    torch.testing.assert_close(inverse_II[kept][:, kept], case.problem.dampened()[kept][:, kept].inverse(), **CLOSE)
    torch.testing.assert_close(W_OI, case.solve(sorted(gone))[0], **CLOSE)
    assert error == pytest.approx(case.solve(sorted(gone))[1], rel=1e-8)


@settings(max_examples=20, deadline=None)
@given(permutation=st.permutations(range(6)), seed=st.integers(0, 10_000), count=st.integers(1, 5))
def test_order_of_heads_does_not_depend_on_how_they_are_numbered(permutation: list[int], seed: int, count: int) -> None:
    case = Case(inputs=24, seed=seed)
    index = groups(24, 4)[permutation].flatten()
    permuted = prepared(
        "o_proj", case.W_OI[:, index], Hessian(case.H_II[index][:, index], 60), dampening_frac=DAMPENING
    )
    found = elimination.eliminate_groups(case.problem, groups(24, 4), iter(ones(count)))
    other = elimination.eliminate_groups(permuted, groups(24, 4), iter(ones(count)))
    assert tuple(permutation[head] for head in other.order) == found.order
    assert other.errors == pytest.approx(found.errors, rel=1e-8)


SHAPES = [LayerShape(num_heads=6, num_kv_heads=kv_heads, intermediate_size=1) for kv_heads in (1, 2, 3, 6)]


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_heads_by_brute_force(unit: HeadUnit, shape: LayerShape, seed: int) -> None:
    """Each round the cheapest unit goes; of query heads, only from groups that have lost least so far."""
    case, per_group = Case(inputs=24, seed=seed + 20), shape.num_groups
    units = shape.num_kv_heads if unit == "kv_group" else per_group
    if units == 1:
        return
    heads = head_groups(shape, 4, units - 1, unit)
    found = elimination.eliminate_groups(case.problem, heads.columns_ND, iter(heads.sizes), eligible=heads.eligible)
    columns = heads.columns_ND.tolist()
    gone: list[int] = []
    for number, chosen in enumerate(found.order):
        lost = [sum(head // per_group == group for head in gone) for group in range(shape.num_kv_heads)]
        may_go = [
            index
            for index in range(len(columns))
            if index not in gone and (unit == "kv_group" or lost[index // per_group] == min(lost))
        ]
        removed = [column for index in gone for column in columns[index]]
        costs = {index: case.solve(removed + columns[index])[1] for index in may_go}
        assert chosen == min(costs, key=lambda index: costs[index])
        assert found.errors[number] == pytest.approx(costs[chosen], rel=1e-8)
        gone.append(chosen)
    if unit == "query_head":
        assert sorted(head // per_group for head in gone) == sorted(list(range(shape.num_kv_heads)) * (units - 1))
    else:
        assert len(gone) == units - 1


def test_dead_inputs_cost_nothing_and_go_first() -> None:
    case = Case(seed=9, dead=(2, 7))
    assert not case.problem.W_OI[:, [2, 7]].any()
    assert case.problem.dampened().diagonal()[[2, 7]].tolist() == [1.0, 1.0]
    found = elimination.eliminate_groups(case.problem, groups(12, 1), iter(ones(3)))
    assert set(found.order[:2]) == {2, 7}
    assert found.errors[:2] == (0.0, 0.0)
    assert found.errors[2] > 0
    live = [column for column in range(12) if column not in (2, 7)]
    torch.testing.assert_close(elimination.refit(case.problem, torch.tensor(live)), case.W_OI[:, live], **CLOSE)


def test_all_inputs_dead() -> None:
    problem = prepared("o_proj", torch.ones(3, 4), Hessian(torch.zeros(4, 4), 9), dampening_frac=DAMPENING)
    found = elimination.eliminate_groups(problem, groups(4, 1), iter([2, 1]))
    assert found.errors == (0.0, 0.0)


def test_no_inputs_at_all() -> None:
    problem = prepared("down_proj", torch.ones(3, 0), Hessian(torch.zeros(0, 0), 9), dampening_frac=DAMPENING)
    found = elimination.eliminate_groups(problem, torch.zeros(0, 1, dtype=torch.int64), iter([]))
    assert found.order == ()


def test_prepare_copies_and_dampens() -> None:
    W_OI, H_II = torch.ones(2, 2), torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    problem = prepared("o_proj", W_OI, Hessian(H_II, 5), dampening_frac=0.5)
    assert problem.dampened().tolist() == [[3.5, 1.0], [1.0, 5.5]]
    assert problem.W_OI.dtype == problem.inverse_II.dtype == torch.float64
    assert problem.rcond == pytest.approx(1 / float(np.linalg.cond(problem.dampened().numpy(), 1)))
    assert H_II.tolist() == [[2.0, 1.0], [1.0, 4.0]]
    elimination.eliminate_groups(problem, groups(2, 1), iter([1]))
    assert problem.W_OI.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert W_OI.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_not_positive_definite_says_what_to_do() -> None:
    indefinite = Hessian(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 512)
    with pytest.raises(PruningError) as error:
        prepared("model.layers.3.mlp.down_proj", torch.ones(2, 2), indefinite, dampening_frac=0.01)
    assert str(error.value) == (
        "Hessian of model.layers.3.mlp.down_proj (512 tokens) is not positive definite; "
        "raise dampening_frac (now 0.01) or num_samples"
    )


def test_ill_conditioned_says_what_to_do() -> None:
    nearly_singular = Hessian(torch.diag(torch.tensor([1.0, 1e-14], dtype=torch.float64)), 512)
    with pytest.raises(PruningError, match=r"down_proj \(512 tokens\) is too ill conditioned \(1/condition 1\..e-14\)"):
        prepared("down_proj", torch.ones(2, 2), nearly_singular, dampening_frac=1e-18)


@pytest.mark.parametrize("size", [1, 2])
def test_losing_positive_definiteness_on_the_way_says_what_to_do(size: int) -> None:
    inverse_II = torch.diag(torch.tensor([-1.0, -1.0, 2.0, 3.0], dtype=torch.float64))
    W_OI, diagonal_I = torch.ones(2, 4, dtype=torch.float64), inverse_II.diagonal()
    problem = elimination.Problem("o_proj", W_OI, inverse_II, diagonal_I, inverse_II, 1e-12)
    with pytest.raises(PruningError, match=r"o_proj lost positive definiteness after 0 removals.*dampening_frac"):
        elimination.eliminate_groups(problem, groups(4, size), iter([1]))


def test_output_error_is_the_mean_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    X_TI = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    W_OI, pruned_OI = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    direct = float((X_TI @ W_OI.T - X_TI @ pruned_OI.T).square().sum(1).mean())
    assert elimination.output_error(W_OI, pruned_OI, X_TI.T @ X_TI / 30) == pytest.approx(direct, rel=1e-12)


@given(count=st.integers(0, 20_000), smallest=st.integers(1, 64))
def test_halving_sizes_halve_within_their_bounds(count: int, smallest: int) -> None:
    sizes = list(rounds.halving_group_sizes(count, largest=1024, smallest=smallest))
    assert sum(sizes) == count
    assert all(a >= b for a, b in pairwise(sizes))
    assert all(smallest <= size <= 1024 for size in sizes[:-1])


def test_halving_sizes_of_the_paper() -> None:
    assert list(rounds.halving_group_sizes(100)) == [50, 25, 12, 8, 5]
    assert list(rounds.halving_group_sizes(5000))[:3] == [1024, 1024, 1024]
    assert list(rounds.halving_group_sizes(0)) == []


@given(count=st.integers(0, 5000), size=st.integers(1, 300))
def test_fixed_sizes(count: int, size: int) -> None:
    sizes = list(rounds.fixed_group_sizes(count, size))
    assert sum(sizes) == count
    assert all(value == size for value in sizes[:-1])


@pytest.mark.parametrize("dampening_frac", [0.01, 0.1])
def test_single_precision_chooses_nearly_the_same(dampening_frac: float) -> None:
    inputs, count = 96, 40
    assert elimination.single_precision_will_do(inputs, dampening_frac)
    generator = torch.Generator().manual_seed(8)
    X_TI = torch.randn(300, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    X_TI[:, 0] *= 1e3  # one massive activation: as ill conditioned as the dampening lets it be
    hessian = Hessian(X_TI.T @ X_TI / 300, 300)
    W_OI = torch.randn(20, inputs, generator=generator)
    double, single = (
        prepared("layers.0.mlp.down_proj", W_OI, hessian, dampening_frac=dampening_frac, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert torch.linalg.cond(double.dampened()) <= inputs / dampening_frac + 1, (
        "what single_precision_will_do stands on"
    )
    columns_ND = groups(inputs, 1)
    exact, quick = (
        elimination.eliminate_groups(problem, columns_ND, rounds.halving_group_sizes(count))
        for problem in (double, single)
    )
    assert len(set(exact.order) & set(quick.order)) >= count - 2
    assert quick.errors[-1] == pytest.approx(exact.errors[-1], rel=0.01)


def test_single_precision_is_not_trusted_beyond_its_digits() -> None:
    assert elimination.single_precision_will_do(1536, 0.01)
    assert not elimination.single_precision_will_do(11008, 0.01)
    assert not elimination.single_precision_will_do(1536, 1e-4)


@pytest.mark.parametrize("removed", [1, 80, 399])
def test_choosing_and_refitting_hold_two_and_a_half_matrices(removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "_ROWS", 16)
    inputs, outputs = 400, 114  # as wide as a down_proj of 28,672 channels and 8,192 outputs
    X_TI = torch.randn(500, inputs, generator=torch.Generator().manual_seed(0))
    hessian, W_OI = Hessian(X_TI.T @ X_TI / 500, 500), torch.randn(outputs, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        system = elimination.dampen("down_proj", W_OI, hessian, dampening_frac=0.01)
        sizes = rounds.fixed_group_sizes(removed, 8)
        found = elimination.eliminate_groups(
            elimination.prepare(system), torch.arange(inputs).unsqueeze(1), sizes, uses_up=True
        )
        kept_K = torch.tensor(sorted(set(range(inputs)) - set(found.order)))
        elimination.refit(system, kept_K)
    results = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = hessian.matrix_II.nbytes + torch.tensor(
        [event.nbytes() for event in sorted(results, key=lambda event: event.start_ns()) if event.name() == "[memory]"]
    ).cumsum(0)
    assert float(held.max()) / (8 * inputs**2) < 2.5


def test_an_inverse_that_is_used_up_gives_the_same_order() -> None:
    case = Case(inputs=48, tokens=200)
    first = elimination.eliminate_groups(case.problem, groups(48, 1), iter([4] * 9))
    again = elimination.eliminate_groups(case.problem, groups(48, 1), iter([4] * 9), uses_up=True)
    assert first == again
