"""Gates alone: decisions, pools, losses, and what can carry gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.training.gateable import count_flops, find_units
from billhook.training.gating import (
    Cost,
    Factor,
    Hooks,
    PooledGate,
    binarise,
    budget,
    polarisation,
    pooled,
    share_of,
)
from cnns import BasicBlock, build, inputs


def test_decisions_are_binary_and_straight_through() -> None:
    a = torch.tensor([-3.0, -0.5, -1e-4, 0.0, 1e-3, 2.0], requires_grad=True)
    p = torch.sigmoid(a)
    z = binarise(p)
    assert z.tolist() == [0, 0, 0, 1, 1, 1]
    (slope,) = torch.autograd.grad(z.sum(), a, retain_graph=True)
    torch.testing.assert_close(slope, (p * (1 - p)).detach(), rtol=0, atol=1e-7)
    (scaled,) = torch.autograd.grad((z * 7).sum(), a)
    torch.testing.assert_close(scaled, 7 * slope, rtol=1e-6, atol=0)


def test_a_gate_is_its_formula_and_starts_open() -> None:
    gate = PooledGate(12, 5, None, 1.0, torch.Generator().manual_seed(0))
    assert gate.w1.shape == (8, 12)  # max(8, 12 / 4)
    v = torch.randn(6, 12)
    assert bool((gate(v) == 1).all())
    with torch.no_grad():
        gate.w2.normal_(std=3)
    a = torch.relu(v.double() @ gate.w1.double().T + gate.b1.double()) @ gate.w2.double().T + gate.b2.double()
    assert torch.equal(gate(v) == 1, a >= 0)
    assert 0 < float(gate(v).detach().mean()) < 1


def test_pools() -> None:
    x = torch.randn(3, 5, 4, 2)
    torch.testing.assert_close(pooled(x, 1), x.mean((2, 3)))
    tokens, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    expected = torch.stack([tokens[0, :3].mean(0), tokens[1, 2:].mean(0)])
    torch.testing.assert_close(pooled(tokens, -1, "mean", mask), expected)
    torch.testing.assert_close(pooled(tokens, -1, "first", mask), torch.stack([tokens[0, 0], tokens[1, 2]]))
    torch.testing.assert_close(pooled(tokens, -1, "first"), tokens[:, 0])
    torch.testing.assert_close(pooled(tokens[:, 0], -1), tokens[:, 0])


# losses


@pytest.mark.parametrize(
    "z",
    [torch.zeros(6, 4), torch.ones(6, 4), torch.tensor([[1.0, 0, 1, 0]]).expand(6, -1)],
    ids=["closed", "open", "mixed"],
)
def test_unanimous_gates_are_not_punished(z: Tensor) -> None:
    assert polarisation([z.mean(0)]).item() == 0


def test_polarisation_is_the_variance_over_inputs() -> None:
    half = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert polarisation([half.mean(0)]).item() == 0.25
    z = (torch.rand(16, 9) < 0.4).float()
    value = polarisation([z[:, :4].mean(0), z[:, 4:].mean(0)])
    torch.testing.assert_close(value, z.var(0, unbiased=False).mean())
    torch.testing.assert_close(value, polarisation([z[torch.randperm(16)].mean(0)]))


def test_gradient_of_polarisation_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    polarisation([z.mean(0)]).backward()  # B = 4, |G| = 2, m = (3/4, 1/2)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.tensor([[-1 / 16, 0.0]]).expand(4, -1))


def test_budget_is_zero_at_its_target_and_pulls_from_both_sides() -> None:
    costs = [Cost(4.0, (Factor(0.0, ((0, 0.25),)),)), Cost(12.0, (Factor(0.0, ((1, 0.5),)),))]
    on_target = [torch.ones(4), torch.tensor([1.0, 1 / 3])]  # (4 + 12 * 2/3) / 16 = 3/4
    assert budget(share_of(costs, on_target), 0.75).item() == pytest.approx(0, abs=1e-12)
    for target, sign in ((0.6, 1), (0.9, -1)):
        means = [m.clone().requires_grad_() for m in on_target]
        budget(share_of(costs, means), target).backward()
        for mean in means:
            assert mean.grad is not None
            assert bool((mean.grad * sign > 0).all())


# what can carry gates


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg", ["0", "3", "7", "12"]),
        ("mlp", ["layers.0", "layers.1"]),
        ("basic", ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"]),
        ("bottleneck", ["stem.0", "one.conv1", "one.conv2", "two.conv1", "two.conv2"]),
        ("padded", ["conv1"]),
        ("dense", ["stem", "conv1", "conv2", "transition"]),
        ("mobile", ["expand", "head"]),
        ("grouped", ["a", "b", "c"]),
        ("gated", ["gate"]),
    ],
)
def test_hidden_channels_are_found_and_residual_streams_are_not(name: str, expected: list[str]) -> None:
    assert sorted(u.name for u in find_units("channel", build(name), inputs(name)).units) == sorted(expected)


def test_residual_blocks_of_constant_shape_are_found() -> None:
    found = find_units("block", build("basic"), inputs("basic"))
    assert [(u.name, u.channels, u.places[0].module) for u in found.units] == [
        ("layer1.0", 4, "layer1.0.bn2"),
        ("layer1.1", 4, "layer1.1.bn2"),
        ("layer2.1", 6, "layer2.1.bn2"),
    ]


def drive(model: nn.Module, found: Any, decisions: list[Tensor]) -> Hooks:
    """Constant decisions at work in a model."""
    hooks = Hooks(
        model, found.units, [PooledGate(None, u.gates, None, 1, torch.Generator()) for u in found.units], "none"
    )
    hooks.static = [d.float() for d in decisions]
    return hooks


def some(gates: int, seed: int) -> Tensor:
    """About half of the gates, at least one."""
    keep = torch.rand(gates, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[seed % gates] = True
    return keep


@pytest.mark.parametrize("name", ["vgg", "mlp", "basic", "bottleneck", "padded", "dense", "mobile", "grouped", "gated"])
@pytest.mark.parametrize("seed", range(3))
def test_closed_channels_are_absent_channels(name: str, seed: int) -> None:
    model, x = build(name, seed), inputs(name, batch=4)
    found = find_units("channel", model, x)
    decisions = [some(u.gates, seed + i) for i, u in enumerate(found.units)]
    hooks = drive(model, found, decisions)
    gated = model(x)
    hooks.remove()
    share = float(share_of(found.costs, [d.double() for d in decisions]))
    predicted = found.flops - (1 - share) * sum(c.whole for c in found.costs)
    found.remove(decisions)
    torch.testing.assert_close(model(x), gated, rtol=1e-5, atol=1e-5)
    # the counter's own figure for the narrow network, exactly
    assert round(predicted) == count_flops(model, x)[""]
    assert predicted == pytest.approx(round(predicted), rel=1e-12)


def test_a_closed_channel_is_zero_even_behind_a_shift() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU())
    with torch.no_grad():
        model[1].bias.fill_(1)  # type: ignore[union-attr]
    x = torch.randn(5, 2, 7, 7)
    found = find_units("channel", model, x[:1])
    seen: list[Tensor] = []
    hooks = drive(model, found, [torch.tensor([True, False, True])])
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(x)
    assert bool((seen[0][:, 1] == 0).all())
    assert bool((seen[0][:, [0, 2]] != 0).any())
    hooks.remove()


def test_a_closed_block_is_the_identity() -> None:
    model, x = build("basic"), inputs("basic")
    found = find_units("block", model, x)
    hooks = drive(model, found, [torch.tensor([True]), torch.tensor([False]), torch.tensor([False])])
    entered: dict[str, Tensor] = {}
    for name in ("layer1.1", "layer2.1"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: entered.update({name: (output - args[0]).detach().abs().max()})
        )
    gated = model(x)
    assert [float(v) for v in entered.values()] == [0, 0]
    hooks.remove()
    predicted = count_flops(model, x)[""] - sum(c.whole for c in found.costs[1:])
    found.remove([torch.tensor([True]), torch.tensor([False]), torch.tensor([False])])
    assert torch.equal(model(x), gated)
    assert [len(model.layer1), len(model.layer2)] == [1, 1]  # type: ignore[arg-type]
    assert count_flops(model, x)[""] == predicted


class Residual(nn.Module):
    """x + F(x) in several ways, some of which are not that."""

    def __init__(self, kind: str, width: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two = nn.Linear(width, 9), nn.Linear(9, width)
        self.act = nn.GELU() if kind == "gelu after" else nn.ReLU(inplace=kind == "in place")
        self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            return x + self.two(self.one(self.act(x)))
        y = self.two(torch.tanh(self.one(x)))
        if self.kind == "plain":
            return x + y
        if self.kind == "identity":
            return torch.add(y, self.skip(x))
        if self.kind in ("relu after", "gelu after"):
            return self.act(y + x)
        if self.kind == "twice":
            return x + y * y
        if self.kind == "doubled":
            return x + torch.add(x, y)
        return 2 * x + y


@pytest.mark.parametrize("kind", ["plain", "identity", "relu after", "gelu after"])
def test_kinds_of_residual_blocks(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Residual(kind), Residual(kind), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    found = find_units("block", model, x)
    assert [u.name for u in found.units] == ["1", "2"]
    decisions = [torch.tensor([False]), torch.tensor([False])]
    hooks = drive(model, found, decisions)
    gated = model(x)
    hooks.remove()
    found.remove(decisions)
    assert torch.equal(model(x), gated)
    # a ReLU behind a linear layer still does something, one behind another ReLU does not; a GELU always does
    left = {"plain": 2, "identity": 2, "relu after": 3, "gelu after": 4}[kind]
    assert len(model) == left
    assert not any(isinstance(m, Residual) for m in model.modules())


@pytest.mark.parametrize("kind", ["twice", "doubled", "scaled", "in place"])
def test_what_is_not_a_residual_block_carries_no_gate(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Residual(kind), nn.Linear(6, 2))
    with pytest.raises(BillhookError, match="no residual block"):
        find_units("block", model, torch.randn(3, 4))


def test_a_block_that_is_not_in_a_sequential_becomes_an_identity() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = nn.Linear(4, 6), nn.ModuleList([Residual("plain")] * 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.blocks[0](self.stem(x)))
            return out

    model, x = Net(), torch.randn(3, 4)
    find_units("block", model, x).remove([torch.tensor([False])])
    assert type(model.blocks[0]) is nn.Identity
    assert torch.equal(model(x), model.head(model.stem(x)))


def test_a_module_that_runs_twice_carries_no_gate() -> None:
    block = Residual("plain")
    model = nn.Sequential(nn.Linear(4, 6), block, block, nn.Linear(6, 2))
    with pytest.raises(BillhookError, match="no residual block"):
        find_units("block", model, torch.randn(3, 4))


def test_finding_leaves_the_model_as_it_is() -> None:
    model = build("basic").train()
    state = copy.deepcopy(model.state_dict())
    for kind in ("block", "channel"):
        find_units(kind, model, inputs("basic"))  # type: ignore[arg-type]
    assert all(m.training for m in model.modules())
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mistakes_are_said() -> None:
    with pytest.raises(BillhookError, match="Sequential has no channels that one layer makes and others read"):
        find_units("channel", nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4))
    with pytest.raises(BillhookError, match="does not run on the example"):
        find_units("block", build("basic"), torch.randn(1, 5, 8, 8))
    with pytest.raises(BillhookError, match="give the example as a tensor"):
        find_units("channel", Named(), {"x": torch.randn(1, 4)})
    with pytest.raises(BillhookError, match="has no config"):
        find_units("neuron", build("basic"), inputs("basic"))


class Named(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_basic_blocks_that_change_shape_carry_no_gate() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), BasicBlock(4, 3, 4, 2, True), BasicBlock(4, 3, 4, 1, False)
    ).eval()
    assert [u.name for u in find_units("block", model, torch.randn(1, 3, 8, 8)).units] == ["3"]
