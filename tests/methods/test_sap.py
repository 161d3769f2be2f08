"""SAP: amounts, scopes, the loop against lottery tickets, stops and resumption."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.analysis import pq_index
from billhook.methods.sap import _of_rows, _rows, keep_in_rows
from billhook.sparsity.pqi import least_kept
from billhook.training.prunable import prunable
from billhook.training.runs import Outcome
from billhook.training.stretch import Stretch

SCOPES = ["neuron", "layer", "global"]
STEPS = 12


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    conv, wide, last = nn.Conv2d(1, 4, 3), nn.Linear(4 * 16, 20), nn.Linear(20, 4)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), wide, nn.ReLU(), last)


def batch(step: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(32, 1, 6, 6, generator=generator)
    return x, x.flatten(1)[:, [0, 7, 14, 21]].argmax(1)


def train(model: nn.Module, stretch: Stretch) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(*stretch.steps(STEPS)):
        x, y = batch(step, stretch.seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    x, y = batch(0, 99)
    return float((model(x).argmax(1) == y).float().mean())


def masks_by_level(method: Any, model: nn.Module) -> list[dict[str, Tensor]]:
    """The mask of every training, as seen by the training function."""
    seen: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, stretch: Stretch) -> None:
        seen.append({n: w.detach() != 0 for n, w in prunable(model).items()})
        train(model, stretch)

    method.run(model, watched)
    return seen


def trained(seed: int = 0) -> tuple[nn.Sequential, dict[str, nn.Parameter], dict[str, Tensor]]:
    model = net(seed)
    train(model, Stretch())
    weights = prunable(model)
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(w.shape, generator=generator) < 0.8 for n, w in weights.items()}
    with torch.no_grad():
        for n, w in weights.items():
            w.mul_(masks[n])
    return model, weights, masks


def units(scope: str, weights: Any, masks: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Active magnitudes of every unit, and where they are in the flat network."""
    size = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    there = torch.cat([m.flatten() for m in masks.values()])
    owner = []
    for number, w in enumerate(weights.values()):
        row = torch.arange(len(w)).repeat_interleave(w[0].numel())
        owner.append({"global": 0 * row, "layer": 0 * row + number, "neuron": row + 1000 * number}[scope])
    owner = torch.cat(owner)
    found = [((owner == unit) & there).nonzero().flatten() for unit in owner.unique()]
    return [(size[places], places) for places in found]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("p", "q", "eta", "gamma"), [(0.5, 1, 0, 1), (1, 2, 0, 1.2), (0.5, 1, 0.1, 3), (1, 2, 0, 50)])
def test_against_a_plain_loop(scope: str, p: float, q: float, eta: float, gamma: float) -> None:
    """Amount and choice of every unit, from the definition, in float64 and by sorting."""
    model, weights, masks = trained()
    method = bh.SAP(scope=scope, p=p, q=q, eta=eta, gamma=gamma)
    got = torch.cat([m.flatten() for m in method.fewer(model, weights, masks).values()])
    expected = torch.cat([m.flatten() for m in masks.values()])
    for size, places in units(scope, weights, masks):
        w, d = size.double(), len(size)
        ratio = float(w.pow(p).mean() ** (1 / p) / w.pow(q).mean() ** (1 / q))
        bound = d * (1 + eta) ** (-q / (q - p)) * ratio ** (p * q / (q - p))
        count = math.floor(d * min(max(gamma * (1 - math.ceil(bound) / d), 0), 0.9) + 1e-6)
        expected[places[size.argsort()[:count]]] = False
    assert torch.equal(got, expected)


def test_no_and_all_the_aggressiveness() -> None:
    model, weights, masks = trained()
    for scope in SCOPES:
        same = bh.SAP(scope=scope, gamma=0).fewer(model, weights, masks)
        assert all(torch.equal(same[n], masks[n]) for n in masks)
        least = bh.SAP(scope=scope, gamma=1e9).fewer(model, weights, masks)
        flat = torch.cat([m.flatten() for m in least.values()])
        for size, places in units(scope, weights, masks):
            goes = math.ceil(round(float(least_kept(torch.tensor(len(size)), pq_index(size))), 6)) < len(size)
            assert int(flat[places].sum()) == len(size) - goes * math.floor(round(0.9 * len(size), 6))


