"""The loop against a loop written out by hand, its freezing, its masters, and a run that is killed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from billhook import BillhookError
from billhook.anatomy import anatomy_of, sites_of
from billhook.recover import (
    KINDS,
    Adapter,
    Kind,
    Loop,
    attach,
    linear_schedule,
    norm_parameters,
    parameters_of,
)
from billhook.sparsity.patterns import NM
from tiny import batches_for, build, weights_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression() -> tuple[nn.Linear, Callable[[int], Tensor]]:
    """A linear layer and its squared error on micro-batches of four rows."""
    layer = nn.Linear(5, 3)
    x, y = torch.randn(40, 5, generator=seeded(1)), torch.randn(40, 3, generator=seeded(2))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 5, generator=seeded(3)))
        layer.bias.zero_()

    def loss(index: int) -> Tensor:
        rows = slice(4 * (index % 10), 4 * (index % 10) + 4)
        return (layer(x[rows]) - y[rows]).square().mean()

    return layer, loss


def all_of(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    return {"all": dict(module.named_parameters())}


def sparse_llama(
    kind: Kind | None, dtype: torch.dtype = torch.float32, rank: int = 4, pattern: NM | None = None, seed: int = 1
) -> tuple[nn.Module, dict[str, Tensor], list[Adapter]]:
    """A tiny Llama pruned to one half, its masks, and an adapter on every site unless kind is None."""
    model = build("llama").to(dtype)
    generator, start = seeded(5), seeded(seed)
    masks, adapters = {}, []
    for block in sites_of(model, anatomy_of(model)):
        for site in block:
            scores = torch.rand(site.shape, generator=generator)
            masks[site.name] = pattern.keep(scores, 0.5) if pattern else scores > 0.5
            site.mask(masks[site.name])
            if kind is not None:
                adapters.append(attach(site.module, kind, masks[site.name], rank, 2.0 * rank, start))
    return model, masks, adapters


def language_loss(model: nn.Module) -> Callable[[int], Tensor]:
    batches = batches_for("llama", count=3)

    def loss(index: int) -> Tensor:
        ids = batches[index % 3]
        result: Tensor = model(ids, labels=ids).loss
        return result

    return loss


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_of_ten_steps() -> None:
    factors = [linear_schedule(k, 10, 2) for k in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@given(st.integers(1, 300), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_schedule_rises_then_falls_in_lines_and_wastes_no_step(steps: int, share: float) -> None:
    warm = round(share * steps)
    factors = [linear_schedule(k, steps, warm) for k in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    if warm < steps:
        assert factors[warm] == 1
        assert linear_schedule(steps, steps, warm) == 0
    points = [0.0, *factors, *([0.0] if warm < steps else [])]  # one step before the first, and the end
    slopes = [b - a for a, b in pairwise(points)]
    assert slopes[: warm + 1] == pytest.approx([1 / (warm + 1)] * min(warm + 1, len(slopes)))
    assert slopes[warm + 1 :] == pytest.approx([-1 / max(steps - warm, 1)] * len(slopes[warm + 1 :]))


# -- against loops by hand -------------------------------------------------------------------------------------------


def test_the_loop_is_adamw_with_the_schedule() -> None:
    layer, loss = regression()
    found = Loop(layer, all_of(layer), 0.05, loss, 20, warmup=0.25).run()
    reference, loss = regression()
    first = [torch.zeros_like(p) for p in reference.parameters()]
    second = [torch.zeros_like(p) for p in reference.parameters()]
    expected = []
    for k in range(20):
        value = loss(k)
        expected.append(float(value.detach()))
        gradients = torch.autograd.grad(value, list(reference.parameters()))
        rate = 0.05 * ((k + 1) / 6 if k < 5 else (20 - k) / 15)
        with torch.no_grad():
            for p, g, m, v in zip(reference.parameters(), gradients, first, second, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                p -= rate * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
    assert found == pytest.approx(expected, rel=1e-5)
    for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_accumulated_micro_batches_are_one_batch() -> None:
    small = 1e-8  # of the size of Adam's epsilon, so that the size of gradients counts
    layer, loss = regression()
    found = Loop(layer, all_of(layer), 0.05, lambda k: small * loss(k), 6, accumulate=5).run()
    reference, one = regression()

    def mean(index: int) -> Tensor:
        return small * torch.stack([one(5 * index + j) for j in range(5)]).mean()

    expected = Loop(reference, all_of(reference), 0.05, mean, 6).run()
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(layer.weight, reference.weight, rtol=1e-5, atol=1e-6)


def test_processes_with_data_of_their_own_are_one_that_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, loss = regression()
    taken = 0

    def add_the_other_process(tensors: list[Tensor]) -> None:
        nonlocal taken
        value = loss(2 * taken + 1)
        gradients = torch.autograd.grad(value, list(layer.parameters()))
        for mine, other in zip(tensors, (value.detach(), *gradients), strict=True):
            mine.add_(other)
        taken += 1

    with monkeypatch.context() as patched:
        patched.setattr("billhook.calibrate.distributed.world", lambda: 2)
        patched.setattr("billhook.calibrate.distributed.sum_", add_the_other_process)
        losses = Loop(layer, all_of(layer), 0.05, lambda index: loss(2 * index), 6).run()
    alone, loss_alone = regression()
    assert losses == pytest.approx(Loop(alone, all_of(alone), 0.05, loss_alone, 6, accumulate=2).run(), rel=1e-5)
    for p, q in zip(layer.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_numbered_through() -> None:
    layer, loss = regression()
    seen: list[int] = []

    def noting(index: int) -> Tensor:
        seen.append(index)
        return loss(index)

    loop = Loop(layer, all_of(layer), 0.05, noting, 4, accumulate=3)
    assert len(loop.run(until=2)) == loop.step == 2
    assert len(loop.run()) == loop.step == 4
    assert len(loop.run()) == 4
    assert seen == list(range(12))


def test_every_group_has_its_own_rate() -> None:
    layer, loss = regression()
    before = weights_of(layer)
    groups = {"w": {"weight": layer.weight}, "b": {"bias": layer.bias}}
    Loop(layer, groups, {"w": 0.0, "b": 0.3}, loss, 1, warmup=0.0).run()
    assert torch.equal(layer.weight, before["weight"])
    torch.testing.assert_close((layer.bias - before["bias"]).abs(), torch.full((3,), 0.3), rtol=1e-4, atol=0)


# -- what is frozen --------------------------------------------------------------------------------------------------


def test_only_the_trained_parameters_have_gradients_and_flags_come_back() -> None:
    model, _, _ = sparse_llama("mask_lora")
    lone = model.get_parameter("model.layers.1.input_layernorm.weight")
    lone.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = weights_of(model)
    groups = parameters_of(model, {"norm", "adapters"})
    names = {name for group in groups.values() for name in group}
    loss = language_loss(model)

    def checking(index: int) -> Tensor:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == names
        return loss(index)

    with torch.no_grad():  # as inside a walk
        Loop(model, groups, 1e-3, checking, 2).run()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_flags_come_back_after_an_error_too() -> None:
    layer, _ = regression()

    def broken(index: int) -> Tensor:
        raise KeyboardInterrupt

    loop = Loop(layer, {"b": {"bias": layer.bias}}, 0.1, broken, 3)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert layer.weight.requires_grad
    assert loop.step == 0


# -- adapters through the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "lr"), [(0, 1e-2), (2, 0.0)])
def test_no_steps_or_no_rate_is_the_pruned_model_bit_by_bit(
    kind: Kind, dtype: torch.dtype, steps: int, lr: float
) -> None:
    model, _, adapters = sparse_llama(kind, dtype, rank=3)
    reference, _, _ = sparse_llama(None, dtype)
    losses = Loop(model, parameters_of(model, {"norm", "adapters"}), lr, language_loss(model), steps).run()
    assert len(losses) == steps
    for adapter in adapters:
        adapter.merge()
    assert weights_of(model).keys() == weights_of(reference).keys()
    for name, weight in weights_of(reference).items():
        assert torch.equal(model.get_parameter(name), weight)


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "scale_lora_full", "lora_prune"])
def test_training_and_merging_keeps_two_of_four(kind: Kind) -> None:
    model, masks, adapters = sparse_llama(kind, pattern=NM(2, 4))
    loss = language_loss(model)
    losses = Loop(model, parameters_of(model, {"norm", "adapters"}), 1e-2, loss, 12).run()
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])  # three micro-batches take turns
    with torch.no_grad():
        trained = float(loss(0))
    for adapter in adapters:
        adapter.merge()
    for name, keep in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, keep)
        assert (weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1) == 2).all()
    with torch.no_grad():
        merged = float(loss(0))
    if kind == "lora_prune":
        assert abs(merged - trained) > 1e-4
    else:
        assert merged == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("kind", ["scale_lora", "scale_lora_full"])
def test_the_symmetric_start_stays_of_rank_one(kind: Kind) -> None:
    generator = seeded(0)
    layer = nn.Linear(16, 12, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    x, y = torch.randn(64, 16, generator=generator), torch.randn(64, 12, generator=generator)
    adapter = attach(layer, kind, None, 4, 8.0, generator)
    groups = {"adapters": dict(zip("ab", adapter.parameters(), strict=True))}
    losses = Loop(layer, groups, 1e-2, lambda k: (layer(x) - y).square().mean(), 300).run()
    assert losses[-1] < 0.9 * losses[0]
    a, b = adapter.parameters()
    factor = (b @ a).detach().double() + (1.0 if kind == "scale_lora_full" else 0.0)
    values = torch.linalg.svdvals(factor)
    ratios = (values / values[0]).tolist()
    if kind == "scale_lora":
        assert ratios[1] < 1e-6
    else:
        assert ratios[4] > 1e-2  # the ones and four columns of B
        assert ratios[5] < 1e-6


# -- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_the_resolution_of_storage_add_up(dtype: torch.dtype) -> None:
    weights = {}
    for stored in (dtype, torch.float32):
        norm = nn.LayerNorm(4, dtype=stored)
        Loop(norm, {"norm": norm_parameters(norm)}, 5e-5, lambda k, n=norm: n.weight.float().sum(), 300).run()
        assert norm.weight.dtype == stored
        weights[stored] = norm.weight.detach().float()
    exact = weights[torch.float32]
    assert 0.98 < float(exact[0]) < 0.995  # 300 · 5e-5 / 2, in steps of less than half of the resolution at 1
    assert torch.equal(weights[dtype], exact.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_add_micro_batches_up_and_know_their_size(dtype: torch.dtype) -> None:
    """Gradients of the size of Adam's epsilon: a wrong sum or factor shows. Below 6e-8 all is 0 in float16."""
    parts = (1.0, 1.0, -1.5, 2.5, -0.5, 0.25)
    masters = {}
    for stored in (dtype, torch.float32):
        layer = nn.Linear(4, 1, bias=False, dtype=stored)
        layer.weight.data.fill_(0.5)

        def loss(index: int, weight: Tensor = layer.weight) -> Tensor:
            return weight.float().sum() * (1e-8 * parts[index])

        loop = Loop(layer, all_of(layer), 0.1, loss, 2, accumulate=3)
        loop.run()
        masters[stored] = loop.state_dict()["parameters"]["all/weight"]
    assert masters[dtype].dtype == torch.float32
    torch.testing.assert_close(masters[dtype] - 0.5, masters[torch.float32] - 0.5, rtol=1e-2, atol=0)
    assert float(masters[torch.float32][0, 0]) < 0.48  # it moved


