"""The stepping pruner in a plain training loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.training import PRUNERS, SparseTraining, apply_masks, held
from billhook.training.prunable import prunable

STEPS = 40


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}
METHODS: dict[str, dict[str, Any]] = {
    "gmp": {"update_every": 2},
    "granet": {"update_every": 2},
    "rigl": {"update_every": 2},
    "set": {"update_every": 2},
    "static": {},
    "snip": {},
    "one-shot": {},
}


def train(
    model: nn.Module, optimizer: Any, pruner: Any, first: int = 0, last: int = STEPS, accumulate: int = 1
) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch(step * accumulate + part)
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if pruner is not None:
            pruner.step()


def make(name: str, **more: Any) -> SparseTraining:
    return PRUNERS.make(name, **{"sparsity": 0.8, **METHODS[name], **more})


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_zeros_hold_and_the_count_is_exact(name: str, kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    pruner = make(name).attach(model, optimizer, STEPS)
    for step in range(STEPS):
        train(model, optimizer, pruner, step, step + 1, accumulate=2)
        for key, weight in pruner.weights.items():
            absent = ~pruner.masks[key]
            assert not bool(weight.detach()[absent].any())
            for value in optimizer.state[weight].values():
                if torch.is_tensor(value) and value.shape == weight.shape:
                    assert not bool(value[absent].any())
    reached = pruner.finalize()
    wanted = round(0.2 * pruner.total)
    assert pruner.active == wanted or (name in ("rigl", "set", "static") and abs(pruner.active - wanted) <= 3)
    weights = prunable(model)
    assert sum(int(w.count_nonzero()) for w in weights.values()) <= pruner.active
    assert set(reached) == set(weights)
    assert type(model) is nn.Sequential
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_resume_gives_the_same_bits(name: str, late: bool) -> None:
    whole = net()
    optimizer = OPTIMIZERS["sgd"](whole.parameters())
    pruner = make(name).attach(whole, optimizer, STEPS)
    train(whole, optimizer, pruner, 0, 15)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(whole, optimizer, pruner, 15, STEPS)

    again = net(seed=9)
    optimizer = OPTIMIZERS["sgd"](again.parameters())
    if late:  # the pruner first, or last
        resumed = make(name).attach(again, optimizer, STEPS)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if late:
        resumed.load_state_dict(saved[2])
    else:
        resumed = make(name).attach(again, optimizer, STEPS, saved[2])
    train(again, optimizer, resumed, 15, STEPS)
    for (key, first), second in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second), key
    assert all(torch.equal(pruner.masks[n], resumed.masks[n]) for n in pruner.masks)


def test_granet_without_exchange_is_gmp() -> None:
    masks = []
    for method in (make("gmp"), make("granet", regeneration=0.0, least_regeneration=0.0)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = method.attach(model, optimizer, STEPS)
        train(model, optimizer, pruner)
        masks.append((pruner.masks, copy.deepcopy(model.state_dict())))
    assert all(torch.equal(masks[0][0][n], masks[1][0][n]) for n in masks[0][0])
    assert all(torch.equal(v, masks[1][1][k]) for k, v in masks[0][1].items())


def test_gmp_against_ten_lines() -> None:
    """The masks of every step equal those of an independent loop."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner = make("gmp").attach(model, optimizer, STEPS)
    other = net()
    plain = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    names = list(pruner.weights)
    weights = [other.get_parameter(n) for n in names]
    keep = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    for step in range(STEPS):
        train(model, optimizer, pruner, step, step + 1)
        train(other, plain, None, step, step + 1)
        with torch.no_grad():
            for w, m in zip(weights, keep, strict=True):
                w.mul_(m)
            t = step + 1
            if t % 2 == 0 and t <= 20:
                sparsity = 0.8 - 0.8 * (1 - t / 20) ** 3
                flat = torch.cat([(w.abs() + 1e-30).mul(m).flatten() for w, m in zip(weights, keep, strict=True)])
                order = flat.argsort(descending=True)[: round((1 - sparsity) * flat.numel())]
                chosen = torch.zeros_like(flat, dtype=torch.bool)
                chosen[order] = True
                keep = [c.view_as(w) for c, w in zip(chosen.split([w.numel() for w in weights]), weights, strict=True)]
            for w, m in zip(weights, keep, strict=True):
                w.mul_(m)
                buffer = plain.state[w].get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(m)
        assert all(torch.equal(pruner.masks[n], m) for n, m in zip(names, keep, strict=True)), step
    assert all(torch.allclose(model.get_parameter(n), w, atol=1e-6) for n, w in zip(names, weights, strict=True))


