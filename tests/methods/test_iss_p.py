"""ISS-P against its definition, one statement of its sheet at a time."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.errors import BillhookError

STEPS, LAST = 30, 10


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


def train(model: nn.Module, optimizer: Any, pruner: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


def method(**options: Any) -> bh.ISSP:
    goal = {} if "pattern" in options else {"sparsity": 0.8}
    return bh.ISSP(**{**goal, "until": LAST / STEPS, "least": 0, **options})


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def set_gradient(weight: nn.Parameter, value: list[float]) -> None:
    weight.grad = torch.tensor(value).view(weight.shape)


def test_no_shrinking_is_dense_training_and_one_shot() -> None:
    model, dense = net(), net()
    optimizer, plain = sgd(model), sgd(dense)
    pruner = method(shrink=1.0).attach(model, optimizer, STEPS)
    train(model, optimizer, pruner, 0, LAST - 1)
    train(dense, plain, None, 0, LAST - 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    train(model, optimizer, pruner, LAST - 1, LAST)
    train(dense, plain, None, LAST - 1, LAST)
    for name, mask in pruner.masks.items():
        weight = dense.get_parameter(name).detach()
        dropped = weight.abs().flatten().argsort()[: math.ceil(0.8 * weight.numel())]
        expected = torch.ones(weight.numel(), dtype=torch.bool)
        expected[dropped] = False
        assert torch.equal(mask.flatten(), expected)


def test_hard_thresholding_is_the_projection_on_few_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    optimizer = sgd(model)
    pruner = method(shrink=0.0, sparsity=0.7).attach(model, optimizer, STEPS)
    for _ in range(LAST):
        weight = model.weight.detach().clone().flatten()
        set_gradient(model.weight, torch.randn(12).tolist())
        buffer = optimizer.state[model.weight].get("momentum_buffer")
        assert model.weight.grad is not None
        velocity = model.weight.grad.flatten() + (0.9 * buffer.flatten() if buffer is not None else 0)
        stepped = weight - 0.1 * velocity
        optimizer.step()
        pruner.step()
        count = math.ceil(0.7 * 12)
        assert int((model.weight == 0).sum()) == count
        best = min(
            (float((stepped[list(zeros)] ** 2).sum()) for zeros in itertools.combinations(range(12), count)),
        )
        assert float((stepped - model.weight.detach().flatten()).square().sum()) == pytest.approx(best, rel=1e-4)


def test_without_learning_small_weights_fade_geometrically() -> None:
    model = net()
    start = copy.deepcopy(model)
    optimizer = sgd(model, lr=0.0)
    pruner = method().attach(model, optimizer, STEPS)
    train(model, optimizer, pruner, 0, LAST - 1)
    for name in pruner.weights:
        before, after = start.get_parameter(name), model.get_parameter(name)
        small = before.abs() <= before.abs().flatten().kthvalue(math.ceil(0.8 * before.numel())).values
        assert torch.allclose(after[small], before[small] * 0.95 ** (LAST - 1), rtol=1e-6, atol=0)
        assert torch.equal(after[~small], before[~small])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts_are_exact_where_all_magnitudes_are_equal(dtype: torch.dtype) -> None:
    weight = torch.ones(7, 11, dtype=dtype)
    weight[::2] *= -1
    assert int((~method().important(weight)).sum()) == math.ceil(0.8 * 77)
    assert bool(method(sparsity=0.0).important(weight).all())
    assert bool(method(least=100).important(weight).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("sparsity", "count"), [(0.8, 160), (0.803, 161), (0.999, 199), (0.0, 0)])
def test_every_step_shrinks_that_many_weights_and_no_other(dtype: torch.dtype, sparsity: float, count: int) -> None:
    """ceil(p · n), at most 99.5% of a layer; once they are smaller, it is the same weights at the next step."""
    model = nn.Linear(20, 10, bias=False, dtype=dtype)
    nn.init.ones_(model.weight)
    optimizer = sgd(model, lr=0.0)
    pruner = method(sparsity=sparsity).attach(model, optimizer, STEPS)
    once = torch.tensor(0.95, dtype=dtype)
    for factor in (once, once * once):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        pruner.step()
        assert model.weight.detach().flatten().tolist() == [float(factor)] * count + [1.0] * (200 - count)


def test_a_pushed_weight_settles_at_the_bound() -> None:
    """Constant steps of gamma on one unimportant weight: |w| -> shrink · gamma / (1 − shrink)."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = method(sparsity=0.5, until=1.0).attach(model, optimizer, 1001)
    for _ in range(1000):
        model.weight.grad = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
        optimizer.step()
        pruner.step()
    assert float(model.weight[0, 1].detach()) == pytest.approx(0.95e-3 / 0.05, rel=1e-6)


