"""Sparse model soups and IMP: what the average is of, and that it is one."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.analysis.stability import apart, error_barrier
from billhook.errors import BillhookError
from billhook.surgery.batchnorm import recalibrate_norms
from billhook.training import Stretch, schedules
from billhook.training.norms import estimating, running_norms
from billhook.training.prunable import prunable
from billhook.training.store import restore, snapshot
from runs import RATE, STEPS, Training, accuracy, batch, data, net


@pytest.fixture(scope="module")
def dense() -> nn.Sequential:
    model = net().train()
    Training()(model, Stretch())
    return model


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    """The same without norms."""
    model = net(norm=False).train()
    Training()(model, Stretch())
    return model


def soup(model: nn.Module, training: Any = None, **options: Any) -> Any:
    given = {key: options.pop(key) for key in ("evaluate", "batches") if key in options}
    options = {"sparsity": 0.8, "phases": 2, "candidates": 3, **options}
    training = training or Training()
    return bh.SparseModelSoup(**options).run(copy.deepcopy(model), training, keep=True, **given)


def equal(one: Any, two: Any) -> bool:
    return all(torch.equal(one[n], two[n]) for n in one)


def test_one_candidate_is_imp_and_one_phase_is_prune_and_retrain(plain: nn.Module, dense: nn.Module) -> None:
    one = soup(plain, candidates=1, phases=1)
    assert equal(one.store.state("phase-1-candidate-0"), snapshot(one.model))
    by_hand = copy.deepcopy(plain)
    weights = prunable(by_hand)
    flat = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    threshold = flat.sort(descending=True).values[round(0.2 * flat.numel()) - 1]
    masks = {n: w.detach().abs() >= threshold for n, w in weights.items()}
    with bh.held(by_hand.train(), masks):
        Training()(by_hand, Stretch(length=0.3, rate=schedules.llr))
    assert equal(masks, one.masks)
    assert equal(snapshot(by_hand), snapshot(one.model))
    for model in (plain, dense):
        imp = bh.IMP(sparsity=0.8, phases=2).run(copy.deepcopy(model), Training())
        assert equal(snapshot(imp.model), snapshot(soup(model, candidates=1).model))


def test_support_and_counts(dense: nn.Module) -> None:
    result = soup(dense)
    weights = prunable(result.model)
    masks = [result.store.masks(f"phase-{i}", weights) for i in (1, 2)]
    assert [sum(int(m.sum()) for m in one.values()) for one in masks] == [round(0.2**0.5 * 368), round(0.2 * 368)]
    assert all(not bool((masks[1][n] & ~masks[0][n]).any()) for n in weights)
    for i in (1, 2):
        state = result.store.state(f"phase-{i}")
        assert all(not bool(state[n][~masks[i - 1][n]].any()) for n in weights)
    assert sum(int(w.count_nonzero()) for w in weights.values()) <= round(0.2 * 368)


def test_every_phase_keeps_the_same_share() -> None:
    for sparsity, phases in ((0.98, 3), (0.9, 3), (0.5, 1), (0.999, 7)):
        keep = (1 - sparsity) ** (1 / phases)
        shares = [1 - schedules.geometric(i, phases, sparsity) for i in range(phases + 1)]
        assert all(abs(after - keep * before) < 1e-12 for before, after in pairwise(shares))
        assert abs(shares[-1] - (1 - sparsity)) < 1e-12
        counts = bh.SparseModelSoup(sparsity=sparsity, phases=phases).counts(1_000_000, 1_000_000)
        assert counts == [round(keep**i * 1_000_000) for i in range(phases + 1)]


def test_every_phase_is_the_mean_and_goes_on_from_it(dense: nn.Module) -> None:
    begun: list[dict[str, torch.Tensor]] = []

    class Watched(Training):
        def __call__(self, model: nn.Module, stretch: Stretch) -> None:
            if stretch.rate is None or stretch.rate(0.5) > 0:  # not a re-estimation of norms
                begun.append({n: t.clone() for n, t in snapshot(model).items()})
            super().__call__(model, stretch)

    result = soup(dense, Watched())
    for i in (1, 2):
        merged = result.store.state(f"phase-{i}")
        candidates = [result.store.state(f"phase-{i}-candidate-{j}") for j in range(3)]
        for name, parameter in result.model.named_parameters():
            mean = torch.stack([c[name].double() for c in candidates]).mean(0)
            assert torch.allclose(merged[name].double(), mean, atol=1e-7), name
            assert merged[name].shape == parameter.shape
    first, masks = result.store.state("phase-1"), result.masks
    for state in begun[3:]:
        assert all(torch.equal(state[n], first[n] * masks[n] if n in masks else first[n]) for n in state)
    assert equal(snapshot(result.model), result.store.state("phase-2"))


def test_candidates_see_other_batches_at_the_same_rates(plain: nn.Module) -> None:
    training = Training()
    soup(plain, training, phases=1, seed=10)
    assert [s.seed for s in training.stretches] == [10, 11, 12]
    steps = round(0.3 * STEPS)
    for rates in training.rates:
        assert rates == [RATE * schedules.llr(i / steps) for i in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "first", "last"), [("ft", 0.01, 0.01), ("clr", 0.0, 0.02334), ("lrw", 0.1, 0.1), ("slr", 1.0, 0.1)]
)
def test_other_schedules(plain: nn.Module, schedule: Any, first: float, last: float) -> None:
    training = Training()
    bh.IMP(sparsity=0.8, phases=1, schedule=schedule).run(copy.deepcopy(plain), training)
    assert len(training.rates[0]) == round(0.3 * STEPS)
    assert training.rates[0][0] == pytest.approx(RATE * first)
    assert training.rates[0][-1] == pytest.approx(RATE * last, rel=1e-3)


def test_adaptive_restart_by_its_formula(plain: nn.Module) -> None:
    training = Training()
    result = bh.IMP(sparsity=0.8, phases=1, schedule="allr").run(copy.deepcopy(plain), training)
    whole = sum(float(p.detach().double().square().sum()) for p in plain.parameters())
    removed = sum(float(plain.get_parameter(n).detach()[~m].double().square().sum()) for n, m in result.masks.items())
    peak = min(max((removed / whole) ** 0.5 / (1 - 74 / 368) ** 0.5, 0.3), 1.0)
    assert 0.3 < peak < 1
    steps = round(0.3 * STEPS)
    assert training.rates[0] == pytest.approx([RATE * peak * schedules.llr(i / steps) for i in range(steps)])


def test_what_else_may_vary(plain: nn.Module) -> None:
    training = Training()
    soup(plain, training, phases=1, vary="length", values=[0.5, 1.0, 2.0])
    assert [len(r) for r in training.rates] == [round(0.3 * f * STEPS) for f in (0.5, 1.0, 2.0)]
    assert {s.seed for s in training.stretches} == {0}
    training = Training()
    soup(plain, training, phases=1, vary="peak", values=[0.5, 1.0, 2.0])
    assert [a / b for a, b in zip(training.rates[2][1:], training.rates[0][1:], strict=True)] == pytest.approx(
        [4.0] * 14
    )


def test_imp_with_the_same_work(plain: nn.Module) -> None:
    training = Training()
    bh.IMP(sparsity=0.8, phases=2, fold=3).run(copy.deepcopy(plain), training)
    assert [len(r) for r in training.rates] == [round(0.9 * STEPS)] * 2


def test_phases_by_sparsity(plain: nn.Module) -> None:
    for sparsity, phases in ((0.89, 1), (0.9, 3)):
        training = Training()
        bh.IMP(sparsity=sparsity).run(copy.deepcopy(plain), training)
        assert len(training.stretches) == phases


def test_greedy_is_not_below_the_best_candidate(dense: nn.Module, plain: nn.Module) -> None:
    for model in (dense, plain):
        result = soup(model, merge="greedy", evaluate=accuracy, phases=1)
        record = result.report["parts"][-1]
        assert record["score"] >= max(record["candidate_scores"]) == record["best_candidate"]
        assert record["score"] == accuracy(result.model.eval())
        chosen = [result.store.state(f"phase-1-candidate-{j}") for j in record["chosen"]]
        for name, _ in result.model.named_parameters():
            mean = torch.stack([c[name].double() for c in chosen]).mean(0)
            assert torch.allclose(snapshot(result.model)[name].double(), mean, atol=1e-7)
    with pytest.raises(BillhookError, match="merge=greedy chooses by score: give evaluate"):
        soup(plain, merge="greedy")


def test_the_report_says_how_the_soup_compares(plain: nn.Module) -> None:
    result = soup(plain, evaluate=accuracy, phases=1)
    record = result.report["parts"][-1]
    states = [result.store.state(f"phase-1-candidate-{j}") for j in range(3)]
    assert record["mean_candidate"] == pytest.approx(sum(record["candidate_scores"]) / 3)
    pairs = [apart(states[a], states[b], result.masks).l2 for a, b in ((0, 1), (0, 2), (1, 2))]
    assert record["apart"]["l2"] == pytest.approx({"least": min(pairs), "mean": sum(pairs) / 3, "largest": max(pairs)})
    assert record["from_soup"] == pytest.approx([apart(snapshot(result.model), s, result.masks).l2 for s in states])


def test_a_soup_below_its_candidates_is_said(plain: nn.Module) -> None:
    scores = iter([0.9, 0.9, 0.9, 0.2])
    result = soup(plain, evaluate=lambda model: next(scores), phases=1)
    assert any("left their common basin" in note for note in result.report["notes"])


def test_equal_candidates_are_refused(plain: nn.Module) -> None:
    def deaf(model: nn.Module, stretch: Stretch) -> None:
        Training()(model, Stretch(stretch.start, stretch.stop, stretch.length, 0, stretch.rate))

    with pytest.raises(BillhookError, match=r"Retrainings 0 and 1 ended in the same weights.*follow stretch\.seed"):
        soup(plain, deaf)


class TestNorms:
    def test_statistics_are_those_of_the_batches(self, dense: nn.Sequential) -> None:
        batches = [batch(i, 77)[0] for i in range(6)]
        result = soup(dense, batches=batches)
        first, norm = result.model[0], result.model[1]
        inputs = [first(x) for x in batches]
        assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), atol=1e-5)
        assert torch.allclose(norm.running_var, torch.stack([x.var(0) for x in inputs]).mean(0), atol=1e-5)
        assert norm.momentum == 0.1

    def test_without_batches_the_training_function_gives_them(self, dense: nn.Sequential) -> None:
        training = Training()
        result = soup(dense, training, candidates=2, phases=1, recalibrate=0.4)
        first, norm = result.model[0], result.model[1]
        steps = round(0.4 * round(0.3 * STEPS))
        assert [len(r) for r in training.rates] == [15, steps, 15, steps, steps]
        assert set(training.rates[-1]) == {0.0}
        inputs = [first(batch(i, 0)[0]) for i in range(steps)]
        assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), atol=1e-5)
        assert norm.momentum == 0.1

    def test_twice_is_once_and_nothing_without_norms(self, dense: nn.Sequential, plain: nn.Sequential) -> None:
        parts = data(64, 5)[0].split(16)

        def by_training(model: nn.Module) -> None:
            with estimating(model.train()):
                for part in parts:
                    model(part)

        for estimate in (by_training, lambda model: recalibrate_norms(model, parts)):
            model = copy.deepcopy(dense)
            estimate(model)
            once = {n: t.clone() for n, t in snapshot(model).items()}
            assert not torch.equal(once["1.running_mean"], snapshot(dense)["1.running_mean"])
            estimate(model)
            assert equal(once, snapshot(model))
        assert not running_norms(plain)
        model = copy.deepcopy(plain)
        by_training(model)
        assert equal(snapshot(plain), snapshot(model))
        training = Training()
        soup(plain, training, phases=1)
        assert len(training.stretches) == 3

    def test_statistics_are_averaged_like_weights_when_off(self, dense: nn.Sequential) -> None:
        training = Training()
        result = soup(dense, training, phases=1, recalibrate=0.0)
        assert len(training.stretches) == 3
        states = [result.store.state(f"phase-1-candidate-{j}")["1.running_mean"] for j in range(3)]
        assert torch.allclose(result.model[1].running_mean, torch.stack(states).mean(0), atol=1e-6)

    def test_a_training_without_rates_is_refused(self, dense: nn.Sequential) -> None:
        def fixed(model: nn.Module, stretch: Stretch) -> None:
            Training()(model, Stretch(stretch.start, stretch.stop, stretch.length, stretch.seed))

        with pytest.raises(BillhookError, match=r"learning rate of 0.*follow stretch\.rate, or give batches"):
            soup(dense, fixed)
        assert soup(dense, fixed, batches=[batch(0, 0)[0]]).sparsity > 0.7

    def test_no_batch(self, dense: nn.Sequential) -> None:
        with pytest.raises(BillhookError, match=r"No batch reached 1 .*raise `recalibrate`"):
            soup(dense, recalibrate=0.01)
        with pytest.raises(BillhookError, match="needed again after every retraining"):
            soup(dense, batches=iter([batch(0, 0)[0]]))


def test_candidates_share_a_basin_and_strangers_do_not() -> None:
    """Needs a problem with barriers: a network of random labels has them, and is learnt by heart."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 10, generator=generator)
    y = torch.randint(0, 2, (120,), generator=generator)

    def train(model: nn.Module, stretch: Stretch) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        order = torch.Generator().manual_seed(stretch.seed)
        total = round(500 * stretch.length)
        for step in range(*stretch.steps(total)):
            optimizer.param_groups[0]["lr"] = 0.1 * (stretch.rate or schedules.llr)(step / total)
            rows = torch.randint(0, 120, (30,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 2))

    def learnt(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).float().mean())

    candidates = []
    for seed in (0, 1):
        model = fresh(seed)
        train(model, Stretch(seed=seed))
        result = bh.SparseModelSoup(sparsity=0.4, candidates=2, length=0.2).run(
            model, train, evaluate=learnt, keep=True
        )
        candidates.append([result.store.state(f"phase-1-candidate-{j}") for j in range(2)])
    siblings = error_barrier(model, *candidates[0], learnt)
    strangers = error_barrier(model, candidates[0][0], candidates[1][0], learnt)
    assert siblings.scores[0] > 0.9
    assert siblings.height < 0.01
    assert strangers.height > 0.15


def test_the_result_is_in_place(plain: nn.Module) -> None:
    model = copy.deepcopy(plain).eval()
    weight = model.get_parameter("0.weight")
    result = bh.SparseModelSoup(sparsity=0.8, candidates=2, phases=1).run(model, Training())
    assert result.model is model
    assert model.get_parameter("0.weight") is weight
    assert not model.training
    other = net(norm=False)
    restore(other, result.store.state("phase-1"))
    assert equal(snapshot(other), snapshot(model))
