"""Exact selection against stable sorts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.sparsity.select import budget, global_counts, keep_largest, keep_n_of_m

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
    counts = global_counts(lambda: named, prune)
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
    assert global_counts(lambda: named, 3000) == expected


@pytest.mark.parametrize("prune", [0, 100])
def test_global_counts_at_the_ends(prune: int) -> None:
    named = [("a", torch.rand(10, 10))]
    assert sum(global_counts(lambda: named, prune).values()) == prune
