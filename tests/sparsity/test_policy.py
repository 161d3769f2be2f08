"""Plackett-Luce draws and their probabilities, the policy gradient, the two forms of policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from billhook.sparsity.policy import (
    LinearPolicy,
    TwoLayerPolicy,
    draw_rows,
    log_probability,
    reinforce,
    row_features,
)
from billhook.sparsity.structure import strongest


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_definition(logits: Tensor, order: tuple[int, ...]) -> float:
    left, probability = logits.double().exp(), 1.0
    for row in order:
        probability *= float(left[row] / left.sum())
        left[row] = 0
    return probability


@pytest.mark.parametrize("count", [1, 3, 6])
def test_probabilities_are_those_of_the_definition_and_sum_to_one(count: int) -> None:
    logits = torch.randn(6, generator=generator(), dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(6), count):
        probability = float(log_probability(logits, torch.tensor(order)).exp())
        assert probability == pytest.approx(by_definition(logits.clone(), order), rel=1e-10)
        total += probability
    assert total == pytest.approx(1, abs=1e-12)


def test_draws_are_as_frequent_as_they_are_probable() -> None:
    """χ² over the 12 ordered pairs of 4 rows; exceeded by chance once in 10^4."""
    logits, draws = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64), 100_000
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for first, second in draw_rows(logits.expand(draws, 4), 2, generator(3)).tolist():
        counts[first, second] += 1
    chi = 0.0
    for order, count in counts.items():
        expected = draws * by_definition(logits.clone(), order)
        chi += (count - expected) ** 2 / expected
    assert chi < 37.4


def test_draws_are_distinct_and_repeatable() -> None:
    logits = torch.randn(50, generator=generator())
    one, two = draw_rows(logits, 30, generator(1)), draw_rows(logits, 30, generator(1))
    assert torch.equal(one, two)
    assert len(set(one.tolist())) == 30
    assert not torch.equal(one, draw_rows(logits, 30, generator(2)))


@pytest.mark.parametrize("scale", [50.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_large_logits_give_finite_losses_and_gradients(scale: float, dtype: torch.dtype, count: int) -> None:
    logits = torch.tensor([scale, -scale] * 4, dtype=dtype, requires_grad=True)
    for order in (torch.arange(8)[:count], torch.arange(8).flip(0)[:count], draw_rows(logits, count, generator())):
        value = log_probability(logits, order)
        (gradient,) = torch.autograd.grad(value, logits)
        assert math.isfinite(float(value.detach()))
        assert torch.isfinite(gradient).all()
    loss = reinforce(logits, count, lambda keep: float(keep[0]), 2, generator(5))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("count", "samples"), [(1, 2), (1, 3), (2, 2)])
def test_the_gradient_is_that_of_the_expected_reward(count: int, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all draws there can be; as each is weighed against the mean of all, (samples − 1)/samples of it."""
    logits = torch.tensor([0.3, -0.5, 0.9, 0.0], dtype=torch.float64, requires_grad=True)

    def reward(keep: Tensor) -> float:
        return 5.0 + float(keep[0] == 2) - 2.0 * float(3 in keep.tolist())

    orders = [torch.tensor(order) for order in itertools.permutations(range(4), count)]
    probability = {id(order): log_probability(logits, order).exp() for order in orders}
    expected = torch.stack([probability[id(order)] * reward(order) for order in orders]).sum()
    (want,) = torch.autograd.grad(-expected, logits, retain_graph=True)
    got = torch.zeros(4, dtype=torch.float64)
    for together in itertools.product(orders, repeat=samples):
        source = iter(together)
        monkeypatch.setattr("billhook.sparsity.policy.draw_rows", lambda *args, source=source: next(source))
        (gradient,) = torch.autograd.grad(reinforce(logits, count, reward, samples, generator()), logits)
        got += math.prod(float(probability[id(order)].detach()) for order in together) * gradient
    torch.testing.assert_close(got, want * (samples - 1) / samples, rtol=1e-9, atol=1e-12)
    assert float(want.abs().max()) > 0.3


def test_equal_rewards_teach_nothing() -> None:
    logits = torch.randn(9, generator=generator()).requires_grad_()
    reinforce(logits, 4, lambda keep: 99_999.0, 2, generator()).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("form", ["linear", "two layers"])
def test_planted_rows_are_found(form: str, seed: int) -> None:
    """Reward: the share of a planted half among the rows drawn; it lies to one side along one direction."""
    source = generator(seed)
    weight = torch.randn(64, 16, generator=source)
    planted = torch.arange(64) % 2 == 0
    weight += torch.where(planted, 1.0, -1.0)[:, None] * torch.nn.functional.normalize(weight[0], dim=0) * 3
    features = row_features(weight)

    policy: LinearPolicy | TwoLayerPolicy = LinearPolicy(17) if form == "linear" else TwoLayerPolicy(17, 64, source)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.05 if form == "linear" else 5e-3)

    def share(keep: Tensor) -> float:
        return float(planted[keep].double().mean())

    if share(strongest(policy(features).detach(), 32)) > 0.5:  # where the start happens to favour them
        planted = ~planted
    for _ in range(100):
        optimiser.zero_grad()
        reinforce(policy(features), 32, share, 2, source).backward()
        optimiser.step()
    assert share(strongest(policy(features).detach(), 32)) >= 0.95


def test_both_forms_rank_by_one_direction() -> None:
    features = torch.randn(40, 12, generator=generator(), dtype=torch.float64)
    two = TwoLayerPolicy(12, 40, generator(1))
    layer = torch.nn.functional.linear(features, two.a, two.b)
    v, c = two.direction()
    torch.testing.assert_close(two(features).detach(), (layer @ two.r).detach())
    torch.testing.assert_close(two(features).detach(), features @ v + c, rtol=1e-6, atol=1e-6)
    one = LinearPolicy(12)
    assert not one(features).any()
    with torch.no_grad():
        one.v.copy_(v)
    direction, offset = one.direction()
    assert torch.equal(direction, v)
    assert float(offset) == 0


def test_features() -> None:
    weight = torch.randn(30, 6, generator=generator())
    features = row_features(weight, gain=2.0)
    norms = weight.double().norm(dim=1)
    torch.testing.assert_close(features[:, :6], 2 * weight.double() / norms.mean())
    assert float(features[:, 6].mean()) == pytest.approx(0, abs=1e-12)
    assert float(features[:, 6].square().mean()) == pytest.approx(1)
    assert torch.equal(features[:, 6].argsort(), norms.argsort())
    assert torch.equal(row_features(weight, gain=2.0, norm=False), features[:, :6])
    for same in (torch.zeros(5, 3), torch.ones(5, 3)):  # no norms to tell apart
        assert torch.isfinite(row_features(same)).all()
        assert float(row_features(same)[:, 3].abs().max()) < 1e-3
    torch.testing.assert_close(row_features(1e-3 * weight), row_features(weight), rtol=1e-5, atol=1e-6)
