"""Exact selection against stable sorts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.sparsity.select import _by_histogram, bracketed, budget, global_cut, keep_largest, keep_n_of_m

# few distinct values, so that ties are everywhere
scores = st.integers(1, 7).flatmap(
    lambda rows: st.integers(1, 24).flatmap(
        lambda columns: st.lists(
            st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0]), min_size=rows * columns, max_size=rows * columns
        ).map(lambda values: torch.tensor(values).view(rows, columns))
    )
)


def by_stable_sort(matrix: torch.Tensor, prune: int) -> torch.Tensor:
    keep = torch.ones_like(matrix, dtype=torch.bool)
    order = matrix.argsort(dim=1, stable=True)
    return keep.scatter(1, order[:, :prune], False)


@given(scores, st.data())
def test_keep_largest_equals_a_stable_sort(matrix: torch.Tensor, data: st.DataObject) -> None:
    prune = data.draw(st.integers(0, matrix.shape[1]))
    assert torch.equal(keep_largest(matrix, prune), by_stable_sort(matrix, prune))


def test_keep_largest_on_constant_and_random_matrices() -> None:
    for matrix in (torch.ones(5, 37), torch.randn(5, 37, generator=torch.Generator().manual_seed(0))):
        for prune in (0, 1, 18, 36, 37):
            assert (keep_largest(matrix, prune).sum(1) == 37 - prune).all()


@pytest.mark.parametrize("order", ["random", "rising", "falling", "few values", "mostly zero", "periodic"])
def test_keep_largest_on_a_long_row(order: str) -> None:
    n, generator = 150_000, torch.Generator().manual_seed(4)
    row = torch.randn(1, n, generator=generator).abs()
    if order in ("rising", "falling"):
        row = row.sort(descending=order == "falling").values
    elif order == "few values":
        row = (3 * row).round()
    elif order == "mostly zero":
        row = torch.where(torch.rand(1, n, generator=generator) < 0.9, 0.0, row)
    elif order == "periodic":  # what a sample at equal distances sees is nothing like the rest
        row[:, :: n // 4096] = 1e6
    for prune in (1, 50, 17_000, n // 2, int(0.9 * n) + 300, n - 1):
        assert torch.equal(keep_largest(row, prune), by_stable_sort(row, prune))


@given(st.lists(scores, min_size=1, max_size=5), st.integers(1, 40), st.data())
def test_selection_between_neighbours_is_exact_or_refused(
    matrices: list[torch.Tensor], sample: int, data: st.DataObject
) -> None:
    chunks = [m.flatten() for m in matrices]
    k = data.draw(st.integers(1, sum(map(len, chunks))))
    expected = torch.cat(chunks).sort().values[k - 1]
    found = bracketed(lambda: chunks, k, sample)
    assert found is None or found == expected
    assert _by_histogram(lambda: chunks, k) == expected


def test_selection_between_neighbours_is_seldom_refused() -> None:
    chunks = list(torch.randn(6, 40_000, generator=torch.Generator().manual_seed(0)).abs())
    everything = torch.cat(chunks).sort().values
    for k in range(1, len(everything), 4_001):
        assert bracketed(lambda: chunks, k, 1 << 12) == everything[k - 1]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=150)
def test_keep_n_of_m_equals_a_stable_sort_of_each_group(rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    values = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=rows * groups * m, max_size=rows * groups * m)
    )
    matrix = torch.tensor(values).view(rows, groups * m)
    keep = keep_n_of_m(matrix, n, m)
    assert torch.equal(keep.view(-1, m), by_stable_sort(matrix.view(-1, m), m - n))


@pytest.mark.parametrize("m", [4, 8])
def test_keep_n_of_m_on_matrices_too_large_for_one_comparison(m: int) -> None:
    matrix = torch.randint(0, 3, (300, 16 * m), generator=torch.Generator().manual_seed(0)).float()  # with ties
    keep = keep_n_of_m(matrix, m // 2, m)
    assert torch.equal(keep.view(-1, m), by_stable_sort(matrix.view(-1, m), m // 2))


@given(st.integers(1, 10_000_000), st.integers(0, 999))
def test_budget_is_the_exact_floor(total: int, thousandths: int) -> None:
    sparsity = thousandths / 1000
    assert budget(total, sparsity) == int(Fraction(thousandths, 1000) * total)


@given(st.integers(1, 5000), st.data())
def test_budget_inverts_a_share(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    assert budget(total, count / total) == count


@given(st.lists(scores, min_size=1, max_size=5), st.data())
def test_global_counts_equal_one_sort_of_everything(matrices: list[torch.Tensor], data: st.DataObject) -> None:
    total = sum(m.numel() for m in matrices)
    prune = data.draw(st.integers(0, total))
    named = [(str(i), m) for i, m in enumerate(matrices)]
    counts = global_cut(lambda: named, prune).counts
    order = torch.cat([m.flatten() for m in matrices]).argsort(stable=True)[:prune]
    owner = torch.cat([torch.full((m.numel(),), i) for i, m in enumerate(matrices)])
    expected = {str(i): int((owner[order] == i).sum()) for i in range(len(matrices))}
    assert counts == expected


def test_global_counts_of_random_floats() -> None:
    generator = torch.Generator().manual_seed(3)
    named = [(str(i), torch.randn(50, 40, generator=generator).abs() * (i + 1)) for i in range(3)]
    everything = torch.cat([m.flatten() for _, m in named])
    threshold = everything.sort().values[3000 - 1]
    expected = {name: int((m <= threshold).sum()) for name, m in named}
    assert global_cut(lambda: named, 3000).counts == expected


@pytest.mark.parametrize("prune", [0, 100])
def test_global_counts_at_the_ends(prune: int) -> None:
    named = [("a", torch.rand(10, 10))]
    assert sum(global_cut(lambda: named, prune).counts.values()) == prune
