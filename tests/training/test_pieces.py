"""Schedules, densities and masks: pure functions, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.errors import BillhookError
from billhook.training.densities import erk, uniform
from billhook.training.masks import (
    among_active,
    exchange,
    keep_globally,
    keep_in_layer,
    pack,
    random_mask,
    refuse_unequal,
    unpack,
)
from billhook.training.schedules import cosine, cubic, geometric


def test_cubic_schedule() -> None:
    values = [cubic(t, 10, 110, 0.2, 0.9) for t in range(130)]
    assert values[0] == values[10] == pytest.approx(0.2)
    assert values[110] == values[129] == 0.9
    assert values == sorted(values)
    assert cubic(60, 10, 110, 0.2, 0.9) == pytest.approx(0.9 + (0.2 - 0.9) / 8)


def test_cosine_schedule() -> None:
    assert cosine(0, 100, 0.5, 0.005) == 0.5
    assert cosine(100, 100, 0.5, 0.005) == pytest.approx(0.005)
    assert cosine(50, 100, 0.5, 0.005) == pytest.approx(0.2525)


def test_geometric_schedule() -> None:
    left = [1 - geometric(i, 3, 0.98) for i in range(4)]
    assert left == pytest.approx([1.0, 0.2714, 0.0737, 0.02], abs=1e-4)
    assert geometric(3, 3, 0.98) == 0.98


def test_erk_of_a_known_network() -> None:
    shapes = {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "c": (32, 16, 3, 3), "d": (64, 32, 3, 3), "e": (10, 64)}
    counts = erk(shapes, 0.1)
    density = [counts[n] / math.prod(s) for n, s in shapes.items()]
    assert density == pytest.approx([0.529, 0.151, 0.107, 0.0506, 1.0], abs=2e-3)
    assert erk(shapes, 1.0) == {n: math.prod(s) for n, s in shapes.items()}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=6),
    st.floats(0.01, 1.0),
)
def test_erk_meets_its_budget(dims: list[tuple[int, int, int]], density: float) -> None:
    shapes = {str(i): (o, n, k, k) for i, (o, n, k) in enumerate(dims)}
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    counts = erk(shapes, density)
    assert all(0 <= counts[n] <= sizes[n] for n in shapes)
    assert abs(sum(counts.values()) - density * sum(sizes.values())) <= len(shapes)


def test_erk_of_two_free_layers_keeps_their_ratio() -> None:
    shapes = {"a": (100, 200), "b": (300, 400)}
    counts = erk(shapes, 0.05)
    ratio = (counts["a"] / 20_000) / (counts["b"] / 120_000)
    assert ratio == pytest.approx((300 / 20_000) / (700 / 120_000), rel=1e-3)
    assert uniform(shapes, 0.05) == {"a": 1000, "b": 6000}


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 60), st.booleans())
def test_global_selection_is_a_sort(seed: int, keep: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(s, generator=generator) for n, s in {"a": (4, 5), "b": (5, 4, 2)}.items()}
    if ties:
        scores = {n: (s * 4).round() for n, s in scores.items()}
    masks = {n: torch.rand(s.shape, generator=generator) > 0.3 for n, s in scores.items()}
    active = sum(int(m.sum()) for m in masks.values())
    result = keep_globally(scores, masks, min(keep, active))
    assert sum(int(m.sum()) for m in result.values()) == min(keep, active)
    assert all(bool((masks[n] | ~m).all()) for n, m in result.items())  # nested
    kept = torch.cat([scores[n][m] for n, m in result.items()])
    dropped = torch.cat([scores[n][masks[n] & ~m] for n, m in result.items()])
    assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()


def test_an_active_zero_outranks_an_absent_weight() -> None:
    mask = torch.tensor([True, False, True, False])
    assert keep_in_layer(torch.tensor([0.0, 5.0, 1.0, 5.0]), mask, 2).tolist() == mask.tolist()
    assert (among_active(torch.zeros(2), torch.tensor([True, False])) > 0).tolist() == [True, False]


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from(["gradient", "random"]))
def test_exchange_against_brute_force(seed: int, fraction: float, growth: str) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(5, 6, generator=g), torch.randn(5, 6, generator=g)
    mask = torch.rand(5, 6, generator=g) > 0.5
    count = int(fraction * int(mask.sum()))
    new = exchange(weight, mask, count, growth, gradient, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert int(new.sum()) == int(mask.sum())
    active = [i for i in range(30) if mask.flatten()[i]]
    dropped = sorted(active, key=lambda i: abs(float(weight.flatten()[i])))[:count]
    left = set(active) - set(dropped)
    assert all(new.flatten()[i] for i in left)
    if growth == "gradient":
        absent = [i for i in range(30) if i not in left]
        grown = sorted(absent, key=lambda i: -abs(float(gradient.flatten()[i])))[:count]
        assert {i for i in range(30) if new.flatten()[i]} == left | set(grown)


def test_exchange_keeps_the_count_where_gradients_are_zero() -> None:
    mask = torch.tensor([[True, False, False, False, False, True, True]])
    new = exchange(torch.ones(1, 7), mask, 2, "gradient", torch.zeros(1, 7), torch.Generator())
    # of equal ones the first in order leaves first and is grown last: 0 and 5 leave, 4 and 5 come; 6 cannot come twice
    assert new.tolist() == [[False, False, False, False, True, True, True]]


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_masks_pack_to_bits(size: int, seed: int) -> None:
    mask = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack(mask)
    assert len(bits) == math.ceil(size * 3 / 8)
    assert torch.equal(unpack(bits, mask.shape), mask)


def test_random_mask_is_exact_and_repeatable() -> None:
    first = random_mask(torch.Size((7, 9)), 20, torch.Generator().manual_seed(3))
    assert int(first.sum()) == 20
    assert torch.equal(first, random_mask(torch.Size((7, 9)), 20, torch.Generator().manual_seed(3)))


def test_unequal_masks_are_refused_by_name() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    refuse_unequal({"a": mask}, {"a": mask.clone()}, "soup")
    with pytest.raises(BillhookError, match=r"soup.*fc\.weight"):
        refuse_unequal({"fc.weight": mask}, {"fc.weight": ~mask}, "soup")
