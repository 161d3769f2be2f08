"""Similarity of masks against counts and expectations; the probe of near-zero weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from billhook import BillhookError
from billhook.analysis.masks import (
    corrected_cosine,
    cosine,
    find_event,
    mask_similarity,
    near_zero,
    near_zero_thresholds,
)


def random_mask(density: float, size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator) < density


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_cosine_is_that_of_the_vectors(rows: list[tuple[bool, bool]]) -> None:
    first, second = (torch.tensor(column) for column in zip(*rows, strict=True))
    if not (first.any() and second.any()):
        with pytest.raises(BillhookError, match="keeps nothing"):
            cosine(first, second)
        return
    expected = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0)
    assert cosine(first, second) == pytest.approx(float(expected))
    assert cosine(first, second) == cosine(second, first)


def test_equal_masks() -> None:
    mask = random_mask(0.6, 1000, torch.Generator().manual_seed(0))
    assert cosine(mask, mask) == pytest.approx(1, abs=1e-12)
    assert corrected_cosine(mask, mask) == pytest.approx(1, abs=1e-12)
    every = torch.ones(10, dtype=torch.bool)
    assert cosine(every, every) == 1
    assert math.isnan(corrected_cosine(every, every))


@pytest.mark.parametrize(("one", "two"), [(0.6, 0.6), (0.9, 0.9), (0.3, 0.8)])
def test_independent_masks_are_corrected_to_zero(one: float, two: float) -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [mask_similarity(random_mask(one, 2000, generator), random_mask(two, 2000, generator)) for _ in range(100)]
    mean = sum(draw.cosine for draw in draws) / 100
    assert mean == pytest.approx(math.sqrt(one * two), abs=0.01)
    assert sum(draw.corrected for draw in draws) / 100 == pytest.approx(0, abs=0.02)
    assert draws[0].expected == pytest.approx(math.sqrt(draws[0].densities[0] * draws[0].densities[1]))


def test_expectation_is_exact_over_all_masks_of_a_density() -> None:
    # every placement of two of six kept against a fixed mask of three
    first = torch.tensor([1, 1, 1, 0, 0, 0])
    seconds = []
    for i in range(6):
        for j in range(i):
            second = torch.zeros(6)
            second[[i, j]] = 1
            seconds.append(mask_similarity(first, second))
    assert sum(similarity.cosine for similarity in seconds) / 15 == pytest.approx(seconds[0].expected)
    assert sum(similarity.corrected for similarity in seconds) / 15 == pytest.approx(0, abs=1e-12)


def test_masks_of_a_model_are_one_vector() -> None:
    generator = torch.Generator().manual_seed(2)
    first = {name: random_mask(0.7, n, generator).view(-1, 5) for name, n in (("a", 20), ("b", 100))}
    second = {name: random_mask(0.4, mask.numel(), generator).view_as(mask) for name, mask in first.items()}
    whole = mask_similarity(*(torch.cat([masks[name].flatten() for name in "ab"]) for masks in (first, second)))
    # the order of the names does not matter
    assert mask_similarity(first, dict(reversed(second.items()))) == whole


def test_weights_can_stand_for_their_masks() -> None:
    weight = torch.tensor([[0.5, 0.0], [-2.0, 0.1]])
    assert cosine(weight, weight != 0) == pytest.approx(1)


def test_masks_that_do_not_belong_together() -> None:
    mask = torch.ones(2, 3)
    with pytest.raises(BillhookError, match="different shapes"):
        cosine(mask, mask.T)
    with pytest.raises(BillhookError, match="'b' is in one"):
        cosine({"a": mask}, {"a": mask, "b": mask})


# The probe


def test_near_zero_counts_over_all_matrices() -> None:
    weights = {"a": torch.tensor([[0.0, 0.01, -0.02, 0.3]]), "b": torch.tensor([0.015625, -5.0])}
    assert near_zero(weights, 0.015625) == 2 / 6  # strictly below
    assert near_zero(weights, {"a": 1.0, "b": 0.001}) == 4 / 6
    with pytest.raises(BillhookError, match="'b'"):
        near_zero(weights, {"a": 1.0})
    with pytest.raises(BillhookError, match="no weights"):
        near_zero({}, 0.1)


def test_near_zero_of_low_precision_weights() -> None:
    weight = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    rounded = weight.bfloat16()
    # 0.7 is no bfloat16: the nearest one is below it and must count
    nearest = torch.tensor(0.7).bfloat16()
    assert float(nearest) < 0.7
    assert near_zero({"w": rounded}, 0.7) == int((rounded.abs() <= nearest).sum()) / 1001
    assert (rounded.abs() == nearest).any()


def test_thresholds_are_medians_of_a_kind() -> None:
    weights = {
        "0.q_proj": torch.tensor([1.0, -2.0, 9.0]),
        "1.q_proj": torch.tensor([-3.0, 4.0]),
        "0.up_proj": torch.tensor([[0.1, -0.3, 0.2]]),
    }
    tau = near_zero_thresholds(weights)
    assert tau == {
        "0.q_proj": pytest.approx(3e-3),
        "1.q_proj": pytest.approx(3e-3),
        "0.up_proj": pytest.approx(2e-4),
    }
    assert near_zero_thresholds(weights, factor=1e-2)["0.q_proj"] == pytest.approx(3e-2)
    by_layer = near_zero_thresholds(weights, kind=lambda name: name[0])
    assert by_layer["1.q_proj"] == pytest.approx(3e-3)
    assert by_layer["0.q_proj"] == by_layer["0.up_proj"] == pytest.approx(3e-4)  # the lower of the middle two
    with pytest.raises(BillhookError, match="'up_proj'"):
        near_zero_thresholds({"0.up_proj": torch.zeros(3)})


# The event


def wobble(count: int) -> list[float]:
    """A share that wobbles a little around 0.1."""
    return [0.1 + 0.001 * math.sin(1.7 * i) for i in range(count)]


def test_event_is_the_window_with_the_jump() -> None:
    steps = [1000 * i for i in range(51)]
    shares = [share + (0.05 if step >= 23000 else 0) for step, share in zip(steps, wobble(51), strict=True)]
    event = find_event(steps, shares)
    assert event is not None
    assert event.start < 23000 <= event.end
    assert event.end - event.start == 2000
    assert event.increase == pytest.approx(0.05, abs=0.003)
    # the numbers, by hand
    increases = torch.tensor([b - a for a, b in zip(shares, shares[2:], strict=False)], dtype=torch.float64)
    assert event.increase == pytest.approx(float(increases.max()))
    assert event.median == pytest.approx(float(increases.median()))
    assert event.deviation == pytest.approx(float((increases - increases.median()).abs().median()))


def test_no_event_without_a_jump() -> None:
    steps = [1000 * i for i in range(51)]
    assert find_event(steps, wobble(51)) is None
    assert find_event(steps, [0.01 * i for i in range(51)]) is None  # even growth
    assert find_event(steps, [0.1] * 51) is None
    assert find_event(steps, [0.9 - 0.1 * (i > 20) for i in range(51)]) is None  # a fall is no increase


def test_a_jump_counts_from_five_deviations_on() -> None:
    steps = list(range(9))
    # increases over one step: ±1 around 0, and one of `jump`; their median is 0 or 1, their deviation 1
    for jump, found in ((5.0, False), (7.0, True)):
        shares, total = [0.0], 0.0
        for i in range(8):
            total += jump if i == 4 else (-1.0) ** i
            shares.append(total)
        event = find_event(steps, shares, window=1)
        increases = sorted([jump, *((-1.0) ** i for i in range(8) if i != 4)])
        middle = (increases[3] + increases[4]) / 2
        spread = sorted(abs(increase - middle) for increase in increases)
        assert found == (jump - middle > 5 * (spread[3] + spread[4]) / 2)
        assert (event is not None) == found
        if event is not None:
            assert (event.start, event.end) == (4, 5)


def test_uneven_checkpoints() -> None:
    steps = [0, 500, 1000, 3000, 4000, 4500, 6000, 7000, 8000, 9000, 9500]
    shares = [0.3 * (step >= 6000) for step in steps]
    event = find_event(steps, shares)
    assert event is not None
    assert (event.start, event.end) == (4000, 6000)  # the first of equals; no window is longer than 2000
    assert find_event(steps[:3], shares[:3]) is None


def test_event_arguments() -> None:
    with pytest.raises(BillhookError, match="3 steps but 2"):
        find_event([0, 1, 2], [0.1, 0.2])
    with pytest.raises(BillhookError, match="ascend"):
        find_event([0, 2, 2], [0.1, 0.2, 0.3])
