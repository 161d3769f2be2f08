"""BiP and HYDRA: the upper level's gradient, the two kinds of steps, the projection."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad

import billhook as bh
from billhook.errors import BillhookError
from billhook.methods import OneShot
from billhook.training.bilevel import implicit_gradient, overlap, top
from billhook.training.masks import pack
from billhook.training.schedules import cosine

STEPS = 40


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


def convolutions(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )


def batch(step: int, shape: tuple[int, ...] = (6,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return (
        torch.randn(16, *shape, generator=generator, dtype=dtype),
        torch.randint(0, 3, (16,), generator=generator),
    )


def sgd(model: nn.Module, rate: float = 0.05, decay: float = 5e-4) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)


def train(model: nn.Module, optimizer: Any, pruner: Any, first: int = 0, last: int = STEPS) -> None:
    shape = (4, 3, 3) if isinstance(model[0], nn.Conv2d) else (6,)  # type: ignore[index]
    for step in range(first, last):
        x, y = batch(step, shape, next(model.parameters()).dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()


def whole(pruner: Any) -> dict[str, Tensor]:
    """Present weights and those that absent ones would return with."""
    return {
        name: torch.where(pruner.masks[name], weight.detach(), pruner.memory[f"theta.{name}"])
        for name, weight in pruner.weights.items()
    }


def parts(pruner: Any, part: str) -> dict[str, Tensor]:
    return {name: pruner.memory[f"{part}.{name}"].clone() for name in pruner.weights}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class TestGradientOfTheUpperLevel:
    def test_mask_and_weights_enter_by_their_product(self) -> None:
        model = net(dtype=torch.float64)
        theta = {n: p.detach() for n, p in model.named_parameters() if p.dim() == 2}
        masks = {n: (torch.rand_like(t) > 0.4).double() for n, t in theta.items()}
        x, y = batch(0, dtype=torch.float64)

        def loss(z: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(model, z, (x,)), y)

        def of_product(m: dict[str, Tensor], t: dict[str, Tensor]) -> Tensor:
            return loss({n: m[n] * t[n] for n in t})

        in_masks, in_theta = grad(of_product, argnums=(0, 1))(masks, theta)
        effective = grad(loss)({n: masks[n] * theta[n] for n in theta})
        for name in theta:
            plain = implicit_gradient(theta[name], masks[name], effective[name], 0.0)
            assert torch.allclose(in_masks[name], plain, atol=1e-12)
            assert torch.equal(plain, theta[name] * effective[name])  # no ridge is infinitely strong: HYDRA's gradient
            assert torch.allclose(in_theta[name], masks[name] * effective[name], atol=1e-12)

    @pytest.mark.parametrize("grouped", [False, True])
    def test_exact_for_a_linear_loss(self, grouped: bool) -> None:
        torch.manual_seed(0)
        g, gamma = torch.randn(4, 5, dtype=torch.float64), 0.3
        m = (torch.rand(4, 1 if grouped else 5, dtype=torch.float64)).requires_grad_()  # soft, to have a derivative

        def retrained() -> Tensor:
            return -m * g / gamma  # argmin over θ of g·(m·θ) + γ/2·‖θ‖²

        (expected,) = torch.autograd.grad((g * m * retrained()).sum(), m)
        found = implicit_gradient(retrained().detach(), m.detach(), g, 1 / gamma)
        assert torch.allclose(found.sum(1, keepdim=True) if grouped else found, expected, atol=1e-12)

    def test_quadratic_loss_has_a_curvature_that_it_leaves_out(self) -> None:
        torch.manual_seed(1)
        n, gamma = 6, 0.5
        cosines, errors = [], []
        for _ in range(20):
            root = torch.randn(n, n, dtype=torch.float64)
            hessian, b = root @ root.T / n, torch.randn(n, dtype=torch.float64)
            m = (torch.arange(n) % 2 == 0).double()[torch.randperm(n)].requires_grad_()
            ridge = gamma * torch.eye(n, dtype=torch.float64)

            def retrained(m: Tensor, hessian: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
                return torch.linalg.solve(torch.diag(m) @ hessian @ torch.diag(m) + ridge, m * b)

            z = m * retrained(m, hessian, b, ridge)
            (expected,) = torch.autograd.grad(z @ hessian @ z / 2 - b @ z, m)
            theta, keep = retrained(m, hessian, b, ridge).detach(), m.detach()
            g = hessian @ (keep * theta) - b
            mixed = torch.diag(g) + torch.diag(theta) @ hessian @ torch.diag(keep)
            inner = torch.diag(keep) @ hessian @ torch.diag(keep) + ridge
            exact = theta * g - mixed @ torch.linalg.solve(inner, keep * g)
            assert torch.allclose(exact, expected, atol=1e-8)
            found = implicit_gradient(theta, keep, g, 1 / gamma)
            cosines.append(float(torch.cosine_similarity(found, exact, dim=0)))
            errors.append(float((found - exact).norm() / exact.norm()))
        assert min(cosines) > 0
        assert sum(errors) / len(errors) > 0.1


class TestProjection:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**31), st.integers(0, 40), st.booleans())
    def test_is_a_stable_sort(self, seed: int, keep: int, ties: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = {n: torch.randn(s, generator=generator) for n, s in {"a": (4, 5), "b": (5, 2, 2)}.items()}
        if ties:
            scores = {n: (s * 2).round() for n, s in scores.items()}
        flat = torch.cat([s.flatten() for s in scores.values()]).tolist()
        dropped = sorted(range(40), key=lambda i: flat[i])[: 40 - keep]  # of equal ones the lower index first
        found = torch.cat([m.flatten() for m in top(scores, keep).values()]).tolist()
        assert found == [i not in set(dropped) for i in range(40)]

    def test_overlap_is_intersection_over_union(self) -> None:
        first, second = torch.rand(2, 7, 9) > 0.5
        wanted = int((first & second).sum()) / int((first | second).sum())
        assert overlap({"a": pack(first)}, {"a": pack(second)}) == pytest.approx(wanted)

    @pytest.mark.parametrize("scope", ["global", "layer"])
    @pytest.mark.parametrize("method", [bh.BiP, bh.HYDRA])
    def test_count_is_exact_after_every_step(self, method: Any, scope: Any) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = method(sparsity=0.8, scope=scope).attach(model, optimizer, STEPS)
        for step in range(STEPS):
            train(model, optimizer, pruner, step, step + 1)
            counts = {n: int(m.sum()) for n, m in pruner.masks.items()}
            if scope == "global":
                assert sum(counts.values()) == round(0.2 * pruner.total)
            else:
                assert counts == {n: m.numel() - int(0.8 * m.numel()) for n, m in pruner.masks.items()}
            for name, weight in pruner.weights.items():
                absent = ~pruner.masks[name]
                assert not bool(weight.detach()[absent].any())
                speed = optimizer.state[weight].get("momentum_buffer")
                assert speed is None or not bool(speed[absent].any())
        pruner.finalize()
        assert type(model) is nn.Sequential
        assert len(pruner.notes) == 1
        assert "The mask is final after step" in pruner.notes[0]
        assert set(pruner.memory) == {"overlap"}

    @pytest.mark.parametrize("granularity", ["filter", "channel"])
    def test_groups_leave_whole_and_equally_many_from_each_layer(self, granularity: Any) -> None:
        model = convolutions()
        optimizer = sgd(model, decay=0.0)
        method = bh.BiP(sparsity=0.5, granularity=granularity, mask_rate=5.0, score_clip=None)
        pruner = method.attach(model, optimizer, STEPS)
        axes = (
            {"0.weight": 0, "3.weight": 1, "5.weight": 0} if granularity == "filter" else {"0.weight": 1, "3.weight": 0}
        )
        assert set(pruner.weights) == set(axes)  # a slice of the grouped one is not a channel; the linear one is dense
        first = {n: m.clone() for n, m in pruner.masks.items()}
        for step in range(STEPS):
            train(model, optimizer, pruner, step, step + 1)
            for name, axis in axes.items():
                groups = pruner.masks[name].movedim(axis, 0).flatten(1)
                assert torch.equal(groups.any(1), groups.all(1))
                assert int(groups.all(1).sum()) == len(groups) // 2
                values = pruner.weights[name].detach().movedim(axis, 0).flatten(1)
                assert torch.equal(values.abs().amax(1) > 0, groups.all(1))
        assert not equal(first, pruner.masks)
        assert bool(model.get_parameter("7.weight").detach().all())
        pruner.finalize()

    @pytest.mark.parametrize("granularity", ["filter", "channel"])
    def test_a_group_is_ranked_by_its_norm_and_learns_by_the_gradient_in_its_one_mask(self, granularity: Any) -> None:
        model = convolutions().double()
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        method = bh.BiP(sparsity=0.5, granularity=granularity, implicit=2.0, mask_rate=50.0, score_clip=None)
        pruner = method.attach(model, sgd(model, rate=0.0, decay=0.0), STEPS)
        axes = (
            {"0.weight": 0, "3.weight": 1, "5.weight": 0} if granularity == "filter" else {"0.weight": 1, "3.weight": 0}
        )

        def spread(values: Tensor, name: str) -> Tensor:  # one value per group, over the weight's shape
            return values.view([-1 if axis == axes[name] else 1 for axis in range(4)]).expand_as(theta[name])

        def best(scores: dict[str, Tensor]) -> dict[str, Tensor]:
            chosen = {}
            for name, score in scores.items():
                half = sorted(range(len(score)), key=lambda i, score=score: float(score[i]))[len(score) // 2 :]
                chosen[name] = torch.tensor([i in half for i in range(len(score))])
            return chosen

        scores = {n: torch.stack([part.norm() for part in theta[n].unbind(axis)]) for n, axis in axes.items()}
        mask = first = best(scores)
        assert equal({n: spread(m, n) for n, m in mask.items()}, pruner.masks)
        train(model, pruner.optimizer, pruner, 0, 2)  # the first step is the weights', which have no rate

        x, y = batch(1, (4, 3, 3), torch.float64)
        one = {n: m.double().requires_grad_() for n, m in mask.items()}
        z = {n: theta[n] * spread(one[n], n) for n in axes}
        loss = nn.functional.cross_entropy(functional_call(model, theta | z, (x,)), y)
        for (name, value), direct, g in zip(
            one.items(),
            torch.autograd.grad(loss, list(one.values()), retain_graph=True),
            torch.autograd.grad(loss, list(z.values())),
            strict=True,
        ):
            expected = direct - 2.0 * value.detach() * g.movedim(axes[name], 0).flatten(1).square().sum(1)
            found = pruner.memory[f"velocity.{name}"]
            assert torch.allclose(found.flatten(), expected, rtol=1e-9, atol=1e-14)
            scores[name] = scores[name] - cosine(2, 30, 50.0) * expected
        mask = best(scores)
        assert equal({n: spread(m, n) for n, m in mask.items()}, pruner.masks)
        assert not equal(mask, first)

    def test_grouped_convolutions_have_only_some_slices_of_their_own(self) -> None:
        model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3))
        filters = bh.BiP(sparsity=0.5, granularity="filter").attach(model, sgd(model), STEPS)
        assert set(filters.weights) == {"1.weight"}
        filters.finalize()
        channels = bh.BiP(sparsity=0.5, granularity="channel").attach(model, sgd(model), STEPS)
        assert set(channels.weights) == {"0.weight", "1.weight"}
        assert int(channels.masks["0.weight"].all(dim=(1, 2)).sum()) == 2
        channels.finalize()

    def test_a_layer_of_one_group_stays(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3))
        pruner = bh.BiP(sparsity=0.9, granularity="channel").attach(model, sgd(model), STEPS)
        assert pruner.active == 36
        pruner.finalize()


class TestSteps:
    def test_against_a_loop_over_dense_weights(self) -> None:
        """An independent loop that never moves a value: dense θ, scores and masks as plain tensors."""
        model = net(dtype=torch.float64)
        rate, decay, alpha, steps = 0.05, 1e-2, 0.5, 60
        optimizer = sgd(model, rate, decay)
        pruner = bh.BiP(sparsity=0.8, mask_rate=alpha, implicit=2.0, score_clip=0.05).attach(model, optimizer, steps)
        theta = {n: p.detach().clone() for n, p in net(dtype=torch.float64).named_parameters()}
        scored = [n for n in theta if theta[n].dim() == 2]
        score = {n: theta[n].abs() for n in scored}
        score_speed = {n: torch.zeros_like(score[n]) for n in scored}
        speed = {n: torch.zeros_like(t) for n, t in theta.items()}

        def project() -> dict[str, Tensor]:
            flat = torch.cat([score[n].flatten() for n in scored])
            chosen = torch.zeros(len(flat), dtype=torch.bool)
            chosen[flat.argsort(descending=True, stable=True)[: round(0.2 * len(flat))]] = True
            split = chosen.split([score[n].numel() for n in scored])
            return {n: part.view_as(score[n]) for n, part in zip(scored, split, strict=True)}

        mask = first = project()
        for step in range(steps):
            train(model, optimizer, pruner, step, step + 1)
            x, y = batch(step, dtype=torch.float64)
            z = {n: (t * mask[n] if n in mask else t).requires_grad_() for n, t in theta.items()}
            loss = nn.functional.cross_entropy(functional_call(model, z, (x,)), y)
            g = dict(zip(z, torch.autograd.grad(loss, list(z.values())), strict=True))
            if step % 2 == 1 and step + 1 <= 44:
                for n in scored:
                    bound = 0.05 * score[n].square().mean().sqrt()
                    ig = ((theta[n] - 2.0 * mask[n] * g[n]) * g[n]).clamp(-bound, bound)
                    score_speed[n] = 0.9 * score_speed[n] + ig
                    score[n] = score[n] - cosine(step + 1, 44, alpha) * score_speed[n]
                mask = project()
                for n in scored:
                    speed[n] = speed[n] * mask[n]
            else:
                for n, t in theta.items():
                    present = mask.get(n, torch.ones_like(t, dtype=torch.bool))
                    speed[n] = (0.9 * speed[n] + g[n] + decay * t) * present
                    absent = t * (1 - rate * decay / (1 - 0.9))
                    theta[n] = torch.where(present, t - rate * speed[n], absent)
            assert equal(mask, pruner.masks), step
        assert overlap({n: pack(m) for n, m in mask.items()}, {n: pack(m) for n, m in first.items()}) < 0.9
        for name, value in theta.items():
            effective = value * mask[name] if name in mask else value
            assert torch.allclose(model.get_parameter(name), effective, atol=1e-10), name

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_each_level_leaves_the_other_alone(self, kind: str) -> None:
        model = net()
        optimizer = sgd(model) if kind == "sgd" else torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        pruner = bh.BiP(sparsity=0.7, mask_rate=1.0).attach(model, optimizer, STEPS)
        moved = 0
        for step in range(20):
            before, scores, velocity = whole(pruner), parts(pruner, "score"), parts(pruner, "velocity")
            biases = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1}
            present = {n: m.clone() for n, m in pruner.masks.items()}
            train(model, optimizer, pruner, step, step + 1)
            after = {n: model.get_parameter(n).detach() for n in biases}
            if step % 2 == 0:  # lower
                assert equal(scores, parts(pruner, "score"))
                assert equal(velocity, parts(pruner, "velocity"))
                assert equal(present, pruner.masks)
                assert not equal(before, whole(pruner))
                assert not equal(biases, after)
            else:
                assert equal(before, whole(pruner))
                assert equal(biases, after)
                assert not equal(scores, parts(pruner, "score"))
                assert all(p.grad is None for p in model.parameters())
                moved += not equal(present, pruner.masks)
        assert moved > 3
        for name, weight in pruner.weights.items():
            pointers = {pruner.memory[f"{part}.{name}"].data_ptr() for part in ("score", "velocity", "theta")}
            assert len(pointers | {weight.data_ptr()}) == 4

    def test_several_lower_steps_for_each_upper_one(self) -> None:
        method = bh.BiP(lower_per_upper=3, freeze_after=0.5)
        assert [step for step in range(1, 41) if method.due(step, 40)] == [4, 8, 12, 16, 20]
        assert [step for step in range(1, 11) if bh.HYDRA(learn=0.3).due(step, 10)] == [1, 2, 3]

    def test_rate_zero_is_one_shot_and_retraining(self) -> None:
        results = []
        for method in (OneShot(sparsity=0.8), bh.BiP(sparsity=0.8, mask_rate=0.0)):
            model = net()
            optimizer = sgd(model)
            pruner = method.attach(model, optimizer, STEPS)
            train(model, optimizer, pruner)
            assert set(pruner.memory) <= {"overlap"}  # nothing of the size of the weights
            results.append((pruner.masks, model.state_dict()))
        assert equal(results[0][0], results[1][0])
        assert equal(results[0][1], results[1][1])

    def test_scores_that_hardly_move_leave_the_magnitude_mask(self) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = bh.BiP(sparsity=0.8, mask_rate=1e-12).attach(model, optimizer, STEPS)
        first = {n: m.clone() for n, m in pruner.masks.items()}
        train(model, optimizer, pruner)
        assert equal(first, pruner.masks)
        assert pruner.memory["overlap"][:, 1:].eq(1).all()

    def test_weights_that_stand_still_are_hydras(self) -> None:
        masks = []
        for method in (
            bh.BiP(sparsity=0.8, implicit=0.0, freeze_after=1.0, mask_rate=1.0),
            bh.HYDRA(sparsity=0.8, mask_rate=1.0),
        ):
            model = net()
            optimizer = sgd(model, rate=0.0)
            pruner = method.attach(model, optimizer, STEPS)
            dense = dict(net().named_parameters())
            first = {n: m.clone() for n, m in pruner.masks.items()}
            bip = isinstance(method, bh.BiP)
            # the same batches and score rates for both: BiP's lower steps see batches that change nothing
            for step in range(STEPS // 2):
                if bip:
                    train(model, optimizer, pruner, 500 + step, 501 + step)
                train(model, optimizer, pruner, step, step + 1)
                if step < STEPS // 2 - 1:
                    assert all(torch.equal(value, dense[name]) for name, value in whole(pruner).items())
            for name, weight in pruner.weights.items():
                assert torch.equal(weight, dense[name] * pruner.masks[name])
            assert not equal(first, pruner.masks)
            masks.append(pruner.masks)
        assert equal(*masks)

    def test_nothing_to_remove_is_plain_training(self) -> None:
        model, plain = net(), net()
        optimizer, other = sgd(model), sgd(plain)
        pruner = bh.BiP(sparsity=0.0).attach(model, optimizer, STEPS)
        train(model, optimizer, pruner)
        assert all(bool(mask.all()) for mask in pruner.masks.values())
        for step in range(STEPS):
            x, y = batch(step)
            other.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            other.step()
        assert equal(model.state_dict(), plain.state_dict())

    @pytest.mark.parametrize("forget", [False, True])
    def test_absent_scores_move_by_what_the_weight_would_return_with(self, forget: bool) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = bh.BiP(sparsity=0.8, mask_rate=1e-6).attach(model, optimizer, STEPS)
        before, absent = parts(pruner, "velocity"), {n: ~m for n, m in pruner.masks.items()}
        if forget:
            for name in pruner.weights:
                pruner.memory[f"theta.{name}"].zero_()
        train(model, optimizer, pruner, 0, 2)
        moved = [bool((parts(pruner, "velocity")[n] != before[n])[absent[n]].any()) for n in absent]
        assert any(moved) is not forget
        assert all(moved) is not forget

    def test_a_weight_returns_with_its_value(self) -> None:
        model = net()
        optimizer = sgd(model, decay=0.0)
        pruner = bh.BiP(sparsity=0.7, mask_rate=2.0).attach(model, optimizer, STEPS)
        dense, returned = dict(net().named_parameters()), 0
        out = {n: ~m for n, m in pruner.masks.items()}  # never there so far
        for step in range(1, STEPS // 2, 2):
            train(model, optimizer, pruner, step, step + 2)
            for name, mask in pruner.masks.items():
                back = out[name] & mask
                assert torch.equal(model.get_parameter(name)[back], dense[name][back])
                returned += int(back.sum())
                out[name] &= ~mask
        assert returned > 5


def best_masks(method: Any, problems: int, steps: int) -> list[tuple[float, float]]:
    """Loss over the best loss of all masks with 3 of 8 features, after an exact refit: of the method, of magnitude."""
    ratios = []
    for seed in range(problems):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731, B023
        x = draw(100, 8) @ (draw(8, 8) / 8**0.5 + 0.5 * torch.eye(8))
        y = x @ draw(8) + 0.3 * draw(100)
        hessian, b, ridge = x.T @ x / 100, x.T @ y / 100, 1e-2

        def refit(features: list[int], x: Tensor = x, y: Tensor = y, h: Tensor = hessian, b: Tensor = b) -> float:
            w = torch.linalg.solve(h[features][:, features] + 1e-2 * torch.eye(len(features)), b[features])
            return float((y - x[:, features] @ w).square().mean() / 2 + 1e-2 * w @ w / 2)

        model = nn.Linear(8, 1, bias=False).double()
        dense = torch.linalg.solve(hessian + ridge * torch.eye(8), b)
        model.weight.data.copy_(dense)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=ridge)
        pruner = method.attach(model, optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            ((model(x)[:, 0] - y).square().mean() / 2).backward()
            optimizer.step()
            pruner.step()
        pruner.finalize()
        best = min(refit(list(chosen)) for chosen in combinations(range(8), 3))
        chosen = [i for i in range(8) if pruner.masks["weight"][0, i]]
        ratios.append((refit(chosen) / best, refit(dense.abs().argsort()[5:].tolist()) / best))
    return ratios


def test_close_to_the_best_mask_of_all() -> None:
    method = bh.BiP(sparsity=5 / 8, mask_rate=0.05, mask_momentum=0.0, freeze_after=1.0)
    ratios = best_masks(method, 12, 300)
    found, magnitude = (sum(column) / len(column) for column in zip(*ratios, strict=True))
    assert min(ratio for ratio, _ in ratios) >= 1 - 1e-12
    assert found - 1 < 0.6 * (magnitude - 1)
    better, worse = sum(a < b - 1e-9 for a, b in ratios), sum(a > b + 1e-9 for a, b in ratios)
    assert better > worse


class TestState:
    @pytest.mark.parametrize("at", [15, 16, 35])
    @pytest.mark.parametrize("method", [bh.BiP(sparsity=0.8, mask_rate=1.0), bh.HYDRA(sparsity=0.8, mask_rate=1.0)])
    def test_resume_gives_the_same_bits(self, method: Any, at: int) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = method.attach(model, optimizer, STEPS)
        train(model, optimizer, pruner, 0, at)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        train(model, optimizer, pruner, at, STEPS)
        again = net(seed=9)
        optimizer = sgd(again)
        resumed = method.attach(again, optimizer, STEPS)
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        resumed.load_state_dict(saved[2])
        train(again, optimizer, resumed, at, STEPS)
        assert equal(model.state_dict(), again.state_dict())
        assert equal(pruner.masks, resumed.masks)
        assert equal(pruner.memory, resumed.memory)
        assert pruner.notes == resumed.notes

    def test_overlap_of_masks_is_recorded(self) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = bh.BiP(sparsity=0.8, mask_rate=1.0).attach(model, optimizer, 80)
        first = {n: pack(m) for n, m in pruner.masks.items()}
        looks, last, before = [], 0, first
        for step in range(80):
            train(model, optimizer, pruner, step, step + 1)
            if len(pruner.memory["overlap"]) > last:
                last = len(pruner.memory["overlap"])
                now = {n: pack(m) for n, m in pruner.masks.items()}
                looks.append([step + 1.0, overlap(now, before), overlap(now, first)])
                before = now
        assert pruner.memory["overlap"].tolist() == looks
        assert looks[-1][0] == 60
        assert len(looks) == 10
        assert looks[-1][2] < 1
        assert f"IoU {looks[-1][2]:.2f} with the magnitude mask" in pruner.notes[0]

    def test_narrow_weights_have_wide_scores(self) -> None:
        model = net(dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        pruner = bh.BiP(sparsity=0.8, mask_rate=1e-3).attach(model, optimizer, STEPS)
        before = whole(pruner)
        train(model, optimizer, pruner, 0, 20)
        assert all(value.dtype == torch.float32 for value in parts(pruner, "score").values())
        assert equal(before, whole(pruner))


class TestLossScaler:
    def make(self, fused: bool) -> tuple[nn.Module, Any, Any, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return model, optimizer, bh.BiP(sparsity=0.8, mask_rate=1.0).attach(model, optimizer, STEPS), scaler

    def steps(self, model: nn.Module, optimizer: Any, pruner: Any, scaler: Any, overflow: int = -1) -> None:
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss * float("inf") if step == overflow else loss).backward()
                scaler.step(optimizer)
                scaler.update()
            pruner.step()

    @pytest.mark.parametrize("fused", [False, True])
    def test_scores_do_not_see_the_scale(self, fused: bool) -> None:
        scaled, plain = self.make(fused), self.make(fused)
        self.steps(*scaled)
        self.steps(*plain[:3], None)
        assert equal(scaled[2].masks, plain[2].masks)
        assert all(torch.allclose(v, plain[0].state_dict()[n], atol=1e-6) for n, v in scaled[0].state_dict().items())

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("overflow", [10, 11])
    def test_an_overflow_postpones_the_scores(self, fused: bool, overflow: int) -> None:
        model, optimizer, pruner, scaler = self.make(fused)
        self.steps(model, optimizer, pruner, scaler, overflow)
        assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
        assert pruner.active == round(0.2 * pruner.total)
        pruner.finalize()


class TestRefusals:
    def test_no_convolution(self) -> None:
        model = net()
        with pytest.raises(BillhookError, match="no convolution to remove filters from"):
            bh.BiP(granularity="filter").attach(model, sgd(model), STEPS)

    def test_no_step_for_the_mask(self) -> None:
        model = net()
        with pytest.raises(BillhookError, match="BiP has no step to learn the mask in: 2 steps are too few"):
            bh.BiP().attach(model, sgd(model), 2)
        with pytest.raises(BillhookError, match="BiP has no step to learn the mask in: 3 steps are too few"):
            bh.BiP().attach(model, sgd(model), 3)  # one step at the end, where the scores' rate is zero
        bh.BiP().attach(model, sgd(model), STEPS).detach()  # the failed attach let go of the model

    def test_options(self) -> None:
        with pytest.raises(BillhookError, match="scope=global is of single weights"):
            bh.BiP(granularity="filter", scope="global")
        with pytest.raises(BillhookError, match="implicit=-1"):
            bh.BiP(implicit=-1)
        with pytest.raises(BillhookError, match=r"no option 'implict'.*did you mean 'implicit'"):
            bh.BiP(implict=1)

    def test_bad_and_missing_gradients(self) -> None:
        model = net()
        optimizer = sgd(model)
        pruner = bh.BiP().attach(model, optimizer, STEPS)
        train(model, optimizer, pruner, 0, 1)
        x, y = batch(1)
        nn.functional.cross_entropy(model(x), y).backward()
        weight = model.get_parameter("2.weight")
        assert weight.grad is not None
        weight.grad[0, 0] = float("nan")
        optimizer.step()
        with pytest.raises(BillhookError, match=r"gradient of 2\.weight is not finite at step 2"):
            pruner.step()
        pruner = bh.HYDRA().attach(other := net(), sgd(other), STEPS)
        pruner.optimizer.step()
        with pytest.raises(BillhookError, match=r"0\.weight has no gradient at step 1"):
            pruner.step()