def test_no_neuron_dies_however_often_it_is_pruned() -> None:
    model, weights, masks = trained()
    method = bh.SAP(scope="neuron", p=1, q=2, gamma=1e9)
    counts = [torch.cat([m.flatten(1).sum(1) for m in masks.values()])]
    while len(counts) < 2 or not torch.equal(counts[-1], counts[-2]):
        after = method.fewer(model, weights, masks)
        assert all(bool((masks[n] | ~after[n]).all()) for n in masks)
        masks = after
        counts.append(torch.cat([m.flatten(1).sum(1) for m in masks.values()]))
    assert int(counts[-1].sum()) < 0.15 * int(counts[0].sum())
    assert int(counts[-1].min()) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_larger_layer_matters_to_the_network_alone(scope: str) -> None:
    model, weights, masks = trained()
    method = bh.SAP(scope=scope)
    before = method.fewer(model, weights, masks)
    with torch.no_grad():
        weights["4.weight"].mul_(10)
    after = method.fewer(model, weights, masks)
    assert all(torch.equal(before[n], after[n]) for n in masks) == (scope != "global")


def test_rows_of_every_kind_of_layer() -> None:
    """Entries that share an output with a given one are exactly its row."""
    layers = {
        "linear": (nn.Linear(5, 7), torch.zeros(1, 5)),
        "conv": (nn.Conv2d(4, 6, 3, groups=2), torch.zeros(1, 4, 3, 3)),
        "conv1d": (Conv1D(7, 5), torch.zeros(1, 5)),
        "transposed": (nn.ConvTranspose2d(4, 6, 2), torch.zeros(1, 4, 1, 1)),
        "grouped": (nn.ConvTranspose1d(6, 4, 3, groups=2), torch.zeros(1, 6, 1)),
    }
    model = nn.ModuleDict({name: layer for name, (layer, _) in layers.items()})
    for name, (layer, x) in layers.items():
        weight = layer.weight
        channels = layer(x).shape[1]
        rows = _rows(model, f"{name}.weight", torch.arange(weight.numel()).view(weight.shape))
        assert len(rows) == channels
        for out in range(channels):
            layer.zero_grad()
            layer(x + 1)[:, out].sum().backward()
            assert sorted(weight.grad.flatten().nonzero().flatten().tolist()) == sorted(rows[out].tolist())
        assert torch.equal(
            _of_rows(model, f"{name}.weight", rows, weight.shape).flatten(), torch.arange(weight.numel())
        )


def test_rows_with_ties_lose_exact_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (50, 11), generator=generator).float()
    mask = torch.rand(50, 11, generator=generator) < 0.7
    remove = (torch.rand(50, generator=generator) * mask.sum(1)).long()
    kept = keep_in_rows(scores, mask, remove)
    assert torch.equal(kept & mask, kept)
    assert torch.equal(kept.sum(1), mask.sum(1) - remove)
    for row in range(50):
        dropped, left = scores[row][mask[row] & ~kept[row]], scores[row][kept[row]]
        assert not len(dropped) or not len(left) or float(dropped.max()) <= float(left.min())