def test_granet_against_its_steps_written_out() -> None:
    """Prune over all layers, then exchange within each: the masks of every step equal those of a plain loop.

    Among equal ones the first in order leaves first, and is grown last.
    """
    model, other = net(), net()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, other))
    pruner = make("granet").attach(model, optimizer, STEPS)
    names = list(pruner.weights)
    weights = [other.get_parameter(n) for n in names]
    total = sum(w.numel() for w in weights)
    keep = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    moved = 0

    def enforce() -> None:
        for w, m in zip(weights, keep, strict=True):
            w.mul_(m)
            plain.state[w]["momentum_buffer"].mul_(m)

    for t in range(1, 27):  # past the end of the ramp at 20
        train(model, optimizer, pruner, t - 1, t)
        train(other, plain, None, t - 1, t)
        with torch.no_grad():
            enforce()
            if t % 2 == 0:
                left = round((1 - (0.8 - 0.8 * (1 - min(t / 20, 1)) ** 3)) * total)
                flat = torch.cat([(w.abs() + 1e-30).mul(m).flatten() for w, m in zip(weights, keep, strict=True)])
                pruned = torch.zeros(total, dtype=torch.bool)
                pruned[flat.argsort(stable=True)[total - left :]] = True
                rate = 0.005 + 0.495 / 2 * (1 + math.cos(math.pi * t / STEPS))
                for i, part in enumerate(pruned.split([w.numel() for w in weights])):
                    count = math.ceil(rate * int(part.sum()))
                    gradient = weights[i].grad
                    assert gradient is not None
                    size, pull = (x.abs().flatten().tolist() for x in (weights[i], gradient))
                    by_size = sorted((size[j], j) for j in part.nonzero().flatten().tolist())
                    stay = {j for _, j in by_size[count:]}
                    by_pull = sorted((pull[j], j) for j in range(len(part)) if j not in stay)
                    new = torch.zeros_like(part)
                    new[[*stay, *(j for _, j in by_pull[len(by_pull) - count :])]] = True
                    assert int(pruner.masks[names[i]].sum()) == int(part.sum())  # no layer's number changes
                    moved += int((new & ~keep[i].flatten()).sum())
                    keep[i] = new.view_as(weights[i])
                assert pruner.active == left
            enforce()
        assert all(torch.equal(pruner.masks[n], m) for n, m in zip(names, keep, strict=True)), t
    assert moved > 100
    assert all(torch.allclose(model.get_parameter(n), w, atol=1e-6) for n, w in zip(names, weights, strict=True))


def test_granet_at_a_constant_sparsity_keeps_every_layers_count() -> None:
    def run(draw: int) -> tuple[dict[str, torch.Tensor], int]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        method = make("granet", sparsity=0.7, initial_sparsity=0.7, growth="random", draw=draw)
        pruner = method.attach(model, optimizer, STEPS)
        start = {n: m.clone() for n, m in pruner.masks.items()}
        train(model, optimizer, pruner, 0, 8)
        assert {n: int(m.sum()) for n, m in pruner.masks.items()} == {n: int(m.sum()) for n, m in start.items()}
        return pruner.masks, sum(int((m & ~start[n]).sum()) for n, m in pruner.masks.items())

    (first, moved), (again, _), (other, _) = run(1), run(1), run(2)
    assert moved > 100
    assert all(torch.equal(first[n], again[n]) for n in first)  # the same seed, the same masks
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_a_weight_that_is_dropped_and_grown_at_once_keeps_value_and_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    weight = model.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    pruner = make("rigl", sparsity=0.5, update_every=1, end=1.0).attach(model, optimizer, 10)
    before = pruner.masks["weight"].clone()
    place = tuple(before.nonzero()[3].tolist())
    with torch.no_grad():
        weight.copy_(torch.where(before, weight.sign() * (1 + weight.abs()), 0))
        weight[place] = 0.02  # by far the smallest, and its gradient will be by far the largest
    weight.grad = torch.randn(5, 6)
    weight.grad[place] = 50.0
    optimizer.step()
    value, momentum = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    pruner.step()
    after = pruner.masks["weight"]
    assert after[place]
    assert weight[place] == value[place] != 0
    assert optimizer.state[weight]["momentum_buffer"][place] == momentum[place] == 50
    grown = after & ~before
    assert grown.any()
    assert not weight[grown].any()
    assert not optimizer.state[weight]["momentum_buffer"][grown].any()


