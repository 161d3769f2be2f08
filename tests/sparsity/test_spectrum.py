"""Spectra against SVD, distances against brute force, and what removing rows does to singular values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.sparsity.spectrum import (
    downdated,
    gram_values,
    kept_values,
    kolmogorov_smirnov,
    singular_values,
    wasserstein,
)

SHAPES = [(40, 12), (24, 24), (10, 16), (7, 1), (1, 5)]
samples = st.lists(st.floats(0, 10, allow_subnormal=False) | st.integers(0, 3).map(float), min_size=1, max_size=12)


def matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def drawn(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_the_gram_spectrum_is_that_of_the_svd(n: int, d: int) -> None:
    weight = matrix(n, d)
    want = torch.linalg.svdvals(weight.double()).flip(0)
    for got in (singular_values(weight), gram_values(weight.double().T @ weight.double())[-min(n, d) :]):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


def test_what_is_rounding_of_a_deficient_matrix_is_zero() -> None:
    weight = matrix(40, 5) @ matrix(5, 12, 1)
    values = singular_values(weight.double())
    assert (values[:7] == 0).all()
    assert (values[7:] > 0.1).all()
    assert (singular_values(torch.zeros(6, 3)) == 0).all()


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_a_downdated_gram_is_that_of_the_rest(n: int, d: int) -> None:
    weight = matrix(n, d)
    gone = drawn(n, n // 3)
    rest = torch.ones(n, dtype=torch.bool)
    rest[gone] = False
    left = weight[rest].double()
    torch.testing.assert_close(
        downdated(weight.double().T @ weight.double(), weight[gone]), left.T @ left, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("n", "k", "d"), [(40, 30, 12), (40, 15, 12), (40, 8, 12), (40, 40, 12), (10, 6, 16)])
def test_the_spectrum_of_kept_rows_whichever_way_it_is_computed(n: int, k: int, d: int) -> None:
    weight, keep = matrix(n, d), drawn(n, k)
    got = kept_values(weight, weight.double().T @ weight.double(), keep)
    want = torch.linalg.svdvals(weight[keep].double()).flip(0)
    assert got.shape == (min(k, d),)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@given(st.integers(2, 30), st.integers(1, 20), st.integers(0, 1000), st.data())
@settings(max_examples=80, deadline=None)
def test_singular_values_interlace(n: int, d: int, seed: int, data: st.DataObject) -> None:
    """σ_{i+r}(W) ≤ σ_i(W_A) ≤ σ_i(W), descending, with r rows gone."""
    k = data.draw(st.integers(1, n))
    weight = matrix(n, d, seed).double()
    whole = torch.cat([singular_values(weight).flip(0), torch.zeros(n)])
    part = kept_values(weight, weight.T @ weight, drawn(n, k, seed)).flip(0)
    slack = 1e-10 + 1e-7 * float(whole[0])  # a root turns rounding of 1e-16 into 1e-8
    for i, value in enumerate(part.tolist()):
        assert float(whole[i + n - k]) - slack <= value <= float(whole[i]) + slack


def test_singular_values_interlace_to_1e_10() -> None:
    for seed in range(20):
        weight, keep = matrix(40, 12, seed).double(), drawn(40, 30, seed)
        whole = singular_values(weight).flip(0)
        part = kept_values(weight, weight.T @ weight, keep).flip(0)
        assert (part <= whole + 1e-10).all()
        assert (part[:2] >= whole[10:] - 1e-10).all()


def test_nothing_removed_and_zero_rows_removed_cost_nothing() -> None:
    weight = matrix(40, 12)
    weight[5:15] = 0
    full, gram = singular_values(weight), weight.double().T @ weight.double()
    assert kolmogorov_smirnov(full, kept_values(weight, gram, torch.arange(40))) == 0
    assert wasserstein(full, kept_values(weight, gram, torch.arange(40))) == 0
    keep = torch.cat([torch.arange(5), torch.arange(15, 40)])
    assert kolmogorov_smirnov(full, kept_values(weight, gram, keep)) == 0


def brute_ks(a: list[float], b: list[float]) -> float:
    return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in [*a, *b])


def brute_wasserstein(a: list[float], b: list[float]) -> float:
    """Every value as often as makes both lists equally long; then the sorted ones are paired."""
    size = math.lcm(len(a), len(b))
    left = sorted(x for x in a for _ in range(size // len(a)))
    right = sorted(x for x in b for _ in range(size // len(b)))
    return sum(abs(x - y) for x, y in zip(left, right, strict=True)) / size


@given(samples, samples)
@settings(max_examples=120, deadline=None)
def test_distances_are_those_of_brute_force(a: list[float], b: list[float]) -> None:
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    ks, distance = kolmogorov_smirnov(x, y), wasserstein(x, y)
    assert ks == pytest.approx(brute_ks(a, b), abs=1e-12)
    assert distance == pytest.approx(brute_wasserstein(a, b), abs=1e-9)
    assert ks == kolmogorov_smirnov(y, x)
    assert distance == pytest.approx(wasserstein(y, x), abs=1e-12)
    assert kolmogorov_smirnov(x, x) == 0
    assert wasserstein(x, x) == 0
    assert kolmogorov_smirnov(4 * x, 4 * y) == ks
    assert wasserstein(4 * x, 4 * y) == pytest.approx(4 * distance, abs=1e-9)
    assert kolmogorov_smirnov(x, y + 11) == 1  # nothing in common
    if len(a) == len(b):
        assert ks * len(a) == pytest.approx(round(ks * len(a)), abs=1e-9)