def test_the_scale_falls_until_float16_gradients_are_finite() -> None:
    def start() -> tuple[nn.Linear, Loop, list[int]]:
        layer = nn.Linear(4, 1, bias=False, dtype=torch.float16)
        layer.weight.data.copy_(torch.tensor([[0.5, -0.25, 1.0, -1.0]]))
        draws, seen = seeded(), []

        def loss(index: int) -> Tensor:
            seen.append(int(torch.randint(1000, (), generator=draws)))
            return 100 * layer.weight.float().square().sum()

        return layer, Loop(layer, all_of(layer), 0.1, loss, 5, generator=draws), seen

    layer, loop, seen = start()
    wide = nn.Linear(4, 1, bias=False)
    wide.weight.data.copy_(layer.weight)
    expected = Loop(wide, all_of(wide), 0.1, lambda k: 100 * wide.weight.square().sum(), 5)
    assert loop.run() == pytest.approx(expected.run(), rel=1e-2)
    torch.testing.assert_close(layer.weight.float(), wide.weight, rtol=1e-2, atol=1e-3)
    state = loop.state_dict()
    assert 1 < state["scale"] < 2**16
    draws = seeded()
    each = [int(torch.randint(1000, (), generator=draws)) for _ in range(5)]
    assert len(seen) > 5  # steps were taken again,
    assert list(dict.fromkeys(seen)) == each  # with the draws of the first try
    _, again, _ = start()
    again.load_state_dict(state)
    assert again.state_dict()["scale"] == state["scale"]


