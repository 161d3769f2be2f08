"""Distances between networks and barriers between them, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from billhook.analysis.stability import apart, error_barrier, spread
from billhook.errors import BillhookError
from billhook.training.store import snapshot
from runs import accuracy, net


def test_a_network_is_not_apart_from_itself() -> None:
    state = {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(0)), "count": torch.tensor(3)}
    assert apart(state, state).l2 == 0
    assert apart(state, state).angle == 0
    assert apart(state, {**state, "w": -state["w"]}).angle == pytest.approx(180)
    assert math.isnan(apart(state, {**state, "w": torch.zeros(50, 40)}).angle)


def test_against_numbers() -> None:
    one, two = (
        {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)},
        {"a": torch.tensor([1.0, 1.0]), "b": torch.zeros(2)},
    )
    assert apart(one, two).l2 == pytest.approx(1)
    assert apart(one, two).angle == pytest.approx(45)
    masks = {"a": torch.tensor([True, False])}
    assert apart(one, two, masks).l2 == 0
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2))
    found = apart({"w": a}, {"w": b})
    assert found.angle == pytest.approx(math.degrees(math.acos(float(a @ b / a.norm() / b.norm()))), rel=1e-9)
    near = apart({"w": a}, {"w": a + 1e-6 * b})
    assert 0 < near.angle < 1e-3


def test_other_networks_are_refused() -> None:
    with pytest.raises(BillhookError, match="both have w"):
        apart({"w": torch.ones(2)}, {"w": torch.ones(3)})
    with pytest.raises(BillhookError, match="both have w"):
        apart({"w": torch.ones(2)}, {})


def test_spread() -> None:
    states = [{"w": torch.tensor([float(v), 0.0])} for v in (1, 2, 4)]
    assert spread(states)["l2"] == {"least": 1, "mean": 2, "largest": 3}
    assert spread(states[:1]) == {}


class TestBarrier:
    def test_there_is_none_from_a_network_to_itself(self) -> None:
        model = net()
        state = {n: t.clone() for n, t in snapshot(model).items()}
        barrier = error_barrier(model, state, state, accuracy)
        assert abs(barrier.height) < 1e-7
        assert len(barrier.at) == 30
        assert (barrier.at[0], barrier.at[-1]) == (0, 1)

    def test_against_a_known_line(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        one, two = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[3.0]])}
        before = model.weight.detach().clone()
        seen: list[float] = []

        def evaluate(m: nn.Module) -> float:
            assert not m.training
            seen.append(float(m.get_parameter("weight")))
            return (seen[-1] - 1) ** 2  # worst in the middle

        barrier = error_barrier(model.train(), one, two, evaluate, points=5)
        assert seen == [-1, 0, 1, 2, 3]
        assert barrier.height == 4
        assert torch.equal(model.weight, before)
        assert model.training

    def test_norms_are_interpolated_or_settled(self) -> None:
        model = net()
        one = {n: t.clone() for n, t in snapshot(model).items()}
        two = {n: t + 1 for n, t in one.items()}
        means: list[float] = []
        error_barrier(
            model, one, two, lambda m: means.append(float(m.get_buffer("1.running_mean")[0])) or 0.0, points=3
        )
        assert means == [0, 0.5, 1]
        settled: list[nn.Module] = []
        error_barrier(model, one, two, accuracy, points=2, settle=settled.append)
        assert settled == [model, model]
        assert all(torch.equal(t, one[n]) for n, t in snapshot(model).items())

    def test_refusals(self) -> None:
        model = net()
        state = dict(snapshot(model))
        with pytest.raises(BillhookError, match="two ends"):
            error_barrier(model, state, state, accuracy, points=1)
        with pytest.raises(BillhookError, match=r"0\.weight in one shape"):
            error_barrier(model, state, {**state, "0.weight": torch.ones(2)}, accuracy)
