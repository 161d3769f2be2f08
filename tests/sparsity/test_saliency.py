"""Saliencies against their formulas and against each other."""

from __future__ import annotations

import torch

from billhook.calibrate.gram import inverse_cholesky
from billhook.sparsity.obs import quadratic_loss
from billhook.sparsity.patterns import Unstructured
from billhook.sparsity.saliency import magnitude, obs, relative_importance, ria, wanda

GENERATOR = torch.Generator().manual_seed(5)
W = torch.randn(9, 12, generator=GENERATOR)
X = torch.randn(50, 12, generator=GENERATOR)
NORM = X.norm(dim=0)


def test_wanda_with_constant_norm_is_magnitude_per_row() -> None:
    row = Unstructured("row")
    assert torch.equal(row.keep(wanda(W, torch.full((12,), 3.0)), 0.5), row.keep(magnitude(W), 0.5))


def test_wanda_mask_ignores_the_scale_of_the_input() -> None:
    row = Unstructured("row")
    assert torch.equal(row.keep(wanda(W, NORM), 0.5), row.keep(wanda(W, 64.0 * NORM), 0.5))


def test_wanda_follows_a_permutation_of_channels() -> None:
    order = torch.randperm(12, generator=GENERATOR)
    keep = Unstructured("row").keep(wanda(W, NORM), 0.5)
    assert torch.equal(Unstructured("row").keep(wanda(W[:, order], NORM[order]), 0.5), keep[:, order])


def test_wanda_squared_is_the_loss_of_removing_one_weight_under_a_diagonal_gram() -> None:
    gram = torch.diag(NORM.double().square())
    score = wanda(W, NORM).double().square()
    for row, column in [(0, 0), (3, 7), (8, 11)]:
        new = W.double().clone()
        new[row, column] = 0
        torch.testing.assert_close(quadratic_loss(W.double(), new, gram), score[row, column], rtol=1e-5, atol=0)


def test_second_order_saliency_under_a_diagonal_gram_ranks_like_wanda() -> None:
    upper = inverse_cholesky(torch.diag(NORM.double().square()), 1e-12)
    second_order, first = obs(W, upper.diagonal()), wanda(W, NORM)
    torch.testing.assert_close(second_order, first.double().square(), rtol=1e-5, atol=0)
    assert torch.equal(second_order.flatten().argsort(), first.flatten().argsort())


def test_relative_importance_is_the_formula() -> None:
    a = W.abs()
    expected = torch.empty(9, 12)
    for i in range(9):
        for j in range(12):
            expected[i, j] = a[i, j] / a[:, j].sum() + a[i, j] / a[i].sum()
    torch.testing.assert_close(relative_importance(W), expected)


def test_ria_with_exponent_zero_is_relative_importance_and_scale_free() -> None:
    assert torch.equal(ria(W, NORM, 0.0), relative_importance(W))
    torch.testing.assert_close(relative_importance(7.5 * W), relative_importance(W))
    torch.testing.assert_close(ria(W, NORM, 0.5), relative_importance(W) * NORM.sqrt())


def test_dead_rows_and_columns_score_zero() -> None:
    weight = W.clone()
    weight[2] = 0
    weight[:, 4] = 0
    score = relative_importance(weight)
    assert torch.isfinite(score).all()
    assert (score[2] == 0).all()
    assert (score[:, 4] == 0).all()


def test_dead_inputs_are_pruned_first() -> None:
    norm = NORM.clone()
    norm[[1, 5, 6]] = 0
    for score in (wanda(W, norm), ria(W, norm)):
        keep = Unstructured("row").keep(score, 0.25)  # 3 of 12
        assert not keep[:, [1, 5, 6]].any()
        assert keep.sum() == 9 * 9
