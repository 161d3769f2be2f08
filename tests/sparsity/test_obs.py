"""The second-order sweep against brute force and float64 identities."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook import BillhookError
from billhook.calibrate.gram import damped, inverse_cholesky
from billhook.sparsity.obs import joint_least_squares, quadratic_loss, sweep
from billhook.sparsity.patterns import NM, Scope, Unstructured
from billhook.sparsity.select import budget, keep_largest


def problem(rows: int, columns: int, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return weight, x.T @ x


def plain_sweep(weight: Tensor, inverse: Tensor, keep: Tensor) -> Tensor:
    """Column-by-column elimination on the inverse itself: the textbook form, independent of U and of blocks."""
    w, h = weight.clone(), inverse.clone()
    for j in range(w.shape[1]):
        error = torch.where(keep[:, j], torch.zeros_like(w[:, j]), w[:, j]) / h[j, j]
        w[:, j:] -= error[:, None] * h[j, j:][None]
        w[~keep[:, j], j] = 0
        h = h - torch.outer(h[:, j], h[j]) / h[j, j]
    return w


def test_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, gram = problem(1, 20)
    upper = inverse_cholesky(gram, 0.01)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(upper, upper.triu())


def test_fixed_mask_sweep_equals_textbook_elimination() -> None:
    weight, gram = problem(7, 24)
    keep = torch.rand(7, 24, generator=torch.Generator().manual_seed(2)) > 0.5
    new, mask = sweep(weight, inverse_cholesky(gram), keep=keep, block_size=5)
    expected = plain_sweep(weight, torch.linalg.inv(damped(gram, 0.01)), keep)
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(mask, keep)
    assert (new[~keep] == 0).all()


@given(st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_fixed_mask_result_does_not_depend_on_the_block_size(block_size: int) -> None:
    weight, gram = problem(6, 67, seed=4)
    keep = torch.rand(6, 67, generator=torch.Generator().manual_seed(3)) > 0.6
    upper = inverse_cholesky(gram)
    one, _ = sweep(weight, upper, keep=keep, block_size=67)
    other, _ = sweep(weight, upper, keep=keep, block_size=block_size)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_sum_of_squared_errors_is_the_quadratic_loss(pattern: NM | None) -> None:
    weight, gram = problem(7, 24, seed=6)
    h = damped(gram, 0.01)
    upper = inverse_cholesky(gram, 0.01)
    new, keep = sweep(weight, upper, sparsity=0.5, pattern=pattern, block_size=8)
    # the errors, recomputed by the textbook sweep: e_j = removed w_j / U_jj
    w, total = weight.clone(), 0.0
    for j in range(24):
        error = torch.where(keep[:, j], torch.zeros_like(w[:, j]), w[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
        total += float(error.square().sum())
    assert total == pytest.approx(float(quadratic_loss(weight, new, h)), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_zeroing_is_worse_than_the_sweep_is_worse_than_joint_least_squares(seed: int) -> None:
    weight, gram = problem(7, 24, seed=seed)
    h = damped(gram, 0.01)
    keep = keep_largest(weight.abs(), 12)
    swept, _ = sweep(weight, inverse_cholesky(gram), keep=keep)
    joint = joint_least_squares(weight, h, keep)
    losses = [float(quadratic_loss(weight, new, h)) for new in (weight * keep, swept, joint)]
    assert losses[0] >= losses[1] >= losses[2] > 0
    assert losses[0] > 1.05 * losses[2]


def test_joint_least_squares_satisfies_the_normal_equations() -> None:
    weight, gram = problem(5, 16)
    keep = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    new = joint_least_squares(weight, gram, keep)
    residual = (new - weight) @ gram  # gradient of the loss: zero on kept inputs
    assert float(residual[keep].abs().max()) < 1e-8 * float((weight @ gram).abs().max())


def test_removing_a_pair_costs_what_the_joint_formula_says() -> None:
    weight, gram = problem(1, 6)
    inverse = torch.linalg.inv(gram)
    for pair in combinations(range(6), 2):
        index = list(pair)
        keep = torch.ones(1, 6, dtype=torch.bool)
        keep[0, index] = False
        brute = quadratic_loss(weight, joint_least_squares(weight, gram, keep), gram)
        removed = weight[0, index]
        formula = removed @ torch.linalg.inv(inverse[index][:, index]) @ removed
        torch.testing.assert_close(brute, formula, rtol=1e-8, atol=0)


def test_removing_one_weight_is_the_lagrange_minimum() -> None:
    weight, gram = problem(1, 8)
    inverse = torch.linalg.inv(gram)
    q = 3
    expected = weight[0] - weight[0, q] / inverse[q, q] * inverse[:, q]
    keep = torch.ones(1, 8, dtype=torch.bool)
    keep[0, q] = False
    torch.testing.assert_close(joint_least_squares(weight, gram, keep)[0], expected, rtol=1e-10, atol=1e-10)
    # the sweep agrees where all other weights are to the right
    first = torch.ones(1, 8, dtype=torch.bool)
    first[0, 0] = False
    swept, _ = sweep(weight, inverse_cholesky(gram, 1e-15), keep=first)
    torch.testing.assert_close(swept, joint_least_squares(weight, gram, first), rtol=1e-8, atol=1e-8)


def test_diagonal_gram_means_no_update_and_wanda_per_block() -> None:
    weight, _ = problem(6, 32)
    scale = torch.rand(32, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.1
    gram = torch.diag(scale)
    new, keep = sweep(weight, inverse_cholesky(gram, 1e-12), sparsity=0.5, block_size=16)
    assert torch.equal(new, weight * keep)
    for start in (0, 16):
        columns = slice(start, start + 16)
        score = weight[:, columns].square() * scale[columns]
        expected = keep_largest(score.reshape(1, -1), budget(score.numel(), 0.5)).view(6, 16)
        assert torch.equal(keep[:, columns], expected)


@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 0.99), st.sampled_from([1, 7, 16, 128]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(rows: int, columns: int, sparsity: float, block_size: int, ties: bool) -> None:
    weight, gram = problem(rows, columns)
    if ties:
        weight, gram = torch.ones_like(weight), torch.eye(columns, dtype=torch.float64)
    upper = inverse_cholesky(gram)
    _, by_layer = sweep(weight, upper, sparsity=sparsity, block_size=block_size)
    assert int((~by_layer).sum()) == budget(rows * columns, sparsity)
    _, by_row = sweep(weight, upper, sparsity=sparsity, scope="row", block_size=block_size)
    assert ((~by_row).sum(1) == budget(columns, sparsity)).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 6)])
@pytest.mark.parametrize("block_size", [1, 10, 128])
def test_nm_counts_are_exact(n: int, m: int, block_size: int) -> None:
    weight, gram = problem(5, 48)
    new, keep = sweep(weight, inverse_cholesky(gram), pattern=NM(n, m), block_size=block_size)
    assert (keep.view(5, -1, m).sum(-1) == n).all()
    assert (new[~keep] == 0).all()


def test_nm_mask_sees_updated_weights() -> None:
    weight, gram = problem(6, 16, seed=11)
    upper = inverse_cholesky(gram)
    _, adaptive = sweep(weight, upper, pattern=NM(2, 4))
    from billhook.sparsity.select import keep_n_of_m

    at_once = keep_n_of_m((weight / upper.diagonal()).square(), 2, 4)
    assert torch.equal(adaptive[:, :4], at_once[:, :4])
    assert not torch.equal(adaptive, at_once)


def test_sparsity_zero_changes_nothing() -> None:
    weight, gram = problem(4, 20)
    new, keep = sweep(weight, inverse_cholesky(gram), sparsity=0.0)
    assert torch.equal(new, weight)
    assert keep.all()


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_sparsity_one_removes_everything(scope: Scope) -> None:
    weight, gram = problem(4, 20)
    new, keep = sweep(weight, inverse_cholesky(gram), sparsity=1.0, scope=scope, block_size=7)
    assert torch.equal(new, torch.zeros_like(weight))
    assert not keep.any()
    assert not Unstructured(scope).keep(weight.abs(), 1.0).any()


def test_the_given_weight_is_not_modified() -> None:
    for rows in (1, 4):
        weight, gram = problem(rows, 12)
        before = weight.clone()
        sweep(weight, inverse_cholesky(gram), sparsity=0.5)
        assert torch.equal(weight, before)


def test_rank_deficient_and_zero_gram_are_handled() -> None:
    weight, _ = problem(4, 20)
    x = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, :5] = 0
    for gram in (x.T @ x, torch.zeros(20, 20, dtype=torch.float64)):
        dead = gram.diagonal() == 0
        new, keep = sweep(weight, inverse_cholesky(gram), sparsity=0.5, dead=dead, block_size=20)
        assert torch.isfinite(new).all()
        assert int((~keep).sum()) == 40
        if not dead.all():
            assert not keep[:, :5].any()  # dead inputs go first


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    assert torch.isfinite(inverse_cholesky(indefinite, 0.001)).all()
    with pytest.raises(BillhookError, match="not positive definite"):
        inverse_cholesky(torch.diag(torch.tensor([1.0, 1.0, -50.0])), 0.01)
    with pytest.raises(BillhookError, match="not finite"):
        inverse_cholesky(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"sparsity": 0.6, "scope": "row"}, {"pattern": NM(2, 4)}])
def test_matrices_of_one_input_swept_at_once_equal_one_sweep_each(options: dict[str, object]) -> None:
    heights = [5, 2, 9]
    weight, gram = problem(sum(heights), 40, seed=12)
    upper = inverse_cholesky(gram)
    together, keep = sweep(weight, upper, block_size=16, matrices=heights, **options)  # type: ignore[arg-type]
    parts = [sweep(part, upper, block_size=16, **options) for part in weight.split(heights)]  # type: ignore[arg-type]
    assert torch.equal(keep, torch.cat([mask for _, mask in parts]))
    torch.testing.assert_close(together, torch.cat([new for new, _ in parts]), rtol=1e-10, atol=1e-10)
