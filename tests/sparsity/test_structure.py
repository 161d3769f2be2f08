"""Sharing out a budget over blocks, rounding widths, and ranking whole channels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from billhook.errors import BillhookError
from billhook.sparsity.structure import column_scores, entropic, proportional, rounded, strongest

scores_of = st.lists(st.floats(0, 1), min_size=1, max_size=24)


@given(scores_of, st.floats(0, 0.85), st.one_of(st.none(), st.floats(1e-6, 1e4)), st.sampled_from([0.85, 0.9, 1.0]))
@settings(max_examples=300, deadline=None)
def test_entropic_keeps_mean_cap_and_order(scores: list[float], mean: float, epsilon: float | None, cap: float) -> None:
    ratios = entropic(scores, mean, epsilon, cap)
    assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= r <= cap + 1e-9 for r in ratios)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    assert all(ratios[a] >= ratios[b] - 1e-9 for a, b in pairwise(order))


@given(scores_of, st.floats(0.01, 0.8), st.floats(1e-3, 10))
@settings(max_examples=200, deadline=None)
def test_entropic_meets_the_kkt_conditions(scores: list[float], mean: float, epsilon: float) -> None:
    """Stationary: s + ε(ln φ + 1) is one number over the blocks below the cap, and no larger at the cap."""
    ratios = entropic(scores, mean, epsilon)
    gradient = [s + epsilon * (math.log(r) + 1) if r > 1e-280 else None for s, r in zip(scores, ratios, strict=True)]
    free = [g for g, r in zip(gradient, ratios, strict=True) if g is not None and r < 0.85 - 1e-9]
    fixed = [g for g, r in zip(gradient, ratios, strict=True) if g is not None and r >= 0.85 - 1e-9]
    if free:
        assert max(free) - min(free) < 1e-6 * max(1.0, epsilon)
        assert all(g <= min(free) + 1e-6 * max(1.0, epsilon) for g in fixed)


def objective(scores: list[float], ratios: list[float], epsilon: float) -> float:
    return sum(s * (1 - r) - epsilon * r * (math.log(r) if r > 0 else 0.0) for s, r in zip(scores, ratios, strict=True))


@pytest.mark.parametrize("mean", [0.3, 0.6])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
def test_no_feasible_change_is_better(mean: float, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(8, generator=generator).tolist()
    ratios = entropic(scores, mean, epsilon)
    best = objective(scores, ratios, epsilon)
    for _ in range(300):
        move = torch.randn(8, generator=generator, dtype=torch.float64)
        other = (torch.tensor(ratios, dtype=torch.float64) + 0.03 * (move - move.mean())).tolist()
        if all(0 <= r <= 0.85 for r in other):
            assert objective(scores, other, epsilon) <= best + 1e-12


def test_entropic_hand_cases() -> None:
    assert entropic([0.3, 0.3, 0.3], 0.4) == pytest.approx([0.4] * 3)
    assert entropic([0.5], 0.4) == pytest.approx([0.4])
    assert entropic([0.1, 0.9, 0.4], 0.3, 1e6) == pytest.approx([0.3] * 3, abs=1e-4)
    # φ = L φ̄ softmax(−s/ε): weights 1, 1/2, 1/4
    step = 0.1 * math.log(2)
    assert entropic([0, step, 2 * step], 0.35, 0.1) == pytest.approx([0.6, 0.3, 0.15])
    # the first would be 1.2: it is fixed at 0.85 and 2:1 remains for the others
    assert entropic([0, step, 2 * step], 0.7, 0.1) == pytest.approx([0.85, 2.5 / 3, 1.25 / 3])
    # ε → 0: the least influential leave first, one after the other
    assert entropic([0.1, 0.4, 0.2, 0.3], 0.5, 1e-6) == pytest.approx([0.85, 0, 0.85, 0.3], abs=1e-9)
    assert entropic([0.1, 0.2], 0.0) == [0, 0]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=24, unique=True), st.floats(0.05, 0.8))
@settings(max_examples=150, deadline=None)
def test_the_automatic_strength_puts_the_largest_at_twice_the_mean(scores: list[float], mean: float) -> None:
    assume(max(scores) - min(scores) > 0.05)
    gaps = sorted(scores)
    assume(gaps[1] - gaps[0] > 0.01)
    ratios = entropic(scores, mean)
    assert max(ratios) == pytest.approx(min(0.85, 2 * mean), rel=1e-6)
    assert min(ratios) > 0 or mean < 0.02


def test_the_automatic_strength_changes_little_where_the_cap_begins_to_bind() -> None:
    scores = [0.1, 0.15, 0.2, 0.3]
    before, after = entropic(scores, 0.424), entropic(scores, 0.426)
    assert all(abs(a - b) < 0.01 for a, b in zip(before, after, strict=True))
    assert max(entropic(scores, 0.849)) - min(entropic(scores, 0.849)) < 0.02  # nothing to share out near the cap


def test_more_than_the_cap_is_refused() -> None:
    with pytest.raises(BillhookError, match="one block may lose"):
        entropic([0.1, 0.2], 0.9)


@given(scores_of, st.floats(0, 0.89), st.floats(0, 1), st.floats(0.5, 2), st.floats(-1, 1), st.sampled_from([0.9, 1.0]))
@settings(max_examples=300, deadline=None)
def test_proportional_keeps_mean_base_cap_and_order(
    scores: list[float], mean: float, part: float, factor: float, shift: float, cap: float
) -> None:
    base = part * mean
    ratios = proportional(scores, mean, base, cap)
    assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=1e-9)
    assert all(base - 1e-9 <= r <= cap + 1e-9 for r in ratios)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    assert all(ratios[a] <= ratios[b] + 1e-9 for a, b in pairwise(order))
    if max(scores) - min(scores) > 1e-3:  # the scale of the scores means nothing
        moved = proportional([factor * s + shift for s in scores], mean, base, cap)
        assert moved == pytest.approx(ratios, abs=1e-6)


def test_proportional_starts_at_the_base_and_keeps_the_mean_to_the_last_digit() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
        mean, part = (0.3 * torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
        base = part / 0.3 * mean
        ratios = proportional(scores, mean, base)
        assert max(ratios) < 0.9  # the cap is not at work
        assert sum(ratios) / 12 == pytest.approx(mean, abs=1e-12)
        assert min(ratios) == base


def test_proportional_hand_cases() -> None:
    ratios = proportional([0.2, 0.6, 1.0], 0.3, 0.1)
    assert ratios == pytest.approx([0.1, 0.3, 0.5])
    assert proportional([0.2, 0.6, 1.0], 0.3, 0.3) == pytest.approx([0.3] * 3)
    assert proportional([0, 0, 0, 1], 0.4, 0.0, cap=0.9) == pytest.approx([0.7 / 3] * 3 + [0.9])
    assert proportional([0.5, 0.5], 0.3, 0.1) == [0.3, 0.3]
    assert proportional([0.7], 0.3, 0.1) == [0.3]
    assert min(proportional([0.2, 0.6, 1.0], 0.3, 0.05)) == pytest.approx(0.05)


@given(st.floats(0, 300), st.integers(1, 64), st.integers(1, 256))
def test_rounded_is_the_nearest_width_that_is_allowed(width: float, multiple: int, size: int) -> None:
    assume(width <= size)
    got = rounded(width, multiple, size)
    allowed = {size, *range(multiple, size, multiple)}
    assert got in allowed
    assert abs(got - width) == pytest.approx(min(abs(a - width) for a in allowed))
    assert rounded(size, multiple, size) == size


def test_rounded_hand_cases() -> None:
    assert rounded(40, 32, 40) == 40  # nothing was to be removed
    assert rounded(1000.4, 64, 1536) == 1024
    assert rounded(3.5, 1, 8) == 4
    assert rounded(0.2, 1, 8) == 1
    assert rounded(3, 32, 48) == 32


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 20))
def test_strongest_keeps_the_first_of_equal_ones(values: list[int], count: int) -> None:
    assume(count <= len(values))
    keep = strongest(torch.tensor(values, dtype=torch.float32), count).tolist()
    want = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert keep == want


def test_strongest_per_head() -> None:
    scores = torch.tensor([[1.0, 3, 2], [5, 5, 5]])
    assert strongest(scores, 2).tolist() == [[1, 2], [0, 1]]


def test_a_column_score_is_the_sum_of_wanda_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 11, generator=generator)
    x = torch.randn(200, 11, generator=generator)
    energy = x.square().sum(0)
    want = (weight.abs() * x.norm(dim=0)).sum(0)
    torch.testing.assert_close(column_scores(weight, energy), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(column_scores(weight, None), weight.abs().sum(0))
    torch.testing.assert_close(column_scores(weight, energy, "l2"), weight.norm(dim=0) * x.norm(dim=0))
    order = torch.randperm(7, generator=generator)
    torch.testing.assert_close(column_scores(weight[order], energy), want)
    scaled = column_scores(weight / 4, energy * 16)  # row j of the first matrix by c, column j of this by 1/c
    torch.testing.assert_close(scaled, want)
    assert column_scores(weight.bfloat16(), energy.bfloat16()).dtype == torch.float32