def test_sparse_to_sparse_counts_are_constant_and_growth_changes_nothing() -> None:
    model = net().eval()  # the same function before and after a growth needs no batch statistics
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = make("rigl", sparsity=0.7).attach(model, optimizer, STEPS)
    counts = {n: int(m.sum()) for n, m in pruner.masks.items()}
    before = None
    for step in range(STEPS):
        old = {n: m.clone() for n, m in pruner.masks.items()}
        train(model, optimizer, None, step, step + 1)
        dropped = copy.deepcopy(model)
        pruner.step()
        assert {n: int(m.sum()) for n, m in pruner.masks.items()} == counts
        for name, mask in pruner.masks.items():
            grown = mask & ~old[name]
            assert not bool(model.get_parameter(name).detach()[grown].any())  # starts at zero
            before = before or bool(grown.any())
        apply_masks(dropped, {n: mask & old[n] for n, mask in pruner.masks.items()})
        x, _ = batch(step)
        assert torch.allclose(model(x), dropped(x), atol=1e-6)  # the drop changes the function, the growth does not
    assert before


def test_the_grown_weights_have_the_largest_gradients() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = make("rigl", sparsity=0.7, update_every=1, end=1.0).attach(model, optimizer, STEPS)
    old = {n: m.clone() for n, m in pruner.masks.items()}
    train(model, optimizer, pruner, 0, 1)
    for name, mask in pruner.masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        grown, passed = mask & ~old[name], ~mask & ~old[name]
        if old[name].all():
            continue  # the thin first layer is dense
        assert grown.any()
        assert gradient.abs()[grown].min() >= gradient.abs()[passed].max()


def test_snip_looks_before_the_first_step() -> None:
    model = net()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    names = list(prunable(model))
    scores = torch.cat([(w * w.grad).abs().flatten() for w in (model.get_parameter(n) for n in names)])  # type: ignore[operator]
    kept = scores.argsort(descending=True)[: round(0.2 * scores.numel())]
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected[kept] = True
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = make("snip").attach(model, optimizer, STEPS)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    pruner.step()
    assert torch.equal(torch.cat([pruner.masks[n].flatten() for n in names]), expected)


def test_a_skipped_optimizer_step_postpones_the_update() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = make("granet", update_every=2).attach(model, optimizer, STEPS)
    train(model, optimizer, pruner, 0, 1)
    pruner.step()  # step 2 is due, but a loss scaler skipped the optimizer
    assert pruner.sparsity == 0
    train(model, optimizer, pruner, 2, 3)
    assert pruner.sparsity > 0


def test_growth_at_random_keeps_the_count() -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = make("granet", growth="random").attach(model, optimizer, STEPS)
    train(model, optimizer, pruner)
    assert pruner.active == round(0.2 * pruner.total)
    pruner.finalize()


def test_a_ramp_may_end_with_the_training() -> None:
    for name in ("granet", "gmp"):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pruner = make(name, update_every=10, end=1.0).attach(model, optimizer, STEPS)
        train(model, optimizer, pruner)
        assert pruner.active == round(0.2 * pruner.total)
        pruner.finalize()


def test_layers_of_equal_sparsity_begin_with_it() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    method = make("gmp", scope="layer", sparsity=0.8, initial_sparsity=0.8)
    pruner = method.attach(model, optimizer, STEPS)
    train(model, optimizer, pruner)
    assert all(abs(float(m.float().mean()) - 0.2) < 1 / m.numel() for m in pruner.masks.values())


