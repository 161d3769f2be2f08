"""Gates: their gradients against exact expectations, the penalty, and masks within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.errors import BillhookError
from billhook.sparsity.gates import (
    gumbel_sigmoid,
    hardened,
    kept_probability,
    likely,
    log_ratio,
    reinmax,
    straight_through,
    within_budget,
)

LOGITS = torch.linspace(-4, 4, 33, dtype=torch.float64)
OPEN, SHUT = torch.zeros_like(LOGITS), torch.full_like(LOGITS, 1 - 1e-12)  # draws that make every gate 1, or 0


def gradient(sample: Callable[[Tensor, Tensor], Tensor], uniform: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    z = LOGITS.clone().requires_grad_()
    loss(sample(z, uniform)).sum().backward()
    assert z.grad is not None
    return z.grad


def mean_gradient(sample: Callable[[Tensor, Tensor], Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Over both values of each gate, by their probabilities."""
    p = LOGITS.sigmoid()
    return p * gradient(sample, OPEN, loss) + (1 - p) * gradient(sample, SHUT, loss)


def two_classes(logits: Tensor, uniform: Tensor, tau: float) -> Tensor:
    """ReinMax as published, on classes (1, 0) with logits (z, 0); the first entry of the one-hot sample."""
    pair = torch.stack([logits, torch.zeros_like(logits)], -1)
    pi_0 = pair.softmax(-1)
    hard = (uniform < pi_0[..., 0]).to(pair.dtype)
    hot = torch.stack([hard, 1 - hard], -1)
    pi_1 = (hot + (pair / tau).softmax(-1)) / 2
    pi_1 = ((pi_1.log() - pair).detach() + pair).softmax(-1)
    pi_2 = 2 * pi_1 - pi_0 / 2
    return (pi_2 - pi_2.detach() + hot)[..., 0]


@pytest.mark.parametrize("tau", [1.0, 1.3, 2.5])
@pytest.mark.parametrize("uniform", [OPEN, SHUT])
def test_reinmax_is_the_two_class_algorithm(tau: float, uniform: Tensor) -> None:
    def loss(d: Tensor) -> Tensor:
        return 3 * d.square() - 1.7 * d

    got = gradient(lambda z, u: reinmax(z, u, tau), uniform, loss)
    want = gradient(lambda z, u: two_classes(z, u, tau), uniform, loss)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_at_temperature_one_it_is_half_the_chance_of_the_other_value() -> None:
    p = LOGITS.sigmoid()
    for uniform, other in ((OPEN, 1 - p), (SHUT, p)):
        torch.testing.assert_close(gradient(reinmax, uniform, lambda d: 2.5 * d), 2.5 * other / 2, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), c=st.floats(-3, 3))
def test_reinmax_is_exact_in_the_mean_for_quadratics_and_straight_through_is_not(a: float, b: float, c: float) -> None:
    def loss(d: Tensor) -> Tensor:
        return a * d.square() + b * d + c

    slope = LOGITS.sigmoid() * (1 - LOGITS.sigmoid())
    want = (a + b) * slope  # (f(1) − f(0)) σ'(z)
    torch.testing.assert_close(mean_gradient(reinmax, loss), want, rtol=0, atol=1e-10)
    plain = mean_gradient(straight_through, loss)
    # its derivative is taken at D, so the mean is (b + 2 a p) σ' instead of (b + a) σ'
    torch.testing.assert_close(plain - want, a * (2 * LOGITS.sigmoid() - 1) * slope, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sample", [reinmax, straight_through])
def test_hard_gates_are_open_as_often_as_they_should(sample: Callable[[Tensor, Tensor], Tensor]) -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for z in (-2.0, 0.3, 3.0):
        gate = sample(torch.full_like(uniform, z), uniform)
        assert set(gate.unique().tolist()) == {0.0, 1.0}
        assert float(gate.mean()) == pytest.approx(torch.tensor(z).sigmoid().item(), abs=0.004)


def test_gumbel_gates_round_to_one_as_often_as_they_should() -> None:
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    for z in (-2.0, math.log(math.log(2)), 0.5):
        logits = torch.full_like(uniform, z)
        soft = gumbel_sigmoid(logits, uniform)
        assert 0 <= float(soft.min()) <= float(soft.max()) <= 1
        assert float(hardened(soft).mean()) == pytest.approx(float(kept_probability(logits, "gumbel")[0]), abs=0.004)
    assert float(kept_probability(torch.tensor(3.0), "gumbel")) > 0.9999
    assert torch.isfinite(gumbel_sigmoid(torch.zeros(1), torch.zeros(1))).all()


def test_soft_gates_have_the_gradient_of_their_formula() -> None:
    uniform = torch.full_like(LOGITS, 0.4)
    z = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gumbel_sigmoid(x, uniform, 0.7), z)
    got = gradient(lambda x, u: hardened(gumbel_sigmoid(x, u, 0.7)), uniform, lambda d: 3 * d)
    want = gradient(lambda x, u: gumbel_sigmoid(x, u, 0.7), uniform, lambda d: 3 * d)
    assert torch.equal(got, want)


def test_a_likely_gate_has_more_than_even_odds() -> None:
    for noise in ("logistic", "gumbel"):
        assert torch.equal(likely(LOGITS, noise), kept_probability(LOGITS, noise) > 0.5)  # type: ignore[arg-type]
    assert likely(torch.tensor([-0.3664, -0.3666]), "gumbel").tolist() == [True, False]


def test_the_penalty_is_zero_at_the_target_only_and_the_same_on_both_sides() -> None:
    target = 1234.5

    def penalty(size: float) -> tuple[float, float]:
        t = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        value = log_ratio(t, target)
        value.backward()
        assert t.grad is not None
        return float(value.detach()), float(t.grad)

    assert penalty(target)[0] == pytest.approx(0, abs=1e-12)
    assert penalty(2 * target)[0] == pytest.approx(math.log(2), abs=1e-12)
    assert penalty(target / 2)[0] == pytest.approx(math.log(2), abs=1e-12)
    for factor in (0.1, 0.9, 0.999, 1.001, 1.1, 10):
        value, slope = penalty(factor * target)
        assert value > 1e-4
        assert value == pytest.approx(math.log(max(factor, 1 / factor)))
        assert math.copysign(1, slope) == math.copysign(1, factor - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=40), st.floats(0, 1))
def test_what_is_kept_is_the_longest_head_of_the_order_that_fits(gates: list[tuple[int, int]], share: float) -> None:
    scores = torch.tensor([float(s) for s, _ in gates])
    costs = torch.tensor([float(c) for _, c in gates])
    budget = share * float(costs.sum())
    keep = within_budget(scores, lambda mask: float(costs[mask].sum()), budget)
    order = sorted(range(len(gates)), key=lambda i: (-gates[i][0], i))
    want, spent = set(), 0.0
    for i in order:
        if spent + gates[i][1] > budget:
            break
        want.add(i)
        spent += gates[i][1]
    assert set(keep.nonzero()[:, 0].tolist()) == want


def test_a_budget_below_nothing_is_refused() -> None:
    with pytest.raises(BillhookError, match="budget of 5 is below 7"):
        within_budget(torch.zeros(3), lambda mask: 7.0 + float(mask.sum()), 5.0)
