"""The bound of the PQ index, counts from it, and the allocation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import billhook as bh
from billhook.analysis import pq_index
from billhook.calibrate.walk import Walk
from billhook.sparsity.allocations import ALLOCATIONS
from billhook.sparsity.pqi import excess, least_kept, removals, removals_to
from billhook.sparsity.select import budget
from tiny import batches_for, build

NORMS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.4), (0.3, 2.5)]


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_equal_weights_and_zeros_are_counted_exactly(p: float, q: float) -> None:
    for d, k in ((10, 3), (1000, 1), (1000, 999), (64, 64), (100_000, 12_345)):
        x = torch.zeros(d)
        x[torch.randperm(d, generator=torch.Generator().manual_seed(0))[:k]] = 0.03
        index = pq_index(x, p, q)
        assert float(index) == pytest.approx(1 - (k / d) ** (1 / p - 1 / q), abs=1e-9)
        size = torch.tensor([d])
        kept = least_kept(size, index.reshape(1), p, q)
        assert float(kept) == pytest.approx(k, rel=1e-5)
        assert int(removals(size, excess(size, kept), beta=1.0)) == d - k


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_the_bound_holds_for_every_r(p: float, q: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in (lambda x: x, lambda x: x.abs() ** 3, torch.exp, lambda x: x * (x.abs() > 1)):
        w = shape(torch.randn(60, generator=generator, dtype=torch.float64)).abs()
        ranked = w.sort(descending=True).values.pow(p)
        index = pq_index(w, p, q).reshape(1)
        for r in range(1, 61):
            eta = float(ranked[r:].sum() / ranked[:r].sum())
            bound = float(least_kept(torch.tensor([60]), index, p, q, eta))
            assert r >= bound * (1 - 1e-6)


def test_special_cases() -> None:
    torch.manual_seed(0)
    w = torch.randn(500, dtype=torch.float64)
    size = torch.tensor([500])
    effective = float(w.abs().sum() ** 2 / w.square().sum())  # the classical effective number of non-zeros
    assert float(least_kept(size, pq_index(w, 1, 2), 1, 2)) == pytest.approx(effective)
    assert float(least_kept(size, pq_index(w, 1, 2), 1, 2, eta=0.5)) == pytest.approx(effective / 1.5**2)
    index = pq_index(w, 0.5, 1)
    assert float(least_kept(size, index, 0.5, 1, eta=1.0)) == pytest.approx(500 * (1 - float(index)) / 4)


SIZES = torch.tensor([1, 2, 9, 9, 100, 1001, 50_000])


def indices(seed: int) -> torch.Tensor:
    return torch.rand(len(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.9


@pytest.mark.parametrize(("p", "q"), NORMS)
def test_counts(p: float, q: float) -> None:
    index = indices(0)
    for d, i in zip(SIZES.tolist(), index.tolist(), strict=True):
        r = math.ceil(d * (1 - i) ** (p * q / (q - p)))
        size = torch.tensor([d])
        count = int(removals(size, excess(size, least_kept(size, torch.tensor([i]), p, q)), beta=0.9))
        assert count == (d - r if 1 - r / d < 0.9 else math.floor(0.9 * d))
    share = excess(SIZES, least_kept(SIZES, index, p, q))
    assert not removals(SIZES, share, gamma=0.0).any()
    capped = removals(SIZES, share, gamma=1e9)
    assert capped.tolist() == [math.floor(0.9 * d) if s > 0 else 0 for d, s in zip(SIZES, share, strict=True)]
    assert bool((capped < SIZES).all())  # the last weight of a unit stays
    assert int(removals(torch.tensor([0]), excess(torch.tensor([0]), torch.zeros(1)), 5.0)) == 0


def test_more_eta_or_gamma_never_removes_fewer() -> None:
    for seed in range(20):
        last = torch.zeros(len(SIZES), dtype=torch.int64)
        for eta in (0.0, 0.001, 0.01, 0.1, 1.0, 10.0):
            counts = removals(SIZES, excess(SIZES, least_kept(SIZES, indices(seed), eta=eta)))
            assert bool((counts >= last).all())
            last = counts
        last = torch.zeros(len(SIZES), dtype=torch.int64)
        for gamma in (0.0, 0.3, 1.0, 1.2, 3.0, 5.0, 9.0):
            counts = removals(SIZES, excess(SIZES, least_kept(SIZES, indices(seed))), gamma)
            assert bool((counts >= last).all())
            last = counts


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_counts_to_a_sum_are_those_of_one_gamma(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 30))
    size = torch.tensor([data.draw(st.sampled_from([1, 2, 3, 9, 100, 100, 4097])) for _ in range(units)])
    share = torch.tensor([data.draw(st.sampled_from([0.0, 1e-4, 0.1, 0.1, 0.37, 0.9, 1.0])) for _ in range(units)])
    beta = data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    cap = [math.floor(round(beta * d, 6)) if s > 0 else 0 for d, s in zip(size.tolist(), share.tolist(), strict=True)]
    remove = data.draw(st.integers(0, sum(cap)))
    counts = removals_to(remove, size, share.double(), beta)
    assert int(counts.sum()) == remove
    low, high = 0.0, math.inf  # the gammas that round to these counts
    for count, most, rate in zip(counts.tolist(), cap, (size * share.double()).tolist(), strict=True):
        assert 0 <= count <= most
        if most:
            low = max(low, (count - 1) / rate)
            high = min(high, math.inf if count == most else (count + 1) / rate)
    assert low <= high * (1 + 1e-6)


def test_a_sum_out_of_reach_is_refused() -> None:
    size, share = torch.tensor([10, 10]), torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert removals_to(9, size, share).tolist() == [0, 9]
    with pytest.raises(bh.BillhookError, match="at most 9 of 20 weights"):
        removals_to(10, size, share)


def walk_of(model: torch.nn.Module) -> Walk:
    return Walk(model, batches_for("llama"), needs="nothing", precision="highest")


@pytest.mark.parametrize("scope", ["block", "layer", "neuron"])
def test_allocation_hits_the_sparsity_and_follows_the_index(scope: str) -> None:
    model = build("llama")
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.data
    weight[:, ::3] *= 30  # unequal magnitudes
    walk = walk_of(model)
    sizes = {site.name: site.numel for site in walk.all_sites()}
    shares = ALLOCATIONS.parse(f"pqi(scope={scope})").shares(walk, 0.6)
    removed = sum(round(shares[name] * size) for name, size in sizes.items())
    total = sum(sizes.values())
    if scope == "block":  # a block's count is shared by its matrices, whose own counts are rounded
        assert abs(removed - budget(total, 0.6)) <= len(sizes)
    else:
        assert removed == budget(total, 0.6)
    assert shares["model.layers.1.mlp.up_proj"] == max(shares.values()) <= 0.9
    assert shares["model.layers.1.mlp.up_proj"] > 0.65 > 0.6 > shares["model.layers.0.mlp.up_proj"]
    if scope == "layer":
        index = {site.name: float(pq_index(w)) for site, w in walk.weights()}
        for one in index:
            for other in index:
                if index[one] <= index[other]:  # up to ceiling and rounding
                    assert shares[one] <= shares[other] + 3 / min(sizes[one], sizes[other])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_reaches_the_overall_sparsity(method: str) -> None:
    model = build("llama")
    report = bh.prune(model, bh.method(method, sparsity=0.6, allocation="pqi", scope="layer"), batches_for("llama"))
    assert report.steps[0].sparsity == pytest.approx(0.6, abs=1e-4)
    assert len({round(site.asked, 6) for site in report.steps[0].sites}) > 1


def test_it_needs_no_data() -> None:
    assert bh.Magnitude(allocation="pqi").requires == "nothing"


def test_bad_options_get_a_sentence() -> None:
    with pytest.raises(bh.BillhookError, match=r"Allocation pqi: p=1 is not below q=1"):
        bh.Wanda(allocation="pqi(p=1)")
    with pytest.raises(bh.BillhookError, match="raise beta or lower the sparsity"):
        bh.prune(build("llama"), bh.Magnitude(sparsity=0.8, allocation="pqi(beta=0.7)"), batches_for("llama"))
