"""IMP with rewinding: every item of what makes a ticket a ticket."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.methods.imp_rewind import reinitialize_, shuffled
from billhook.training import Stretch
from billhook.training.prunable import prunable
from billhook.training.runs import fewer
from billhook.training.store import restore, snapshot
from runs import RATE, STEPS, Training, accuracy, net, schedule


def ticket(**options: Any) -> Any:
    model, training = net(), options.pop("training", None) or Training()
    evaluate = options.pop("evaluate", None)
    options = {"sparsity": 0.8, "per_round": 0.3, "rewind_to": 0.1, **options}
    return bh.IMPRewind(**options).run(model, training, evaluate=evaluate, keep=True)


def equal(one: Any, two: Any) -> bool:
    return all(torch.equal(one[n], two[n]) for n in one)


def test_without_rounds_and_rewinding_it_is_plain_training() -> None:
    model, plain = net(), net()
    found = bh.IMPRewind(sparsity=0.0, rewind_to=0.0).run(model, Training())
    Training()(plain.train(), Stretch())
    assert equal(snapshot(plain), snapshot(model))
    assert found.sparsity == 0
    assert len(found.levels) == 1


@pytest.mark.parametrize("k", [0.0, 0.1])
def test_what_is_left_goes_back(k: float) -> None:
    begun: list[dict[str, torch.Tensor]] = []

    class Watched(Training):
        def __call__(self, model: nn.Module, stretch: Stretch) -> None:
            begun.append({n: t.clone() for n, t in snapshot(model).items()})
            super().__call__(model, stretch)

    found = ticket(rewind_to=k, training=Watched())
    reference = net().train()
    Training()(reference, Stretch(0.0, k)) if k else None
    point = snapshot(reference)
    for level, state in zip(found.levels, begun[bool(k) :], strict=True):
        masks = found.store.masks(level["part"], prunable(found.model))
        for name, tensor in state.items():
            if name in masks:
                assert torch.equal(tensor[masks[name]], point[name][masks[name]])
                assert not bool(tensor[~masks[name]].any())
            else:
                assert torch.equal(tensor, point[name]), name  # biases, norms and their statistics
    assert equal(begun[-1], found.rewound())
    found.rewind_()
    assert equal(snapshot(found.model), begun[-1])
    if k == 0:
        initial = snapshot(net())
        assert all(torch.equal(found.rewound()[n][m], initial[n][m]) for n, m in found.masks.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_are_nested_and_counts_exact(scope: str) -> None:
    found = ticket(scope=scope, evaluate=accuracy)
    weights = prunable(found.model)
    levels = [found.store.masks(level["part"], weights) for level in found.levels]
    for before, after in pairwise(levels):
        assert all(not bool((after[n] & ~before[n]).any()) for n in before)
    pools = [list(weights)] if scope == "global" else [[n] for n in weights]
    for pool in pools:
        total = sum(weights[n].numel() for n in pool)
        counts = [sum(int(masks[n].sum()) for n in pool) for masks in levels]
        target, expected = round(0.2 * total), [total]
        while expected[-1] > target:
            expected.append(max(expected[-1] - math.ceil(0.3 * expected[-1] - 1e-9), target))
        assert counts == expected + expected[-1:] * (len(counts) - len(expected))
    assert [level["left"] for level in found.levels] == [sum(int(m.sum()) for m in masks.values()) for masks in levels]
    assert all(0 < level["score"] <= 1 for level in found.levels)
    assert found.score == found.levels[-1]["score"] == accuracy(found.model.eval())
    assert sum(int(w.count_nonzero()) for w in weights.values()) <= found.report["left"]


def test_masks_keep_the_largest_trained_weights() -> None:
    found = ticket(rounds=2)
    weights = prunable(found.model)
    for before, after in pairwise(found.levels):
        trained = found.store.state(before["part"])
        old, new = (found.store.masks(level["part"], weights) for level in (before, after))
        kept = torch.cat([trained[n].abs()[m] for n, m in new.items()])
        dropped = torch.cat([trained[n].abs()[old[n] & ~m] for n, m in new.items()])
        assert kept.min() >= dropped.max()


def test_ties_over_layers_are_resolved_like_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randint(-3, 4, s, generator=generator).float() for n, s in {"a": (5, 6), "b": (4, 5)}.items()}
    masks = {n: torch.rand(w.shape, generator=generator) > 0.2 for n, w in weights.items()}
    flat = torch.cat([w.abs().flatten() for w in weights.values()]).tolist()
    there = torch.cat([m.flatten() for m in masks.values()]).nonzero().flatten().tolist()
    ascending = sorted(there, key=lambda i: flat[i])  # among equal ones the first in order goes first
    for left in range(1, len(there) + 1):
        kept = torch.cat([m.flatten() for m in fewer(weights, masks, {"": left}).values()])
        assert kept.nonzero().flatten().tolist() == sorted(ascending[len(there) - left :])


def test_the_dense_level_is_the_tail_of_an_uninterrupted_training() -> None:
    found = ticket(training=Training(momentum=0.0, decay=0.0))
    whole = net().train()
    Training(momentum=0.0, decay=0.0)(whole, Stretch())
    assert equal(found.store.state("level-00"), snapshot(whole))


def test_absent_weights_are_zero_after_every_step() -> None:
    steps: list[tuple[int, bool]] = []  # of each step: weights that were there at the beginning, whether others are

    class Watched(Training):
        def __call__(self, model: nn.Module, stretch: Stretch) -> None:
            absent = {n: w.detach() == 0 for n, w in prunable(model).items()}
            present = sum(int((~a).sum()) for a in absent.values())

            def after_step(model: nn.Module) -> None:
                moved = any(bool(model.get_parameter(n).detach()[a].any()) for n, a in absent.items())
                steps.append((present, moved))

            self.after_step = after_step
            super().__call__(model, stretch)

    found = ticket(training=Watched(momentum=0.9, decay=0.01))
    per_level, first = round(0.9 * STEPS), round(0.1 * STEPS)
    expected = [level["left"] for level in found.levels for _ in range(per_level)]
    assert steps[first:] == [(left, False) for left in expected]


def test_the_training_is_asked_for_the_rest_with_its_own_rates() -> None:
    training = Training()
    found = ticket(training=training, rewind_to=0.6)  # where the rate is no longer that of the beginning
    first, *rest = training.stretches
    assert (first.start, first.stop) == (0.0, 0.6)
    assert len(rest) == len(found.levels)
    assert all((s.start, s.stop, s.seed, s.rate) == (0.6, 1.0, 0, None) for s in rest)
    for rates in training.rates[1:]:
        assert rates[0] == RATE * schedule(0.6) != RATE * schedule(0.0)
        assert len(rates) == STEPS - round(0.6 * STEPS)
    other = Training()
    ticket(training=other, rewind_to=0.2, seed=5, same_order=False)
    assert [s.seed for s in other.stretches] == [5 + max(i - 1, 0) for i in range(len(rest) + 1)]


def test_without_rewinding_it_is_magnitude_pruning_with_fine_tuning() -> None:
    for rounds in (1, 3):
        training = Training()
        found = ticket(rewind="none", rounds=rounds, training=training, low=0.05)
        model = net().train()
        plain = Training()
        plain(model, Stretch(0.0, 0.1))
        plain(model, Stretch(0.1, 1.0))
        weights = prunable(model)
        total = sum(w.numel() for w in weights.values())
        masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
        for i in range(1, rounds + 1):
            left = round(0.2 * total) if i == rounds else round(total * (round(0.2 * total) / total) ** (i / rounds))
            flat = torch.cat([(w.abs() + 1e-30).mul(masks[n]).flatten() for n, w in weights.items()])
            kept = torch.zeros(total, dtype=torch.bool)
            kept[flat.argsort(descending=True)[:left]] = True
            for name, part in zip(weights, torch.split(kept, [w.numel() for w in weights.values()]), strict=True):
                masks[name] = part.view_as(weights[name])
            with bh.held(model, masks):
                plain(model, Stretch(0.1, 1.0, rate=lambda t: 0.05))
        assert equal(found.masks, masks)
        assert equal(snapshot(found.model), snapshot(model))
    assert set(training.rates[-1]) == {RATE * 0.05}


def test_learning_rate_rewinding_keeps_the_weights() -> None:
    begun: list[dict[str, torch.Tensor]] = []

    class Watched(Training):
        def __call__(self, model: nn.Module, stretch: Stretch) -> None:
            begun.append({n: t.clone() for n, t in snapshot(model).items()})
            super().__call__(model, stretch)

    training = Watched()
    found = ticket(rewind="rate", training=training)
    for index in range(1, len(found.levels)):
        trained = found.store.state(f"level-{index - 1:02d}")
        masks = found.store.masks(f"level-{index:02d}", prunable(found.model))
        for name, tensor in begun[index + 1].items():
            assert torch.equal(tensor, trained[name] * masks[name] if name in masks else trained[name])
        assert training.rates[index + 1] == training.rates[1]


def test_one_round_prunes_at_once() -> None:
    found = ticket(rounds=1)
    assert len(found.levels) == 2
    assert found.levels[1]["left"] == round(0.2 * 368)


def test_excluded_and_low_precision_weights() -> None:
    found = ticket(exclude=["5.*"])
    assert "5.weight" not in found.masks
    assert found.sparsity == pytest.approx(0.8, abs=2e-3)
    model = net(norm=False).to(torch.bfloat16)

    def train(model: nn.Module, stretch: Stretch) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2 if stretch.seed % 2 else 0.5)  # ties abound

    low = bh.IMPRewind(sparsity=0.8, per_round=0.3, rewind_to=0.1).run(model, train)
    assert low.report["left"] == round(0.2 * 368)
    assert model[0].weight.dtype == torch.bfloat16


class TestControls:
    def test_random_masks_keep_counts(self) -> None:
        masks = {"a": torch.arange(63).view(9, 7) % 2 == 0, "b": torch.arange(60).view(4, 5, 3) % 10 == 0}
        one, again, other = shuffled(masks, 3), shuffled(masks, 3), shuffled(masks, 4)
        assert {n: int(m.sum()) for n, m in one.items()} == {n: int(m.sum()) for n, m in masks.items()}
        assert {n: m.shape for n, m in one.items()} == {n: m.shape for n, m in masks.items()}
        assert equal(one, again)
        assert not equal(one, other)
        over_all = shuffled(masks, 3, over_all=True)
        assert sum(int(m.sum()) for m in over_all.values()) == sum(int(m.sum()) for m in masks.values())
        assert int(over_all["a"].sum()) != int(masks["a"].sum())

    def test_random_places_are_uniform(self) -> None:
        masks = {"a": torch.arange(20) < 5}
        often = torch.stack([shuffled(masks, seed)["a"] for seed in range(400)]).float().mean(0)
        assert often.sub(0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 400)

    @pytest.mark.parametrize("kind", ["random", "random-global", "reinit", "original"])
    def test_controls_leave_the_ticket_alone(self, kind: Any) -> None:
        found = ticket(evaluate=accuracy)
        before = {n: t.clone() for n, t in snapshot(found.model).items()}
        training = Training()
        control = found.control(kind, training, evaluate=accuracy)
        assert equal(before, snapshot(found.model))
        assert control.score is not None
        assert control.report["left"] == found.report["left"]
        assert control.model is not found.model
        for name, mask in control.masks.items():
            assert not bool(control.model.get_parameter(name)[~mask].any())
        start = control.report["parts"][-1]["start"]
        assert start == (0.0 if kind == "original" else 0.1)
        if kind == "reinit":
            assert equal(control.masks, found.masks)
            anew = found.control(kind, Training(), start=0.0).report["parts"][-1]["start"]
            assert anew == 0.0
        else:
            assert not equal(control.masks, found.masks)
        if kind == "original":
            scratch = bh.IMPRewind(sparsity=0.8, per_round=0.3, rewind_to=0.0).run(net(), Training())
            assert equal(snapshot(scratch.model), snapshot(control.model))

    def test_a_random_mask_starts_where_the_ticket_does(self) -> None:
        begun: list[dict[str, torch.Tensor]] = []

        class Watched(Training):
            def __call__(self, model: nn.Module, stretch: Stretch) -> None:
                begun.append({n: t.clone() for n, t in snapshot(model).items()})
                super().__call__(model, stretch)

        found = ticket()
        control = found.control("random", Watched(), seed=7)
        point = found.store.state("rewind")
        assert equal({n: point[n] * control.masks.get(n, 1) for n in point}, begun[0])
        assert equal(control.masks, shuffled(found.masks, 7))

    def test_new_draws(self) -> None:
        one, two, three = net(), net(), net(seed=1)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        reinitialize_(one, 5)
        assert torch.equal(state, torch.get_rng_state())
        reinitialize_(three, 5)
        assert equal(snapshot(one), snapshot(three))
        assert not torch.equal(one[0].weight, two[0].weight)
        same = net(seed=5)
        assert not torch.equal(one[0].weight, same[0].weight)  # a new draw, whatever seed the user had

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))

        with pytest.raises(BillhookError, match=r"0 \(Own\) has no reset_parameters"):
            reinitialize_(nn.Sequential(Own(), nn.Linear(2, 2)), 0)
        model = nn.Sequential(Own(), nn.Linear(2, 2))
        reinitialize_(model, 0, lambda m: [nn.init.normal_(p) for p in m.parameters()])
        assert not torch.equal(model[0].scale, torch.ones(3))

    def test_unknown(self) -> None:
        with pytest.raises(BillhookError, match=r"No control 'randon'.*did you mean 'random'"):
            ticket().control("randon", Training())

    def test_a_finished_control_is_read_back(self, tmp_path: Any) -> None:
        found = ticket()
        first = found.control("random", Training(), evaluate=accuracy, out=tmp_path)
        again = Training()
        second = found.control("random", again, evaluate=accuracy, out=tmp_path)
        elsewhere = found.control("random", Training(), evaluate=accuracy, out=tmp_path, start=0.5)
        assert elsewhere.report["parts"][-1]["start"] == 0.5
        assert not again.stretches
        assert first.score == second.score
        assert equal(snapshot(first.model), snapshot(second.model))


class TestStability:
    def test_a_full_mask_is_perfectly_stable_to_pruning(self) -> None:
        found = ticket()
        whole = {n: torch.ones_like(m) for n, m in found.masks.items()}
        measured = found.stability(Training(), masks=whole)
        assert measured.pruning.l2 == 0
        assert measured.order.l2 > 0
        assert measured.barrier is None

    def test_against_the_definition(self) -> None:
        found = ticket()
        before = {n: t.clone() for n, t in snapshot(found.model).items()}
        measured = found.stability(Training(), evaluate=accuracy, points=5)
        assert equal(before, snapshot(found.model))
        dense, sparse = found.store.state("level-00"), snapshot(found.model)
        gap = torch.cat([(dense[n] - sparse[n])[m] for n, m in found.masks.items()])
        assert measured.pruning.l2 == pytest.approx(float(gap.double().norm()), rel=1e-6)
        other = copy.deepcopy(found.model)
        restore(other, found.rewound())
        with bh.held(other, found.masks):
            Training()(other.train(), Stretch(0.1, 1.0, seed=1))
        gap = torch.cat([(snapshot(other)[n] - sparse[n])[m] for n, m in found.masks.items()])
        assert measured.order.l2 == pytest.approx(float(gap.double().norm()), rel=1e-6)
        assert 0 < measured.order.angle < 180
        assert measured.barrier is not None
        assert len(measured.barrier.scores) == 5
        assert measured.barrier.scores[0] == accuracy(found.model.eval())
        assert measured.barrier.scores[-1] == accuracy(other.eval())