@pytest.mark.parametrize(("push", "overtakes"), [(0.06, True), (0.04, False)])
def test_a_weight_comes_back_if_its_gradient_is_strong_enough(push: float, overtakes: bool) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.9]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = method(sparsity=0.5, until=1.0).attach(model, optimizer, 400)
    happened = False
    for _ in range(300):
        set_gradient(model.weight, [0.0, -push])
        optimizer.step()
        pruner.step()
        happened = happened or float(model.weight[0, 1].detach()) > float(model.weight[0, 0].detach())
    assert happened == overtakes


def test_zeros_stay_after_the_freeze() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = method(until=5 / 205).attach(model, optimizer, 205)
    train(model, optimizer, pruner, 0, 5)
    zeros = {n: w.detach() == 0 for n, w in pruner.weights.items()}
    assert sum(int(z.sum()) for z in zeros.values()) == math.ceil(0.8 * 120) + math.ceil(0.8 * 60)
    train(model, optimizer, pruner, 5, 205)
    assert all(not bool(w.detach()[zeros[n]].any()) for n, w in pruner.weights.items())
    pruner.finalize()


def test_resume_while_shrinking() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = method().attach(model, optimizer, STEPS)
    train(model, optimizer, pruner, 0, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, optimizer, pruner, 4, STEPS)
    again = net()
    optimizer = sgd(again)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed = method().attach(again, optimizer, STEPS, saved[2])
    train(again, optimizer, resumed, 4, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_step_comes_before_the_shrinking() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.5]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = method(sparsity=0.5).attach(model, optimizer, STEPS)
    set_gradient(model.weight, [0.0, -0.1])
    optimizer.step()
    pruner.step()
    assert float(model.weight[0, 1].detach()) == pytest.approx(0.95 * (0.5 + 0.1))  # not 0.95 · 0.5 + 0.1


def test_patterns() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    keep = method(pattern="2:4").important(weight)
    assert (keep.view(6, 2, 4).sum(-1) == 2).all()
    assert bool(method(pattern="2:4").important(torch.randn(6, 7)).all())  # a width that 4 does not divide
    with pytest.raises(BillhookError, match="Pattern '4:2'"):
        method(pattern="4:2")


def test_n_of_m_goes_along_the_inputs_whichever_axis_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), Conv1D(12, 8))
    model[1].weight.data.copy_(torch.randn(8, 12))
    optimizer = sgd(model, lr=0.0)
    pruner = method(pattern="2:4").attach(model, optimizer, STEPS)
    for _ in range(STEPS):
        for weight in pruner.weights.values():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        pruner.step()
    for rows in (model[0].weight, model[1].weight.T):  # [out, in]
        assert bool((rows.reshape(-1, 4).count_nonzero(1) == 2).all())


def test_a_factor_that_rounds_to_one_is_refused() -> None:
    model = nn.Linear(40, 40).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(BillhookError, match=r"shrink=0\.999 rounds to 1 in bfloat16, the dtype of weight"):
        bh.ISSP(sparsity=0.9, shrink=0.999).attach(model, optimizer, 10)
    bh.ISSP(sparsity=0.9, shrink=0.99).attach(model, optimizer, 10).detach()
    bh.ISSP(sparsity=0.9, shrink=1).attach(model, optimizer, 10).detach()  # one-shot is meant


def test_a_pattern_has_a_sparsity_of_its_own() -> None:
    assert bh.ISSP(sparsity=0.5, pattern="2:4").pattern == "2:4"
    with pytest.raises(BillhookError, match=r"sparsity=0\.9 is not that of 2:4, 0\.5: leave sparsity out"):
        bh.ISSP(sparsity=0.9, pattern="2:4")
