"""The refit of a matrix on the inputs that stay, against lstsq, the Schur complement and brute force."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.sparsity.refit import refit, refit_error
from billhook.sparsity.structure import column_scores, strongest


def problem(out: int, size: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix and correlated inputs [size, tokens], float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return weight, mixing @ torch.randn(size, tokens, generator=generator, dtype=torch.float64)


def chosen(size: int, count: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def error(weight: Tensor, x: Tensor, new: Tensor, keep: Tensor) -> float:
    return float((weight @ x - new @ x[keep]).square().sum())


@given(
    st.integers(1, 6),
    st.integers(2, 14),
    st.floats(0.05, 0.99),
    st.floats(0, 0.1),
    st.integers(0, 10_000),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_refit_is_least_squares(out: int, size: int, part: float, damping: float, seed: int, half: bool) -> None:
    weight, x = problem(out, size, 4 * size, seed)
    gram = x @ x.T
    keep = chosen(size, max(1, int(part * size)), seed)
    new = refit(weight, gram, keep, damping=0.0)
    scale = float((weight @ x).square().sum())
    want = torch.linalg.lstsq(x[keep].T, (weight @ x).T).solution.T
    # forming the Gram matrix squares the condition number, so compare outputs
    assert float((new @ x[keep] - want @ x[keep]).square().sum()) <= 1e-9 * scale
    assert error(weight, x, new, keep) == pytest.approx(refit_error(weight, gram, keep), rel=1e-5, abs=1e-9 * scale)
    plain = error(weight, x, weight[:, keep], keep)
    assert error(weight, x, new, keep) <= plain * (1 + 1e-9) + 1e-12 * scale
    # orthogonality of what is left to what is there
    residual = (weight @ x - new @ x[keep]) @ x[keep].T
    assert float(residual.norm()) <= 1e-6 * float(gram.norm()) * float(weight.norm())
    # damping moves it from least squares towards no correction, never past either
    damped = error(weight, x, refit(weight, gram, keep, damping), keep)
    assert damped <= plain * (1 + 1e-9) + 1e-12 * scale
    given_dtype = refit(weight.float(), gram.float(), keep, 1e-3) if half else refit(weight, gram, keep, 1e-3)
    assert given_dtype.dtype == torch.float64
    assert given_dtype.shape == (out, len(keep))


def test_on_well_conditioned_inputs_the_weights_are_those_of_lstsq() -> None:
    weight, _ = problem(5, 12, 1, 8)
    generator = torch.Generator().manual_seed(9)
    mixing = torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator)
    x = mixing.double() @ torch.randn(12, 300, generator=generator, dtype=torch.float64)
    gram, keep = x @ x.T, chosen(12, 7, 8)
    new = refit(weight, gram, keep, damping=0.0)
    torch.testing.assert_close(new, torch.linalg.lstsq(x[keep].T, (weight @ x).T).solution.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new, weight @ gram[:, keep] @ torch.linalg.inv(gram[keep][:, keep]))
    assert error(weight, x, new, keep) == pytest.approx(refit_error(weight, gram, keep), rel=1e-6)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0, 1e6])
def test_nothing_changes_where_nothing_is_removed(damping: float) -> None:
    weight, x = problem(4, 6, 20, 0)
    for gram in (x @ x.T, torch.zeros(6, 6)):
        new = refit(weight, gram, torch.arange(6), damping)
        assert torch.equal(new, weight)


def test_damping_shrinks_the_correction_and_not_the_weights() -> None:
    weight, x = problem(4, 8, 40, 1)
    keep = torch.tensor([0, 2, 3, 5, 7])
    gram = x @ x.T
    corrections = [float((refit(weight, gram, keep, d) - weight[:, keep]).norm()) for d in (0, 1e-2, 1, 100, 1e9)]
    assert corrections == sorted(corrections, reverse=True)
    torch.testing.assert_close(refit(weight, gram, keep, 1e12), weight[:, keep], rtol=0, atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 1e-12])
def test_an_input_that_the_others_make_up_goes_for_free(damping: float) -> None:
    weight, x = problem(5, 9, 60, 2)
    generator = torch.Generator().manual_seed(3)
    x[[1, 4]] = torch.randn(2, 7, generator=generator, dtype=torch.float64) @ x[[0, 2, 3, 5, 6, 7, 8]]
    keep = torch.tensor([0, 2, 3, 5, 6, 7, 8])
    new = refit(weight, x @ x.T, keep, damping)
    assert error(weight, x, new, keep) < 1e-12 * float((weight @ x).square().sum())


def test_a_duplicate_hands_over_its_weight() -> None:
    weight, x = problem(5, 6, 60, 4)
    x[5] = x[0]
    new = refit(weight, x @ x.T, torch.arange(5), damping=0.0)
    torch.testing.assert_close(new[:, 0], weight[:, 0] + weight[:, 5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new[:, 1:], weight[:, 1:5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-3])
def test_inputs_that_are_never_on(damping: float) -> None:
    """Dead ones that go cost nothing; dead ones that stay keep their weights, whatever leaves beside them."""
    weight, x = problem(4, 8, 40, 5)
    x[[2, 6]] = 0
    gram = x @ x.T
    without = refit(weight, gram, torch.tensor([0, 1, 3, 4, 5, 7]), damping)
    torch.testing.assert_close(without, weight[:, [0, 1, 3, 4, 5, 7]])
    keep = torch.tensor([0, 2, 4, 6, 7])
    new = refit(weight, gram, keep, damping)
    torch.testing.assert_close(new[:, [1, 3]], weight[:, [2, 6]])
    assert torch.isfinite(new).all()
    assert torch.equal(refit(weight, torch.zeros(8, 8), keep, damping), weight[:, keep])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-7])
def test_too_few_tokens_give_the_smallest_correction(damping: float, dtype: torch.dtype, seed: int) -> None:
    """What rounding leaves in the null space of a rank-deficient Gram matrix must not be divided by."""
    weight, x = problem(6, 40, 20, seed)
    x = x.to(dtype)
    keep = chosen(40, 30, seed)
    new = refit(weight, x @ x.T, keep, damping)
    scale = float((weight @ x.double()).square().sum())
    assert error(weight, x.double(), new, keep) < 1e-9 * scale
    gone = torch.ones(40, dtype=torch.bool)
    gone[keep] = False
    smallest = (weight[:, gone] @ x[gone].double()) @ torch.linalg.pinv(x[keep].double())
    assert float((new - weight[:, keep]).norm()) == pytest.approx(float(smallest.norm()), rel=0.02)


def test_energies_of_very_different_size() -> None:
    """A channel with massive activations beside ordinary ones, in float32 sums."""
    weight, x = problem(4, 12, 200, 6)
    x[3] *= 1000
    keep = torch.tensor([0, 1, 3, 4, 6, 8, 9, 11])
    new = refit(weight.float(), (x.float() @ x.float().T), keep, 1e-6)
    plain = error(weight, x, weight[:, keep], keep)
    assert error(weight, x, new, keep) < plain


@pytest.mark.parametrize(("correlation", "share"), [(0.3, 0.05), (0.6, 0.1), (3.0, 0.2)])
def test_few_subsets_beat_the_chosen_one(correlation: float, share: float) -> None:
    """n = 8, k = 5, all 56 subsets with their own refit. The score does not see correlation: more do better with it."""
    beaten = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        mixing = torch.eye(8) + correlation * torch.randn(8, 8, generator=generator) / math.sqrt(8)
        x = mixing.double() @ torch.randn(8, 100, generator=generator, dtype=torch.float64)
        gram = x @ x.T
        ours = refit_error(weight, gram, strongest(column_scores(weight, gram.diagonal()), 5))
        errors = [refit_error(weight, gram, torch.tensor(one)) for one in combinations(range(8), 5)]
        assert len(errors) == 56
        beaten += sum(e < ours * (1 - 1e-9) for e in errors)
    assert beaten / (50 * 56) < share


def test_the_choice_is_best_where_inputs_are_uncorrelated() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (6, 8), generator=generator).double() * 2 - 1
        weight = signs * torch.rand(8, generator=generator, dtype=torch.float64)
        gram = torch.diag(torch.rand(8, generator=generator, dtype=torch.float64))
        keep = strongest(column_scores(weight, gram.diagonal()), 5)
        errors = [refit_error(weight, gram, torch.tensor(one)) for one in combinations(range(8), 5)]
        assert refit_error(weight, gram, keep) <= min(errors) * (1 + 1e-5)


def test_the_order_of_inputs_does_not_matter() -> None:
    weight, x = problem(4, 9, 50, 7)
    keep = torch.tensor([1, 2, 5, 8])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = torch.tensor([int((order == k).nonzero()) for k in keep])
    one = refit(weight, x @ x.T, keep, 1e-3)
    other = refit(weight[:, order], (x @ x.T)[order][:, order], moved, 1e-3)
    torch.testing.assert_close(one, other)
