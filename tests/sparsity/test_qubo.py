"""Block problems against their definition, and solvers against enumeration."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook import BillhookError
from billhook.sparsity import qubo
from billhook.sparsity.qubo import Problem, block_problem, solve, solvers, steepest_swaps, swap_costs

SOLVERS = ["anneal", "exact", "local", "swap"]
HEURISTICS = ["anneal", "local", "swap"]


def block(n: int, k: int, samples: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, original weights, current weights and present mask of a random block, float64."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, n, generator=generator, dtype=torch.float64) + 0.3
    w0 = torch.randn(n, generator=generator, dtype=torch.float64)
    x = torch.zeros(n, dtype=torch.bool)
    x[torch.randperm(n, generator=generator)[:k]] = True
    return gradients, w0, w0 * ~x, x


def instance(n: int, k: int, seed: int = 0, **options: Any) -> tuple[Problem, Tensor]:
    gradients, w0, w, x = block(n, k, seed=seed)
    return block_problem(gradients, w0, w, **options), x


def masks(n: int, k: int) -> Tensor:
    """All masks of k ones, bool [count, n]."""
    ones = torch.tensor(list(combinations(range(n), k)))
    return torch.zeros(len(ones), n, dtype=torch.bool).scatter_(1, ones, True)


def definition(gradients: Tensor, w0: Tensor, w: Tensor, x: Tensor, alpha: float, ridge: float) -> Tensor:
    """The second-order model with H formed and the step taken literally."""
    step = torch.where(x, torch.zeros_like(w0), w0) - w
    hessian = gradients.T @ gradients / len(gradients)
    return alpha * gradients.mean(0) @ step + step @ hessian @ step / 2 + ridge * step.square().sum()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("alpha", "ridge"), [(0.75, 1e-3), (1.0, 0.0), (0.0, 0.5)])
def test_energy_is_the_second_order_model_for_every_mask(dense: bool, alpha: float, ridge: float) -> None:
    gradients, w0, w, _ = block(12, 6, samples=5)
    problem = block_problem(gradients, w0, w, alpha=alpha, ridge=ridge, dense=dense)
    assert (problem.matrix is not None) == dense
    every = masks(12, 6)
    expected = torch.stack([definition(gradients, w0, w, x, alpha, ridge) for x in every])
    assert float((problem.energy(every) - expected).abs().max()) < 1e-10
    assert float(expected.std()) > 0.1
    assert float(problem.energy(every[17])) == pytest.approx(float(expected[17]), abs=1e-10)


def test_entries_of_q_are_those_of_the_paper() -> None:
    gradients, w0, w, _ = block(7, 3)
    alpha, ridge = 0.6, 0.02
    hessian, mean, d = gradients.T @ gradients / len(gradients), gradients.mean(0), w - w0
    q = w0[:, None] * hessian * w0 / 2
    q += torch.diag(w0 * (hessian @ d) - alpha * mean * w0 + ridge * w0 * (2 * d + w0))
    problem = block_problem(gradients, w0, w, alpha=alpha, ridge=ridge)
    torch.testing.assert_close(problem.matrix, q, rtol=1e-12, atol=1e-12)
    constant = d @ hessian @ d / 2 - alpha * mean @ d + ridge * d @ d
    assert problem.const == pytest.approx(float(constant), abs=1e-12)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_dense_and_low_rank_forms_agree(n: int, samples: int, seed: int) -> None:
    gradients, w0, w, x = block(n, n // 2, samples=samples, seed=seed)
    dense, low = (block_problem(gradients, w0, w, ridge=0.1, dense=dense) for dense in (True, False))
    index = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2 + 1]
    for one, other in [
        (dense.diagonal, low.diagonal),
        (dense.field(x), low.field(x)),
        (dense.rows(index), low.rows(index)),
        (dense.energy(x), low.energy(x)),
        (torch.tensor(dense.scale()), torch.tensor(low.scale())),
    ]:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert dense.tolerance <= low.tolerance * (1 + 1e-12)


def test_curvature_through_the_gradients_is_that_of_the_fisher() -> None:
    gradients, w0, w, x = block(20, 8, samples=6)
    delta = w0 * ~torch.roll(x, 3) - w
    hessian = gradients.T @ gradients / 6
    through = (gradients @ delta).square().sum() / 12
    assert float(through) == pytest.approx(float(delta @ hessian @ delta / 2), abs=1e-10)
    problem = block_problem(gradients, w0, w, alpha=0.0, ridge=0.0, dense=False)
    assert float(problem.energy(torch.roll(x, 3))) == pytest.approx(float(through), abs=1e-10)


@given(st.integers(2, 40), st.data(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_the_present_mask_has_energy_zero_and_no_solver_ends_above(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(0, n))
    name = data.draw(st.sampled_from(["swap", "local"]))
    problem, x = instance(n, k, seed=seed)
    assert abs(float(problem.energy(x))) < 1e-12 * max(1.0, abs(problem.const))
    found, energy = solve(problem, k, x, solver=name)
    assert int(found.sum()) == k
    assert energy <= 1e-12 * max(1.0, abs(problem.const))
    assert energy == float(problem.energy(found))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_incumbent_is_kept_unless_something_is_strictly_better(name: str) -> None:
    problem, x = instance(10, 4, seed=2)
    optimum, lowest = solve(problem, 4, x, solver="exact")
    again, energy = solve(problem, 4, optimum, solver=name)
    assert torch.equal(again, optimum)
    assert energy == lowest
    flat = Problem(matrix=torch.ones(10, 10))  # every mask of four has energy 16
    same, energy = solve(flat, 4, x, solver=name)
    assert torch.equal(same, x)
    assert energy == 16.0


def test_a_solver_that_ends_above_the_start_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubo, "_SOLVERS", dict(qubo._SOLVERS))

    @qubo.solver("worst")
    def worst(problem: Problem, start: Tensor, *rest: Any) -> Tensor:
        every = masks(problem.n, int(start.sum()))
        return every[int(problem.energy(every).argmax())]

    @qubo.solver("cheat")
    def cheat(problem: Problem, start: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(start)

    assert {"worst", "cheat"} < set(solvers())
    problem, x = instance(8, 4)
    found, energy = solve(problem, 4, x, solver="worst")
    assert torch.equal(found, x)
    assert energy == float(problem.energy(x))
    with pytest.raises(BillhookError, match="other counts"):
        solve(problem, 4, x, solver="cheat")


@pytest.mark.parametrize("dense", [True, False])
def test_enumeration_finds_the_lowest_of_all_masks(dense: bool) -> None:
    for seed in range(5):
        problem, x = instance(11, 5, seed=seed, dense=dense)
        found, energy = solve(problem, 5, x, solver="exact")
        every = masks(11, 5)
        energies = torch.stack([problem.energy(mask) for mask in every])
        assert energy == pytest.approx(float(energies.min()), abs=1e-12)
        assert torch.equal(found, every[int(energies.argmin())])


def test_annealing_finds_the_optimum_of_nearly_all_small_problems() -> None:
    hits = 0
    for seed in range(50):
        problem, x = instance(14, 7, seed=seed)
        _, lowest = solve(problem, 7, x, solver="exact")
        _, energy = solve(problem, 7, x, solver="anneal", restarts=10, seed=seed)
        assert energy >= lowest - 1e-10
        hits += energy < lowest + 1e-10
    assert hits >= 48


def test_annealing_does_not_owe_its_result_to_the_descent_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubo, "steepest_swaps", lambda *_: iter(()))
    hits = 0
    for seed in range(15):
        problem, x = instance(14, 7, seed=seed, dense=bool(seed % 2))
        _, lowest = solve(problem, 7, x, solver="exact")
        hits += solve(problem, 7, x, solver="anneal", restarts=10, seed=seed)[1] < lowest + 1e-10
    assert hits >= 14


def test_annealing_is_more_than_luck_on_blocks_too_large_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [instance(60, 30, seed=seed) for seed in range(5)]
    descended = [solve(problem, 30, x, solver="swap")[1] for problem, x in cases]
    monkeypatch.setattr(qubo, "steepest_swaps", lambda *_: iter(()))
    annealed = [solve(problem, 30, x, solver="anneal", restarts=4)[1] for problem, x in cases]
    assert sum(annealed) < 0.9 * sum(descended) < 0  # accepting everything gets about a tenth of this


def test_annealing_leaves_a_local_minimum_that_descent_cannot() -> None:
    # Two pairs: each is free only when whole, and every single swap from one to the other costs.
    q = torch.tensor([[3.0, -3, 9, 9], [-3, 3, 9, 9], [9, 9, 2, -3], [9, 9, -3, 2]])
    problem, start = Problem(matrix=q), torch.tensor([True, True, False, False])
    assert solve(problem, 2, start, solver="swap")[1] == 0.0
    found, energy = solve(problem, 2, start, solver="anneal", restarts=4)
    assert found.tolist() == [False, False, True, True]
    assert energy == -2.0


@pytest.mark.parametrize("dense", [True, False])
def test_swap_costs_match_the_recomputed_energy(dense: bool) -> None:
    problem, x = instance(13, 5, seed=3, dense=dense)
    a, b, cost = swap_costs(problem, x)
    assert cost.shape == (5, 8)
    before = problem.energy(x)
    for i, revived in enumerate(a):
        for j, pruned in enumerate(b):
            after = x.clone()
            after[revived], after[pruned] = False, True
            assert float(cost[i, j]) == pytest.approx(float(problem.energy(after) - before), abs=1e-10)


def test_swap_costs_are_the_surgeons_formula() -> None:
    gradients, w, _, x = block(9, 4)
    problem = block_problem(gradients, w, w, alpha=0.0, ridge=0.0)
    a, b, cost = swap_costs(problem, x)
    hessian = gradients.T @ gradients / len(gradients)
    cross = 2 * w[:, None] * hessian * w  # the objective without its factor of one half
    alpha = cross[:, x].sum(1) - hessian.diagonal() * w**2
    beta = cross[:, x].sum(1) + hessian.diagonal() * w**2
    expected = -alpha[a, None] + beta[b] - cross[a][:, b]
    torch.testing.assert_close(2 * cost, expected, rtol=0, atol=1e-10)


@given(
    st.integers(2, 60),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(["one group", "pairs", "three groups"]),
    st.sampled_from([1, 32]),
)
@settings(max_examples=80, deadline=None)
def test_descent_takes_the_best_of_all_swaps_until_none_is_left(
    n: int, samples: int, seed: int, dense: bool, grouping: str, first_rows: int
) -> None:
    gradients, w0, w, x = block(n, (n + 1) // 2, samples=samples, seed=seed)
    gradients *= 0.3
    problem = block_problem(gradients, w0, w, dense=dense)
    groups = {"one group": None, "pairs": torch.arange(n) // 2, "three groups": torch.arange(n) % 3}[grouping]
    x = x.clone()

    def best_swap() -> float:
        a, b, cost = swap_costs(problem, x)
        if groups is not None:
            cost = cost.masked_fill(groups[a, None] != groups[b], math.inf)
        return float(cost.min()) if cost.numel() else math.inf

    expected, energy = best_swap(), float(problem.energy(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qubo, "_FIRST_ROWS", first_rows)  # with 1, bounds decide which rows are looked at
        for step in steepest_swaps(problem, x, groups):
            now = float(problem.energy(x))
            assert step.cost < 0
            assert now - energy == pytest.approx(step.cost, abs=1e-10)
            assert step.cost == pytest.approx(expected, abs=1e-10)
            assert not x[step.revived]
            assert x[step.pruned]
            energy, expected = now, best_swap()
    assert expected > -1e-10


@pytest.mark.parametrize("size", [2, 4, 300])
def test_bounds_change_nothing_on_a_large_block(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubo, "_FIRST_ROWS", 1)
    monkeypatch.setattr(qubo, "_ENTRIES", 2100)  # seven rows at a time
    groups = torch.arange(300) // size
    moves = 0
    for seed in range(3):
        # strong couplings of both signs: candidates come and go several times
        problem = Problem(matrix=torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)))
        x = torch.arange(300) % 2 == 0
        bounded = [step[:2] for step in steepest_swaps(problem, x.clone(), groups)]
        for step in bounded:  # against the full table
            a, b, cost = swap_costs(problem, x)
            best = int(cost.masked_fill_(groups[a, None] != groups[b], math.inf).argmin())
            revived, pruned = int(a[best // len(b)]), int(b[best % len(b)])
            assert step == (revived, pruned)
            x[revived], x[pruned] = False, True
        a, b, cost = swap_costs(problem, x)
        assert float(cost.masked_fill_(groups[a, None] != groups[b], math.inf).min()) > -problem.tolerance
        moves += len(bounded)
    assert moves > 100


def test_a_revived_candidate_may_be_pruned_again() -> None:
    q = torch.diag(torch.tensor([1.0, -4.0, -20.0, -5.0, 0.0]))
    q[0, 3] = q[3, 0] = -3.0  # once 3 is pruned, 0 is worth pruning too
    x = torch.tensor([True, True, False, False, True])
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert list(steepest_swaps(Problem(matrix=q), x, groups)) == [(0, 2, -21.0), (4, 3, -5.0), (1, 0, -1.0)]


def test_scale_is_the_mean_of_non_zero_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.tensor([[0.0, 2.0, 0.0], [2.0, -4.0, 0.0], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(qubo, "_ENTRIES", 6)  # two rows at a time
    assert Problem(matrix=q).scale() == pytest.approx(9 / 4)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dense", [True, False])
def test_without_couplings_the_smallest_diagonal_entries_win(name: str, dense: bool) -> None:
    for seed in range(4):
        diagonal = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        low_rank = Problem(factor=torch.zeros(1, 12), linear=diagonal)
        problem = Problem(matrix=torch.diag(diagonal)) if dense else low_rank
        start = torch.arange(12) < 5
        found, energy = solve(problem, 5, start, solver=name, seed=seed)
        assert torch.equal(found.nonzero()[:, 0], diagonal.argsort()[:5].sort().values)
        assert energy == pytest.approx(float(diagonal.sort().values[:5].sum()), abs=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_without_curvature_the_largest_gradient_times_weight_goes(name: str) -> None:
    w0 = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25], dtype=torch.float64)
    mean = torch.tensor([0.3, 0.4, -0.2, 0.2, -0.9, 2.0], dtype=torch.float64)
    # The Fisher is quadratic in the gradient: for a small one it is negligible.
    problem = block_problem(1e-7 * mean[None], w0, w0, alpha=1.0, ridge=0.0)
    found, _ = solve(problem, 3, torch.arange(6) < 3, solver=name)
    assert found.nonzero()[:, 0].tolist() == sorted((mean * w0).argsort(descending=True)[:3].tolist())


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_that_cancel_one_another_leave_together(name: str) -> None:
    w0 = torch.ones(3)
    problem = block_problem(torch.tensor([[1.0, -1.0, 0.1]]), w0, w0, alpha=0.0, ridge=0.0)
    assert int(problem.diagonal.argmin()) == 2  # by the diagonal alone the third would go
    found, energy = solve(problem, 2, torch.tensor([False, True, True]), solver=name)
    assert found.tolist() == [True, True, False]
    assert energy == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dense", [True, False])
def test_groups_keep_their_counts(name: str, dense: bool) -> None:
    n = 16
    for seed in range(3):
        problem, x = instance(n, 7, seed=seed, dense=dense)
        # unequal groups, not contiguous, with arbitrary numbers; one may be all pruned or all kept
        groups = torch.tensor([7, -2, 7, 7, 40, -2, 7, 40, 40, 7, 7, -2, 40, 7, 99, 40])
        found, energy = solve(problem, 7, x, solver=name, groups=groups, restarts=3, seed=seed)
        for group in groups.unique():
            assert int(found[groups == group].sum()) == int(x[groups == group].sum())
        every = masks(n, 7)
        for group in groups.unique():
            every = every[every[:, groups == group].sum(1) == x[groups == group].sum()]
        lowest = float(problem.energy(every).min())
        assert lowest - 1e-10 <= energy <= 1e-10
        if name == "exact":
            assert energy == pytest.approx(lowest, abs=1e-10)
        unconstrained = solve(problem, 7, x, solver="exact")[1]
        assert unconstrained < lowest - 1e-6  # otherwise the constraint was not felt


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(HEURISTICS))
@settings(max_examples=30, deadline=None)
def test_two_of_four_masks_stay_two_of_four(count: int, seed: int, name: str) -> None:
    n = 4 * count
    gradients, w0, _, _ = block(n, 1, seed=seed)
    x = (torch.arange(n) % 4) < 2
    options: dict[str, Any] = {"growth": 3.0} if name == "anneal" else {}
    problem = block_problem(gradients, w0, w0 * ~x)
    found, energy = solve(
        problem, 2 * count, x, solver=name, groups=torch.arange(n) // 4, restarts=2, seed=seed, **options
    )
    assert (found.view(count, 4).sum(1) == 2).all()
    assert energy <= 1e-10


def test_local_search_with_groups_leaves_little_to_the_descent() -> None:
    gradients, w0, _, _ = block(64, 0, samples=12)
    x = (torch.arange(64) % 4) < 2
    problem, groups = block_problem(gradients, w0, w0 * ~x), torch.arange(64) // 4
    local = solve(problem, 32, x, solver="local", groups=groups)[1]
    swap = solve(problem, 32, x, solver="swap", groups=groups)[1]
    assert local < 0.7 * swap < 0


def test_local_search_honours_its_threshold() -> None:
    problem, x = instance(40, 20, seed=1)
    plain = solve(problem, 20, x, solver="local")[1]
    assert plain < -0.1
    rough = solve(problem, 20, x, solver="local", epsilon=1e9)
    assert torch.equal(rough[0], x)


@pytest.mark.parametrize("name", HEURISTICS)
def test_the_seed_decides_and_the_global_generator_is_left_alone(name: str) -> None:
    problem, x = instance(40, 20, seed=5)
    state = torch.get_rng_state()
    first = solve(problem, 20, x, solver=name, restarts=3, seed=11)
    torch.manual_seed(1)
    second = solve(problem, 20, x, solver=name, restarts=3, seed=11)
    torch.set_rng_state(state)
    solve(problem, 20, x, solver=name, restarts=3, seed=12)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("name", ["swap", "local"])
def test_restarts_find_what_one_descent_does_not(name: str) -> None:
    gains = 0
    for seed in range(10):
        problem, x = instance(20, 10, seed=seed)
        one = solve(problem, 10, x, solver=name)[1]
        many = solve(problem, 10, x, solver=name, restarts=12, seed=seed)[1]
        assert many <= one
        gains += many < one - 1e-9
    assert gains > 0


def test_the_start_is_not_modified() -> None:
    problem, x = instance(20, 8)
    before = x.clone()
    for name in HEURISTICS:
        solve(problem, 8, x, solver=name)
    assert torch.equal(x, before)
    assert solve(problem, 8, x.float())[1] == solve(problem, 8, x)[1]


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_to_choose(name: str) -> None:
    problem, _ = instance(6, 3)
    for k in (0, 6):
        start = torch.arange(6) < k
        found, energy = solve(problem, k, start, solver=name)
        assert torch.equal(found, start)
        assert energy == pytest.approx(float(problem.energy(start)))
    zero = Problem(matrix=torch.zeros(4, 4))
    assert solve(zero, 2, torch.arange(4) < 2, solver=name)[1] == 0.0


def test_an_asymmetric_matrix_stands_for_its_symmetric_part() -> None:
    q = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(matrix=q, const=0.5)
    for x in masks(6, 3):
        assert float(problem.energy(x)) == pytest.approx(float(x.double() @ q @ x.double()) + 0.5, abs=1e-12)


def test_mistakes_are_named() -> None:
    problem, x = instance(6, 3)
    with pytest.raises(BillhookError, match=r"No solver 'swop' \(did you mean 'swap'\?\): there are anneal, exact"):
        solve(problem, 3, x, solver="swop")
    for k in (-1, 7):
        with pytest.raises(BillhookError, match=f"k is {k}"):
            solve(problem, k, x)
    with pytest.raises(BillhookError, match="prunes 3 candidates, but k is 2"):
        solve(problem, 2, x)
    with pytest.raises(BillhookError, match="must be 6 zeros and ones"):
        solve(problem, 3, 2 * x.int())
    with pytest.raises(BillhookError, match="must be 6 zeros and ones"):
        solve(problem, 3, x[:5])
    with pytest.raises(BillhookError, match="restarts is 0"):
        solve(problem, 3, x, restarts=0)
    for groups in (torch.zeros(5, dtype=torch.int64), torch.zeros(6)):
        with pytest.raises(BillhookError, match="must be 6 integers"):
            solve(problem, 3, x, groups=groups)
    large, start = instance(40, 20)
    with pytest.raises(BillhookError, match="Enumeration would visit 137846528820 masks"):
        solve(large, 20, start, solver="exact")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    gradients, w0, w, _ = block(6, 3)
    for position, what in enumerate(("per-sample gradients", "original weights", "current weights")):
        values = [gradients.clone(), w0.clone(), w.clone()]
        values[position].view(-1)[2] = bad
        with pytest.raises(BillhookError, match=what):
            block_problem(*values)
    with pytest.raises(BillhookError, match="matrix of the quadratic problem"):
        Problem(matrix=torch.full((3, 3), bad))
    with pytest.raises(BillhookError, match="linear of the quadratic problem"):
        Problem(factor=torch.ones(2, 3), linear=torch.full((3,), bad))
    with pytest.raises(BillhookError, match="constant"):
        Problem(matrix=torch.ones(3, 3), const=bad)


def test_forms_that_do_not_fit_are_refused() -> None:
    gradients, w0, w, _ = block(6, 3)
    for values in [(gradients[0], w0, w), (gradients[:0], w0, w), (gradients, w0[:5], w), (gradients, w0, w[:5])]:
        with pytest.raises(BillhookError, match="do not fit"):
            block_problem(*values)
    with pytest.raises(BillhookError, match="square"):
        Problem(matrix=torch.ones(3, 4))
    with pytest.raises(BillhookError, match="low-rank form"):
        Problem(factor=torch.ones(3, 4), linear=torch.ones(3))
    with pytest.raises(BillhookError, match="either by a matrix"):
        Problem(factor=torch.ones(3, 4))
    with pytest.raises(BillhookError, match="either by a matrix"):
        Problem()
