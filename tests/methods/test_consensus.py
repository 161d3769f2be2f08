"""Consensus gates in a training loop, and the network that is left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.methods import Gates
from billhook.training.gateable import count_flops
from billhook.training.gating import share_of
from cnns import NETS, BasicNet, build, inputs
from tiny import batches_for
from tiny import build as transformer


def sgd(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def attach(model: nn.Module, example: Any, steps: int = 10, **options: Any) -> Gates:
    return bh.ConsensusGates(**options).attach(model, sgd(model), steps, example)


def decide(gates: Gates, opened: Sequence[Tensor]) -> None:
    """Make the gates unanimous."""
    with torch.no_grad():
        for gate, keep in zip(gates.gates, opened, strict=True):
            gate.w2.zero_()
            gate.b2.copy_(keep.float() * 10 - 5)


def halves(gates: Gates, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.rand(u.gates, generator=generator) < 0.5 for u in gates.units]
    for unit, keep in zip(gates.units, found, strict=True):
        if unit.one_stays:
            keep[0] = True
    return found


# equivalence


@pytest.mark.parametrize("units", ["block", "channel"])
def test_open_gates_change_nothing(units: Any) -> None:
    model, x = build("basic").train(), inputs("basic", batch=8)
    plain = copy.deepcopy(model)
    gates = attach(model, x[:1], units=units, lam_pol=0, lam_act=0, bias=10)
    expected, found = plain(x), model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (found.square().mean() + gates.loss()).backward()
    expected.square().mean().backward()
    for (name, mine), own in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("units", "name"),
    [
        *(("block", name) for name in ("basic", "bottleneck", "gated")),
        *(("channel", name) for name in ("vgg", "mlp", "basic", "bottleneck", "dense", "mobile", "gated")),
    ],
)
def test_the_static_network_is_the_gated_one(name: str, units: Any) -> None:
    model = nn.Sequential(nn.Identity(), build(name)) if name == "gated" else build(name)
    x = inputs(name, batch=6)
    gates = attach(model, x[:1], units=units, cost="flops")
    decide(gates, halves(gates, 3))
    before = model(x)
    report = gates.consensus([x])
    assert report.undecided == 0
    assert report.least == 1
    predicted = gates.flops()
    small = gates.finalize(force=True)
    torch.testing.assert_close(small(x), before, rtol=1e-5, atol=1e-5)
    assert count_flops(small, x[:1])[""] == predicted
    assert small is model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert {type(m).__module__.partition(".")[0] for m in small.modules()} <= {"torch", "cnns"}


def test_the_narrow_state_fits_a_fresh_narrow_network() -> None:
    model, x = build("basic"), inputs("basic", batch=6)
    gates = attach(model, x[:1])
    opened = halves(gates, 1)
    decide(gates, opened)
    gates.consensus([x])
    small = gates.finalize(force=True)
    one, _, _, two, _, _ = NETS["basic"].widths
    a, b, c, d = (int(keep.sum()) for keep in opened)
    fresh = BasicNet([one, a, b, two, c, d]).eval()
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in small.parameters())
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh(x), small(x))


def test_a_network_that_lost_a_block_fits_a_fresh_shallow_one() -> None:
    model, x = build("basic"), inputs("basic", batch=6)
    gates = attach(model, x[:1], units="block")
    decide(gates, [torch.tensor([True]), torch.tensor([False]), torch.tensor([False])])
    gates.consensus([x])
    small = gates.finalize(force=True)
    fresh: Any = BasicNet(NETS["basic"].widths).eval()
    fresh.layer1, fresh.layer2 = fresh.layer1[:1], fresh.layer2[:1]
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("units", ["block", "neuron", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "opt", "bert", "vit"])
def test_transformers(family: str, units: Any) -> None:
    model = transformer(family)
    (batch,) = batches_for(family, 1, size=3)
    gates = attach(model, batch, units=units, gate_input="first")
    decide(gates, halves(gates, 2))
    with torch.no_grad():
        before = model(batch).logits
        gates.consensus([batch])
        parameters = sum(p.numel() for p in model.parameters())
        predicted = gates.flops()
        small = gates.finalize(force=True)
        torch.testing.assert_close(small(batch).logits, before, rtol=1e-4, atol=1e-5)
    assert count_flops(small, batch)[""] == predicted
    assert sum(p.numel() for p in small.parameters()) < parameters
    assert not any("PooledGate" in type(m).__name__ for m in small.modules())


def test_padding_does_not_enter_the_decision() -> None:
    model = transformer("bert")
    (tokens,) = batches_for("bert", 1, size=2)
    gates = attach(model, tokens, units="neuron")
    for gate in gates.gates:
        nn.init.normal_(gate.w2, std=1)
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    found = []
    for filling in (tokens[:, 16:], tokens[:, 16:].flip(1)):
        x = torch.cat([tokens[:, :16], filling], 1)
        model(input_ids=x, attention_mask=mask)
        found.append([z.clone() for z in gates._hooks.seen if z is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model(input_ids=torch.cat([tokens[:, :16], tokens[:, 16:].flip(1)], 1), attention_mask=torch.ones_like(mask))
    unmasked = [z for z in gates._hooks.seen if z is not None]
    assert not all(torch.equal(a, b) for a, b in zip(found[0], unmasked, strict=True))


# training


def teacher(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def student(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(step: int, size: int = 64) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, gates: Gates, first: int, last: int, task: int = 0) -> None:
    target = teacher(task)
    for step in range(first, last):
        x = batch(step)
        with torch.no_grad():
            y = target(x)
        gates.optimizer.zero_grad()
        (F.mse_loss(model(x), y) + gates.loss()).backward()
        gates.optimizer.step()
        gates.step()


def trained(steps: int = 200, seed: int = 0, **options: Any) -> tuple[nn.Module, Gates]:
    model = student(seed)
    method = bh.ConsensusGates(**{"hidden": 8, "freeze": 0, **options})
    gates = method.attach(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps, batch(0)[:1])
    train(model, gates, 0, steps)
    return model, gates


CLEAN = [batch(10_000 + i) for i in range(16)]


@pytest.mark.parametrize("cost", ["gates", "flops"])
def test_the_loss_is_zero_on_target_and_pulls_from_both_sides(cost: Any) -> None:
    a, b = 4, 10  # open channels of 16 and 16
    share = {"gates": (a + b) / 32, "flops": (6 * a + a * b + 3 * b) / (6 * 16 + 16 * 16 + 3 * 16)}[cost]
    for off, sign in ((0.0, 0), (-0.2, 1), (0.2, -1)):
        model = student(0)
        gates = attach(model, batch(0)[:1], cost=cost, keep=share + off, lam_act=7, lam_pol=0, freeze=0)
        decide(gates, [torch.arange(16) < a, torch.arange(16) < b])
        model(batch(1))
        loss = gates.loss()
        assert loss.item() == pytest.approx(7 * off**2, rel=1e-5, abs=1e-12)
        loss.backward()
        for gate in gates.gates:
            slope = gate.b2.grad
            assert slope is not None
            # downhill closes gates where too much is open, those that are closed already too
            assert bool((slope * sign > 0).all()) if sign else float(slope.abs().max()) < 1e-9


def test_a_learned_mask_is_frozen_as_it_is() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1], steps=8, gate_input="none", freeze=0.5)
    train(model, gates, 0, 2)  # all open
    with torch.no_grad():
        for gate in gates.gates:
            gate.b2.copy_((torch.arange(16) < 5) * 2.0 - 1)
    train(model, gates, 2, 4)
    assert gates.frozen
    assert gates.opened is not None
    assert [int(o.sum()) for o in gates.opened] == [5, 5]  # one decision for all inputs: nothing to average


@pytest.mark.parametrize("cost", ["gates", "flops"])
def test_the_budget_is_met(cost: Any) -> None:
    _, gates = trained(cost=cost)
    report = gates.consensus(CLEAN)
    assert abs(report.share - 0.5) <= 0.05
    gates.finalize()


@pytest.mark.parametrize("cost", ["gates", "flops"])
@pytest.mark.parametrize("keep", [0.3, 0.77])
def test_repair_meets_the_budget_within_one_unit(cost: Any, keep: float) -> None:
    _, gates = trained(steps=20, cost=cost, keep=keep, repair=True)
    report = gates.consensus(CLEAN)
    sizes = [unit.gates for unit in gates.units]
    ranks = list(report.means.values())
    for rank in ranks:
        rank[rank.argmax()] += 2  # one of each layer stays anyway
    order = torch.cat(ranks).argsort(descending=True, stable=True)
    distances = []
    for count in range(2, len(order) + 1):
        flat = torch.zeros(len(order), dtype=torch.float64)
        flat[order[:count]] = 1
        distances.append(abs(float(share_of(gates.costs, flat.split(sizes))) - keep))
    assert abs(report.share - keep) == pytest.approx(min(distances), abs=1e-12)
    assert abs(report.share - keep) <= {"gates": 1 / 32, "flops": (6 + 16) / (6 * 16 + 16 * 16 + 16 * 3)}[cost]
    assert gates.finalize()(batch(1)).shape == (64, 3)


def test_polarisation_makes_inputs_agree() -> None:
    shares = []
    for weight in (0.0, 2.0):
        _, gates = trained(lam_pol=weight)
        shares.append(gates.consensus(CLEAN).undecided)
    assert shares[1] < shares[0]
    assert shares[0] > 0.1
    assert shares[1] < shares[0] / 2


class Half(nn.Module):
    """x + F(x), where F sees some of the channels and writes the last one."""

    def __init__(self, sees: slice) -> None:
        super().__init__()
        self.sees = sees
        self.one, self.two = nn.Linear(4, 16), nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x[:, self.sees])))


@pytest.mark.parametrize("seed", range(5))
def test_the_block_that_matters_stays(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Identity(), Half(slice(0, 4)), Half(slice(4, 8)), nn.Linear(9, 1))
    generator = torch.Generator().manual_seed(seed)

    def data() -> tuple[Tensor, Tensor]:  # the last channel is empty; the second block sees noise
        x = torch.randn(64, 9, generator=generator)
        return torch.cat([x[:, :8], torch.zeros(64, 1)], 1), (x[:, :1] * x[:, 1:2]).abs()

    method = bh.ConsensusGates(units="block", hidden=8)
    gates = method.attach(model, torch.optim.Adam(model.parameters(), lr=2e-2), 150, data()[0][:1])
    for _ in range(150):
        x, y = data()
        gates.optimizer.zero_grad()
        (F.mse_loss(model(x), y) + gates.loss()).backward()
        gates.optimizer.step()
        gates.step()
    report = gates.consensus([data()[0] for _ in range(8)])
    assert [bool(o) for o in report.opened.values()] == [True, False]
    assert report.undecided == 0
    kept = model[1]
    assert list(gates.finalize(force=True))[1] is kept  # type: ignore[call-overload]
    assert len(model) == 3


def test_the_end_of_the_training_is_static() -> None:
    model, gates = trained(steps=40, freeze=0.25)
    assert gates.frozen
    assert gates.loss().item() == 0
    x = batch(3)
    before, opened = [p.clone() for p in gates.gates.parameters()], copy.deepcopy(gates.opened)
    gates.taken -= 1
    train(model, gates, 39, 40)
    assert all(torch.equal(a, b) for a, b in zip(before, gates.gates.parameters(), strict=True))
    assert opened is not None
    report = gates.consensus(CLEAN)  # of the gates' own decisions; what stays does not change
    assert all(torch.equal(a, b) for a, b in zip(opened, report.opened.values(), strict=True))
    expected = model(x)
    torch.testing.assert_close(gates.finalize(force=True)(x), expected, rtol=1e-5, atol=1e-5)


def test_the_polarisation_ramps() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1], steps=100, lam_pol=4, ramp=0.5, lam_act=0, freeze=0)
    found = []
    for taken in (0, 25, 50, 90):
        gates.taken = taken
        model(batch(1))
        half = torch.tensor([1.0, 0.0]).repeat(32)[:, None]
        gates._hooks.decisions = [half.expand(-1, u.gates) for u in gates.units]
        found.append(gates.loss().item())
    assert found == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("cut", [15, 36])
def test_resume_gives_the_same_bits(cut: int) -> None:
    def make(seed: int) -> tuple[nn.Module, Gates]:
        model = build("vgg", seed).train()
        return model, attach(model, inputs("vgg", 1), steps=40, hidden=4, freeze=0.2, bias=0.01, draw=seed)

    def go(model: nn.Module, gates: Gates, first: int, last: int) -> None:
        for step in range(first, last):
            gates.optimizer.zero_grad()
            x = inputs("vgg", 16, step)
            (F.cross_entropy(model(x), x[:, :1].flatten(1).argmax(1) % 5) + gates.loss()).backward()
            gates.optimizer.step()
            gates.step()

    whole, gates = make(0)
    go(whole, gates, 0, cut)
    saved = copy.deepcopy((whole.state_dict(), gates.optimizer.state_dict(), gates.state_dict()))
    go(whole, gates, cut, 40)

    again = build("vgg", 7).train()
    resumed = attach(again, inputs("vgg", 1), steps=40, hidden=4, freeze=0.2, bias=0.01)
    again.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    go(again, resumed, cut, 40)
    for (name, first), second in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second), name
    assert all(torch.equal(a, b) for a, b in zip(gates.gates.parameters(), resumed.gates.parameters(), strict=True))
    mine, others = gates.state_dict(), resumed.state_dict()
    for key in ("running", "opened"):
        assert all(torch.equal(a, b) for a, b in zip(mine[key], others[key], strict=True)), key
    left, other = gates.finalize(force=True).state_dict(), resumed.finalize(force=True).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in left.items())


def test_a_learned_mask_is_the_control() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1], steps=5, gate_input="none", freeze=0)
    assert {p.ndim for p in gates.gates.parameters()} == {1}
    train(model, gates, 0, 5)
    report = gates.consensus(CLEAN)
    assert report.least == 1


def test_gates_have_no_weight_decay_and_the_learning_rate() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1])
    first, own = gates.optimizer.param_groups
    assert (own["weight_decay"], own["lr"]) == (0, first["lr"])
    gates.consensus(CLEAN)
    gates.finalize(force=True)
    assert gates.optimizer.param_groups == [first]


def test_a_stop_gradient_leaves_features_alone() -> None:
    for stop in (False, True):
        model = student(0)
        gates = attach(model, batch(0)[:1], stop_gradient=stop, keep=0.3)
        for gate in gates.gates:
            nn.init.normal_(gate.w2, std=1)
        model(batch(1))
        gates.loss().backward()
        gradient = model[0].weight.grad
        assert (gradient is None or not bool(gradient.any())) == stop


def test_a_unit_whose_gates_are_all_closed_keeps_its_best() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1])
    closed = [torch.zeros(16, dtype=torch.bool), torch.ones(16, dtype=torch.bool)]
    decide(gates, closed)
    report = gates.consensus(CLEAN)
    assert report.guarded == ["0"]
    assert [int(o.sum()) for o in report.opened.values()] == [1, 16]
    assert gates.finalize(force=True)(batch(1)).shape == (64, 3)


# mistakes


def test_mistakes_are_said() -> None:
    model = student(0)
    gates = attach(model, batch(0)[:1], steps=1)
    with pytest.raises(BillhookError, match=r"The gates of 0 have decided nothing since the last loss: run the model"):
        gates.loss()
    model(batch(0))
    gates.loss()
    with pytest.raises(BillhookError, match="decided nothing since the last loss"):
        gates.loss()
    with torch.no_grad():
        model(batch(0))
    with pytest.raises(BillhookError, match="decided nothing since the last loss"):
        gates.loss()
    model(batch(0)[:1])
    with pytest.raises(BillhookError, match="A batch of one input always agrees with itself"):
        gates.loss()
    with pytest.raises(BillhookError, match=r"There is no consensus yet: call gates\.consensus\(loader\)"):
        gates.finalize()
    with pytest.raises(BillhookError, match="no batch to read the consensus from"):
        gates.consensus([])
    with pytest.raises(BillhookError, match="carries gates already"):
        attach(model, batch(0)[:1])
    gates.step()
    with pytest.raises(BillhookError, match="attached for 1 steps"):
        gates.step()
    gates.consensus(CLEAN)
    with pytest.raises(BillhookError, match=r"stay cost 100\.0% and keep=0\.5 was asked for: train longer"):
        gates.finalize()
    gates.finalize(force=True)
    with pytest.raises(BillhookError, match="have been finalized"):
        gates.loss()


def test_what_cannot_be_gated_is_said() -> None:
    with pytest.raises(BillhookError, match="units=channel has nothing to gate"):
        attach(nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 4))
    with pytest.raises(BillhookError, match="units=block has nothing to gate"):
        attach(student(0), batch(0)[:1], units="block")
    with pytest.raises(BillhookError, match=r"Gating consensus: keep=0 is not possible"):
        bh.ConsensusGates(keep=0)
    model = student(0)
    optimizer = sgd(model)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    with pytest.raises(BillhookError, match="attach the gates first, then make the scheduler"):
        bh.ConsensusGates().attach(model, optimizer, 10, batch(0)[:1])
    with pytest.raises(BillhookError, match="predicts tokens"):
        attach(transformer("llama"), batches_for("llama", 1)[0], units="neuron")
    gates = attach(model, batch(0)[:1])
    with pytest.raises(BillhookError, match="resume with the settings"):
        gates.load_state_dict({**gates.state_dict(), "total_steps": 11})
    wide = build("mlp")
    with pytest.raises(BillhookError, match="of another model"):
        gates.load_state_dict(attach(wide, inputs("mlp", 1)).state_dict())