def test_autocast_is_on_while_the_loss_is_computed() -> None:
    layer, loss = regression()
    dtypes = []

    def noting(index: int) -> Tensor:
        dtypes.append(layer(torch.zeros(1, 5)).dtype)
        return loss(index)

    Loop(layer, all_of(layer), 0.01, noting, 1, autocast=True).run()
    Loop(layer, all_of(layer), 0.01, noting, 1).run()
    assert dtypes == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


# -- a run that is killed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("killed_after", [0, 1, 5])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(dtype: torch.dtype, killed_after: int) -> None:
    batches = batches_for("llama", count=4)

    def start(seed: int) -> tuple[nn.Module, Loop]:
        # another start of the adapters: all that counts must come out of the state
        model, _, _ = sparse_llama("mask_lora", dtype, rank=2, seed=seed)
        draws = seeded(seed)

        def loss(index: int) -> Tensor:
            ids = batches[int(torch.randint(4, (), generator=draws))]
            result: Tensor = model(ids, labels=ids).loss
            return result

        rates = {"norm": 1e-2, "adapters": 1e-3}
        groups = parameters_of(model, {"norm", "adapters"})
        return model, Loop(model, groups, rates, loss, 7, accumulate=2, generator=draws)

    whole, loop = start(seed=1)
    losses = loop.run()
    _, first = start(seed=1)
    first.run(until=killed_after)
    state = first.state_dict()
    first.run()  # the state is a copy: what happens afterwards does not reach it
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed, second = start(seed=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.step == killed_after
    assert second.run() == losses
    assert len(set(losses)) > 3
    for name, weight in weights_of(whole).items():
        assert torch.equal(resumed.get_parameter(name), weight), name


def test_a_state_of_another_training_is_refused() -> None:
    layer, loss = regression()
    state = Loop(layer, all_of(layer), 0.1, loss, 4).state_dict()
    for other in (
        Loop(layer, all_of(layer), 0.1, loss, 5),
        Loop(layer, {"b": {"bias": layer.bias}}, 0.1, loss, 4),
        Loop(layer, all_of(layer), 0.1, loss, 4, generator=seeded()),
    ):
        with pytest.raises(BillhookError, match="saved state is of another training"):
            other.load_state_dict(state)
    Loop(layer, all_of(layer), 0.1, loss, 4).load_state_dict(state)


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_a_loss_that_cannot_be_trained_is_named() -> None:
    layer, loss = regression()

    def run(loss: Callable[[int], Tensor]) -> None:
        Loop(layer, {"b": {"bias": layer.bias}}, 0.1, loss, 3).run()

    with pytest.raises(BillhookError, match="depends on none of the trained parameters"):
        run(lambda k: layer.weight.square().sum())
    with pytest.raises(BillhookError, match="loss is not finite at step 2"):
        run(lambda k: loss(k) * (math.inf if k == 2 else 1))
    with pytest.raises(BillhookError, match="gradients are not finite at step 0"):
        run(lambda k: (layer.bias * 0).sqrt().sum())


def test_mistakes_in_the_settings_are_named() -> None:
    layer, loss = regression()
    groups = all_of(layer)
    for change in ({"steps": -1}, {"accumulate": 0}, {"warmup": 1.5}, {"warmup": -0.1}):
        options = {"steps": 3, **change}
        with pytest.raises(BillhookError, match="do not describe a training"):
            Loop(layer, groups, 0.1, loss, **options)  # type: ignore[arg-type]
    with pytest.raises(BillhookError, match="nothing to train"):
        Loop(layer, {"norm": {}}, 0.1, loss, 3)
    with pytest.raises(BillhookError, match="in two groups"):
        Loop(layer, {"a": {"bias": layer.bias}, "b": {"bias": layer.bias}}, 0.1, loss, 3)
    with pytest.raises(BillhookError, match="No learning rate is given for the group 'all'"):
        Loop(layer, groups, {"norm": 0.1}, loss, 3)
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(BillhookError, match="learning rate of the group 'all' is"):
            Loop(layer, groups, rate, loss, 3)


def test_a_constant_rate_with_decay_and_clipping_is_the_loop_written_out() -> None:
    layer, loss = regression()
    other, other_loss = regression()
    Loop(layer, all_of(layer), 0.05, loss, 7, weight_decay=0.3, clip=0.1, constant=True).run()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.3)
    for index in range(7):
        optimizer.zero_grad()
        other_loss(index).backward()  # type: ignore[no-untyped-call]
        assert float(nn.utils.clip_grad_norm_(other.parameters(), 0.1)) > 0.1
        optimizer.step()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
