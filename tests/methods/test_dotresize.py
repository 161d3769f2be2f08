"""DOTResize: the plan, the basis it spans, and what both must not do."""

from __future__ import annotations

import copy

import ot
import pytest
import torch
from torch import Tensor

import billhook as bh
from billhook.methods.dotresize import orthonormal, transport_plan
from tiny import batches_for, build


def signal(tokens: int = 300, hidden: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, hidden, generator=generator, dtype=torch.float64) @ mix


@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
def test_the_plan_has_its_marginals(cost: str) -> None:
    plan = transport_plan(signal(), torch.arange(5), cost, 0.1, 5000)
    assert plan.min() >= 0
    torch.testing.assert_close(plan.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 1 / 5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_plan_is_sinkhorns_own() -> None:
    """Against the scaling iteration written out, u ← a / Kv, v ← b / Kᵀu, in float64."""
    x, kept = signal(), torch.tensor([0, 3, 4, 9])
    cost = (x.T[:, None] - x.T[kept][None]).abs().sum(-1)
    kernel = torch.exp(-cost / cost.max() / 0.2)
    u, v = torch.ones(12, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for _ in range(5000):
        u = (1 / 12) / (kernel @ v)
        v = (1 / 4) / (kernel.T @ u)
    torch.testing.assert_close(transport_plan(x, kept, "l1", 0.2, 5000), u[:, None] * kernel * v, rtol=1e-6, atol=1e-9)


def test_nothing_cut_is_the_whole_space() -> None:
    basis = bh.method("dotresize").basis(signal(), 12)  # type: ignore[attr-defined]
    torch.testing.assert_close(basis @ basis.T, torch.eye(12, dtype=torch.float64))


def test_dependent_columns_are_refilled() -> None:
    plan = torch.rand(10, 4, dtype=torch.float64)
    plan[:, 2] = plan[:, 1]
    basis = orthonormal(plan, torch.arange(10, dtype=torch.float64))
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    inside = basis @ basis.T @ plan
    torch.testing.assert_close(inside, plan)


def test_scaling_the_columns_of_a_plan_changes_nothing() -> None:
    plan, energy = torch.rand(10, 4, dtype=torch.float64), torch.arange(10, dtype=torch.float64)
    one = orthonormal(plan, energy)
    other = orthonormal(plan * torch.tensor([3.0, 0.1, 7.0, 1.0], dtype=torch.float64), energy)
    torch.testing.assert_close(one @ one.T, other @ other.T)


def test_identical_coordinates_merge_without_loss() -> None:
    """A stream of identical pairs, one of each pair kept: projection onto the plan's span loses nothing."""
    half = signal(hidden=6)
    x = half.repeat_interleave(2, dim=1)
    for entropy in (0.01, 0.1, 1.0):
        plan = transport_plan(x, torch.arange(0, 12, 2), "l1", entropy, 5000)
        torch.testing.assert_close(plan[0::2], plan[1::2])
        basis = orthonormal(plan, x.square().sum(0))
        torch.testing.assert_close(x @ basis @ basis.T, x, rtol=1e-4, atol=1e-4)
        deleted = torch.eye(12, dtype=torch.float64)[:, 0::2]
        assert (x - x @ deleted @ deleted.T).norm() > 0.5 * x.norm()


def test_the_principal_axes_lose_less() -> None:
    for seed in range(5):
        x = signal(seed=seed)
        lost = {}
        for name in ("dotresize", "slicegpt"):
            method = bh.method(name)
            basis = method.basis(x if name == "dotresize" else x.T @ x, 6)  # type: ignore[attr-defined]
            lost[name] = float((x - x @ basis @ basis.T).norm())
        assert lost["dotresize"] >= lost["slicegpt"]


def test_merging_loses_less_than_deleting_and_more_than_principal_axes() -> None:
    lost: dict[str, list[float]] = {"delete": [], "merge": [], "axes": []}
    for seed in range(20):
        x = signal(seed=seed)
        bases = {
            "delete": bh.method("dotresize", merge=False).basis(x, 6),  # type: ignore[attr-defined]
            "merge": bh.method("dotresize").basis(x, 6),  # type: ignore[attr-defined]
            "axes": bh.method("slicegpt").basis(x.T @ x, 6),  # type: ignore[attr-defined]
        }
        for name, basis in bases.items():
            lost[name].append(float((x - x @ basis @ basis.T).norm() / x.norm()))
    assert all(axes <= merge for axes, merge in zip(lost["axes"], lost["merge"], strict=True))
    assert sum(lost["merge"]) < sum(lost["delete"])


def test_little_entropy_is_the_exact_transport() -> None:
    x, kept = signal(), torch.tensor([1, 2, 5, 7, 8])
    cost = torch.cdist(x.T, x.T[kept], p=1.0)
    cost /= cost.max()
    exact = ot.emd(torch.full((12,), 1 / 12).double(), torch.full((5,), 1 / 5).double(), cost)
    assert int((exact > 1e-12).sum()) <= 12 + 5 - 1
    plan = transport_plan(x, kept, "l1", 1e-3, 20_000)
    assert float((plan * cost).sum()) == pytest.approx(float((exact * cost).sum()), rel=0.01)


@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
def test_the_plan_meets_the_conditions_of_its_optimum(cost: str) -> None:
    """λ log T + C is a sum of one number per row and one per column."""
    x, kept = signal(), torch.tensor([0, 4, 9])
    distance = torch.cdist(x.T, x.T[kept], p=1.0 if cost == "l1" else 2.0) ** (1 if cost == "l1" else 2)
    prices = 0.2 * transport_plan(x, kept, cost, 0.2, 5000).log() + distance / distance.max()
    rest = prices - prices.mean(0, keepdim=True) - prices.mean(1, keepdim=True) + prices.mean()
    assert float(rest.abs().max()) < 1e-9


def test_without_merging_the_other_coordinates_are_deleted() -> None:
    x = signal()
    basis = bh.method("dotresize", merge=False).basis(x, 5)  # type: ignore[attr-defined]
    assert set(basis.unique().tolist()) == {0.0, 1.0}
    kept = basis.nonzero()[:, 0]
    assert x.square().sum(0).topk(5).indices.sort().values.equal(kept.sort().values)


def test_what_qr_leaves_aside_cancels_around_a_norm() -> None:
    """The paper's T · R⁻¹ · norm · R · T⁺ is the norm of a signal in an orthonormal basis of T's columns."""
    x = signal()
    plan = transport_plan(x, torch.tensor([0, 3, 4, 9]), "l1", 0.1, 5000)
    readers = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def norm(y: Tensor) -> Tensor:
        return y / y.square().mean(-1, keepdim=True).sqrt()

    _, r = torch.linalg.qr(plan)
    literal = norm(x @ plan @ r.inverse()) @ r @ torch.linalg.pinv(plan) @ readers
    basis = orthonormal(plan, x.square().sum(0))
    torch.testing.assert_close(norm(x @ basis) @ basis.T @ readers, literal, rtol=1e-6, atol=1e-8)


def test_much_entropy_is_a_step_of_subspace_iteration() -> None:
    """With squared distances the columns come to lie in span{1, diag(XᵀX), XᵀX_S}, at a rate of 1 over the entropy."""
    x, kept = signal(hidden=8), torch.tensor([0, 3, 6])
    gram = x.T @ x
    span, _ = torch.linalg.qr(torch.cat([torch.ones(8, 1).double(), gram.diagonal()[:, None], gram[:, kept]], dim=1))
    angles = []
    for entropy in (10.0, 100.0, 1000.0):
        plan = transport_plan(x, kept, "sqeuclidean", entropy, 5000)
        basis, _ = torch.linalg.qr(plan)
        angles.append(float(torch.linalg.matrix_norm(basis - span @ (span.T @ basis), ord=2)))
    assert angles[1] < angles[0] / 5
    assert angles[2] < angles[1] / 5


def test_permuted_coordinates_give_permuted_rows() -> None:
    x, order = signal(), torch.randperm(12, generator=torch.Generator().manual_seed(2))
    one = bh.method("dotresize").basis(x, 5)  # type: ignore[attr-defined]
    other = bh.method("dotresize").basis(x[:, order], 5)  # type: ignore[attr-defined]
    torch.testing.assert_close((one @ one.T)[order][:, order], other @ other.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi", "gpt_neox"])
@pytest.mark.parametrize("target", ["energy", "pca"])
def test_nothing_cut_changes_no_logit_and_the_size_is_slicegpts(family: str, target: str) -> None:
    model = build(family)
    whole, sliced = copy.deepcopy(model), copy.deepcopy(model)
    batches = batches_for(family)
    bh.prune(model, bh.method("dotresize", sparsity=0.0, target=target), batches, precision="highest")
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, whole(batches[0]).logits, rtol=1e-4, atol=1e-4)
    bh.prune(whole, bh.method("dotresize", sparsity=0.25, target=target), batches)
    bh.prune(sliced, bh.method("slicegpt", sparsity=0.25), batches)
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in sliced.parameters())