@pytest.mark.parametrize("scope", SCOPES)
def test_the_loop(scope: str) -> None:
    """Survivors begin at the initialisation, biases and norms too; masks are nested; no row dies in neuron scope."""
    model = net()
    initial = copy.deepcopy(model.state_dict())
    seen: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, stretch: Stretch) -> None:
        assert (stretch.start, stretch.stop) == (0, 1)
        masks = {n: w.detach() != 0 for n, w in prunable(model).items()}
        for name, value in model.state_dict().items():
            assert torch.equal(value, initial[name] * masks[name] if name in masks else initial[name])
        seen.append(masks)
        train(model, stretch)

    outcome = bh.SAP(scope=scope, gamma=4, p=1, q=2, iterations=4).run(model, watched, evaluate=accuracy)
    assert len(seen) == 5 or (scope == "neuron" and len(seen) >= 3)  # small rows stop losing weights by themselves
    for before, after in pairwise(seen):
        assert all(bool((before[n] | ~after[n]).all()) for n in before)
        assert any(not torch.equal(before[n], after[n]) for n in before)
    if scope == "neuron":
        assert all(bool(m.flatten(1).any(1).all()) for m in seen[-1].values())
    assert all(torch.equal(m, seen[-1][n]) for n, m in outcome.masks.items())
    assert all(not bool(w.detach()[~outcome.masks[n]].any()) for n, w in prunable(model).items())
    levels = [part for part in outcome.report["parts"] if part["part"].startswith("level")]
    assert [part["left"] for part in levels] == [sum(int(m.sum()) for m in masks.values()) for masks in seen]
    assert all(part["score"] is not None for part in levels)
    weights = prunable(model)
    assert levels[-1]["inequality"]["network"] == pytest.approx(float(pq_index(weights, 1, 2, outcome.masks)))
    for name, weight in weights.items():
        alone = float(pq_index(weight.detach()[outcome.masks[name]], 1, 2))
        assert levels[-1]["inequality"]["layers"][name] == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_constant_fraction_is_a_lottery_ticket(scope: str) -> None:
    """IMP with k = 0 and the floor of a fifth has the same masks at every level."""

    class Floor(bh.IMPRewind):
        def counts(self, present: int, total: int) -> list[int]:
            left = [present]
            for _ in range(4):
                left.append(left[-1] - math.floor(round(0.2 * left[-1], 6)))
            return left

    ticket = masks_by_level(Floor(sparsity=0.9, scope=scope, rewind_to=0.0), net())
    constant = masks_by_level(bh.SAP(fraction=0.2, scope=scope, iterations=4), net())
    assert len(ticket) == len(constant) == 5
    for a, b in zip(ticket, constant, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sparsity_that_is_asked_for_is_hit(scope: str) -> None:
    model = net()
    total = sum(w.numel() for w in prunable(model).values())
    method = bh.SAP(scope=scope, sparsity=0.7, eta=0.1, iterations=20)
    outcome = method.run(model, train)
    assert sum(int(m.sum()) for m in outcome.masks.values()) == round(0.3 * total)
    assert len(outcome.report["parts"]) > 3  # in several steps
    assert not outcome.report["notes"]


def levels(outcome: Outcome) -> list[dict[str, Any]]:
    return [part for part in outcome.report["parts"] if part["part"].startswith("level")]


def test_stops() -> None:
    below = levels(bh.SAP(fraction=0.3, stop_density=0.5, iterations=9).run(net(), train))
    assert [1 - part["sparsity"] > 0.5 for part in below] == [True, True, False]

    still = bh.SAP(gamma=0).run(net(), train)
    assert len(levels(still)) == 1
    assert "no weight may go" in still.report["notes"][0]
    assert still.sparsity == 0

    short = bh.SAP(gamma=0.1, sparsity=0.9, iterations=1).run(net(), train)
    assert short.sparsity < 0.9
    assert "was not reached within 1 prunings" in short.report["notes"][0]

    free = levels(bh.SAP(fraction=0.7, iterations=5).run(net(), train))
    values = [part["inequality"]["network"] for part in free]
    rises = [value - min(values[: i + 1]) for i, value in enumerate(values)]
    threshold = max(rises) / 2
    assert threshold > 0
    stopped = bh.SAP(fraction=0.7, iterations=5, stop_on_rise=threshold).run(net(), train)
    first = next(i for i, rise in enumerate(rises) if rise > threshold)
    assert len(levels(stopped)) == first + 1
    assert "rose from" in stopped.report["notes"][0]


def test_rewinding_to_later() -> None:
    starts: list[tuple[float, float]] = []
    states: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, stretch: Stretch) -> None:
        starts.append((stretch.start, stretch.stop))
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        train(model, stretch)

    bh.SAP(fraction=0.5, iterations=2, rewind_to=0.25).run(net(), watched)
    assert starts == [(0, 0.25), *[(0.25, 1)] * 3]
    kept = states[-1]["6.weight"] != 0
    assert torch.equal(states[-1]["6.weight"][kept], states[1]["6.weight"][kept])
    assert not torch.equal(states[1]["6.weight"], states[0]["6.weight"])


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    method = bh.SAP(gamma=3, iterations=3, rewind_to=0.25)
    whole = method.run(net(), train, evaluate=accuracy)
    calls = 0

    def dying(model: nn.Module, stretch: Stretch) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        train(model, stretch)

    with pytest.raises(KeyboardInterrupt):
        method.run(net(), dying, evaluate=accuracy, out=tmp_path)
    for _ in range(2):  # the second time everything is there already
        again = method.run(net(), train, evaluate=accuracy, out=tmp_path)
        for (key, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
            assert "num_batches" in key or torch.equal(a, b), key
        for a, b in zip(levels(whole), levels(again), strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_zeros_are_absent_from_the_start() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[:, ::2] = 0
    outcome = bh.SAP(gamma=0).run(model, train)
    assert not bool(outcome.masks["4.weight"][:, ::2].any())
    with pytest.raises(bh.BillhookError, match="already"):
        bh.SAP(sparsity=0.2).run(model, train)


def test_mistakes_get_a_sentence() -> None:
    with pytest.raises(bh.BillhookError, match=r"Procedure sap: p=2 is not below q=1"):
        bh.SAP(p=2)
    with pytest.raises(bh.BillhookError, match=r"Procedure sap: beta=1"):
        bh.SAP(beta=1)
    with pytest.raises(bh.BillhookError, match="every weight is what it was"):
        bh.SAP().run(net(), lambda model, stretch: None)