class TestRefusals:
    def setup_method(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def test_past_the_end(self) -> None:
        pruner = make("gmp").attach(self.model, self.optimizer, 4)
        train(self.model, self.optimizer, pruner, 0, 4)
        with pytest.raises(BillhookError, match="attached for 4 steps"):
            pruner.step()
        pruner.finalize()
        with pytest.raises(BillhookError, match="finalized"):
            pruner.step()

    def test_two_pruners(self) -> None:
        first = make("gmp").attach(self.model, self.optimizer, STEPS)
        with pytest.raises(BillhookError, match=r"0\.weight belongs to another pruner \(gmp\)"):
            make("gmp").attach(self.model, self.optimizer, STEPS)
        first.detach()
        make("gmp").attach(self.model, self.optimizer, STEPS).detach()

    def test_foreign_optimizer(self) -> None:
        with pytest.raises(BillhookError, match=r"does not train 0\.weight"):
            make("gmp").attach(self.model, torch.optim.SGD(net().parameters(), lr=0.1), STEPS)
        with pytest.raises(BillhookError, match="not a torch optimizer"):
            make("gmp").attach(self.model, object(), STEPS)

    def test_replaced_parameters(self) -> None:
        self.model[4] = nn.Linear(6 * 16, 24)
        with pytest.raises(BillhookError, match=r"does not train 4\.weight"):
            make("gmp").attach(self.model, self.optimizer, STEPS)

    def test_unreachable(self) -> None:
        with pytest.raises(BillhookError, match=r"0\.weight has 54 weights and would keep none"):
            make("static", sparsity=0.995, distribution="uniform").attach(self.model, self.optimizer, STEPS)
        make("gmp").attach(self.model, self.optimizer, STEPS).detach()  # the failed attach let go of the model

    def test_nothing_to_prune(self) -> None:
        model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
        with pytest.raises(BillhookError, match="nothing to prune"):
            make("gmp").attach(model, torch.optim.SGD(model.parameters(), lr=0.1), STEPS)
        with pytest.raises(BillhookError, match="matches no prunable weight"):
            make("gmp", exclude=["nope.*"]).attach(self.model, self.optimizer, STEPS)

    def test_bad_gradients(self) -> None:
        pruner = make("granet").attach(self.model, self.optimizer, STEPS)
        train(self.model, self.optimizer, pruner, 0, 1)
        x, y = batch(1)
        nn.functional.cross_entropy(self.model(x), y).backward()
        weight = self.model.get_parameter("4.weight")
        assert weight.grad is not None
        weight.grad[0, 0] = float("nan")
        self.optimizer.step()
        with pytest.raises(BillhookError, match=r"gradient of 4\.weight is not finite at step 2"):
            pruner.step()

    def test_cleared_gradients(self) -> None:
        pruner = make("granet", update_every=1).attach(self.model, self.optimizer, STEPS)
        x, y = batch(0)
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with pytest.raises(BillhookError, match=r"before zero_grad\(\)"):
            pruner.step()

    def test_foreign_state(self) -> None:
        pruner = make("gmp").attach(self.model, self.optimizer, STEPS)
        state = pruner.state_dict()
        pruner.detach()
        other = nn.Linear(3, 3)
        elsewhere = make("gmp").attach(other, torch.optim.SGD(other.parameters(), lr=0.1), STEPS)
        with pytest.raises(BillhookError, match="another model"):
            elsewhere.load_state_dict(state)
        with pytest.raises(BillhookError, match=r"of gmp\(sparsity=0\.8.*not of gmp\(sparsity=0\.7"):
            make("gmp", sparsity=0.7).attach(self.model, self.optimizer, STEPS).load_state_dict(state)

    def test_too_early(self) -> None:
        pruner = make("gmp").attach(self.model, self.optimizer, STEPS)
        train(self.model, self.optimizer, pruner, 0, 5)
        with pytest.raises(BillhookError, match="after 5 of 40 steps"):
            pruner.finalize()
        pruner.finalize(force=True)

    def test_no_room_for_updates(self) -> None:
        with pytest.raises(BillhookError, match="does not fit"):
            make("gmp", update_every=30).attach(self.model, self.optimizer, STEPS)

    def test_options(self) -> None:
        with pytest.raises(BillhookError, match="above sparsity"):
            bh.GraNet(sparsity=0.5, initial_sparsity=0.6)
        with pytest.raises(BillhookError, match="not before end"):
            bh.GraNet(sparsity=0.5, start=0.8, end=0.6)


def test_a_language_models_head_and_embedding_stay() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8
        )
    )
    names = list(prunable(model))
    assert len(names) == 7
    assert all("layers.0" in name for name in names)


def test_held_masks_survive_a_loop_that_knows_nothing() -> None:
    model = net()
    masks = {n: torch.rand_like(w) > 0.7 for n, w in prunable(model).items()}
    with held(model, masks):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        for step in range(5):
            train(model, optimizer, None, step, step + 1, accumulate=2)
            assert all(not bool(model.get_parameter(n).detach()[~m].any()) for n, m in masks.items())
    x, y = batch(0)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model.get_parameter("4.weight").grad
    assert gradient is not None
    assert bool(gradient[~masks["4.weight"]].any())
    apply_masks(model, {"4.weight": torch.zeros(24, 96, dtype=torch.bool)})
    assert not bool(model.get_parameter("4.weight").any())
