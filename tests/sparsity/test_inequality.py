"""The PQ and Gini indices: bounds, the six properties of a sparsity measure, closed forms, definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import billhook as bh
from billhook.analysis import gini, pq_index

NORMS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4), (0.3, 2.5)]


def by_definition(x: Tensor, p: float, q: float) -> float:
    w = x.double().abs()
    norms = [float(w.pow(power).sum()) ** (1 / power) for power in (p, q)]
    return 1 - w.numel() ** (1 / q - 1 / p) * norms[0] / norms[1]


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_lowest_and_highest(p: float, q: float) -> None:
    assert abs(float(pq_index(torch.full((50,), -0.37), p, q))) < 1e-6
    one_hot = torch.zeros(50)
    one_hot[7] = 3e-4
    assert float(pq_index(one_hot, p, q)) == pytest.approx(1 - 50 ** (1 / q - 1 / p), abs=1e-6)


@pytest.mark.parametrize(("p", "q"), NORMS)
@pytest.mark.parametrize("size", [1, 2, 9, 1000])
def test_against_the_definition(p: float, q: float, size: int) -> None:
    torch.manual_seed(size)
    for x in (torch.randn(size), torch.randn(size).exp(), torch.randn(size).double()):
        assert float(pq_index(x, p, q)) == pytest.approx(by_definition(x, p, q), abs=2e-7)


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_neither_scale_nor_order_nor_length_matters(p: float, q: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(300)
    index = float(pq_index(x, p, q))
    for same in (x * 7.3, x * 1e-30, x * 1e30, -x, x[torch.randperm(300)], torch.cat([x, x]), x.view(3, 10, 10)):
        assert float(pq_index(same, p, q)) == pytest.approx(index, abs=1e-6)


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_strict_properties(p: float, q: float) -> None:
    """Robin Hood, rising tide, babies and Bill Gates, on non-negative vectors."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        w = torch.rand(20, generator=generator, dtype=torch.float64) ** 2
        index = float(pq_index(w, p, q))
        order = w.argsort()
        poor, rich = int(order[int(torch.randint(0, 10, (), generator=generator))]), int(order[-1])
        levelled = w.clone()
        moved = float(torch.rand((), generator=generator)) * float(w[rich] - w[poor]) / 2
        levelled[rich] -= moved
        levelled[poor] += moved
        assert float(pq_index(levelled, p, q)) < index
        assert float(pq_index(w + 0.1, p, q)) < index
        assert float(pq_index(torch.cat([w, torch.zeros(1)]), p, q)) > index
        for i in range(20):
            gates = w.clone()
            gates[i] = 1e3 * w.max()
            more = gates.clone()
            more[i] *= 2
            assert index < float(pq_index(gates, p, q)) < float(pq_index(more, p, q))


def test_closed_forms() -> None:
    torch.manual_seed(0)
    gauss, uniform = torch.randn(2_000_000), torch.rand(2_000_000)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((2_000_000,))
    expected = [
        (gauss, 1.0, 2.0, 1 - math.sqrt(2 / math.pi)),
        (gauss, 0.5, 1.0, 1 - math.gamma(0.75) ** 2 / math.sqrt(math.pi)),
        (laplace, 1.0, 2.0, 1 - 1 / math.sqrt(2)),
        (laplace, 0.5, 1.0, 1 - math.pi / 4),
        (uniform, 1.0, 2.0, 1 - math.sqrt(3) / 2),
        (uniform, 0.5, 1.0, 1 / 9),
    ]
    for x, p, q, value in expected:
        assert float(pq_index(x, p, q)) == pytest.approx(value, abs=3e-3)
    assert [round(value, 4) for *_, value in expected] == [0.2021, 0.1528, 0.2929, 0.2146, 0.1340, 0.1111]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_mask_is_the_gathered_entries(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 40).to(dtype)
    mask = torch.rand(12, 40) < 0.4
    mask[3] = False
    mask[5] = True
    for p, q in NORMS:
        index = float(pq_index(x, p, q, mask))
        assert index == pytest.approx(by_definition(x[mask], p, q), abs=1e-6)
        assert float(pq_index(x * mask, p, q, mask)) == pytest.approx(index, abs=1e-9)
        longer = torch.cat([x, torch.zeros(5, 40, dtype=dtype)]), torch.cat([mask, torch.zeros(5, 40) > 0])
        assert float(pq_index(longer[0], p, q, longer[1])) == pytest.approx(index, abs=1e-9)
        assert float(pq_index(x * mask, p, q)) > index  # without the mask zeros count
        rows = pq_index(x, p, q, mask, dim=1)
        assert rows.shape == (12,)
        assert rows[3] == 0
        for row in (0, 5, 11):
            assert float(rows[row]) == pytest.approx(by_definition(x[row][mask[row]], p, q), abs=1e-6)
    assert float(gini(x, mask)) == pytest.approx(float(gini(x[mask])), abs=1e-12)


def test_several_tensors_are_one_vector() -> None:
    torch.manual_seed(0)
    parts = {"a": torch.randn(30, 4), "b": 1e-3 * torch.randn(50), "c": torch.zeros(7), "d": 1e4 * torch.randn(2, 3, 5)}
    whole = torch.cat([part.flatten() for part in parts.values()])
    masks = {name: torch.rand(part.shape) < 0.7 for name, part in parts.items()}
    for p, q in NORMS:
        assert float(pq_index(parts, p, q)) == pytest.approx(by_definition(whole, p, q), abs=1e-6)
        present = torch.cat([part[masks[name]] for name, part in parts.items()])
        assert float(pq_index(parts, p, q, masks)) == pytest.approx(by_definition(present, p, q), abs=1e-6)


def test_gini_against_all_pairs() -> None:
    torch.manual_seed(0)
    for x in (torch.randn(40), torch.rand(5, 7), torch.tensor([3.0])):
        w = x.abs().double().flatten()
        pairs = float((w[:, None] - w).abs().sum()) / (2 * len(w) * float(w.sum()))
        assert float(gini(x)) == pytest.approx(pairs, abs=1e-9)
    assert float(gini(torch.full((9,), 2.0))) == pytest.approx(0, abs=1e-12)
    assert float(gini(torch.tensor([0.0, 0, 0, 5]))) == pytest.approx(0.75)


def test_no_weights_at_all_are_even() -> None:
    assert float(pq_index(torch.zeros(4))) == 0
    assert float(gini(torch.zeros(4))) == 0
    absent = torch.zeros(4, dtype=torch.bool)
    assert float(pq_index(torch.ones(4), 0.5, 1.0, absent)) == 0
    assert float(gini(torch.ones(4), absent)) == 0
    assert float(pq_index({"a": torch.zeros(4), "b": torch.zeros(2)})) == 0


def test_mistakes_get_a_sentence() -> None:
    x = torch.ones(4)
    for p, q in ((1.0, 1.0), (2.0, 1.0), (0.0, 1.0)):
        with pytest.raises(bh.BillhookError, match="use 0 < p < q"):
            pq_index(x, p, q)
    for bad in (math.nan, math.inf):
        with pytest.raises(bh.BillhookError, match="not finite"):
            bh.pq_index(torch.tensor([1.0, bad]))
        with pytest.raises(bh.BillhookError, match="not finite"):
            gini(torch.tensor([1.0, bad]))
    with pytest.raises(bh.BillhookError, match=r"mask has shape \[3\]"):
        pq_index(x, mask=torch.ones(3))
    for empty in (torch.zeros(0), {}):
        with pytest.raises(bh.BillhookError, match="no weights"):
            pq_index(empty)
