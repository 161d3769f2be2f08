"""Patterns: counts, scopes, parsing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook import BillhookError
from billhook.sparsity.patterns import NM, Unstructured, parse_pattern
from billhook.sparsity.select import budget


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 0.999), st.booleans())
def test_unstructured_counts_are_exact(rows: int, columns: int, sparsity: float, ties: bool) -> None:
    scores = torch.ones(rows, columns) if ties else torch.rand(rows, columns)
    by_row = Unstructured("row").keep(scores, sparsity)
    assert ((~by_row).sum(1) == budget(columns, sparsity)).all()
    by_layer = Unstructured("layer").keep(scores, sparsity)
    assert int((~by_layer).sum()) == budget(rows * columns, sparsity)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (4, 4), (1, 2)])
def test_nm_keeps_exactly_n_of_every_m(n: int, m: int) -> None:
    for scores in (torch.rand(6, m * 5), torch.ones(6, m * 5)):
        keep = NM(n, m).keep(scores, 0.0)
        assert (keep.view(6, 5, m).sum(-1) == n).all()


def test_scope_row_and_layer_differ_where_rows_do() -> None:
    scores = torch.cat([torch.full((1, 8), 1.0), torch.full((1, 8), 9.0)])
    assert Unstructured("layer").keep(scores, 0.5).sum(1).tolist() == [0, 8]
    assert Unstructured("row").keep(scores, 0.5).sum(1).tolist() == [4, 4]


def test_parse_pattern() -> None:
    assert parse_pattern("2:4") == NM(2, 4)
    assert parse_pattern("unstructured") is None
    for bad in ("5:4", "0:4", "2/4", "2:4:8", "", "semi"):
        with pytest.raises(BillhookError, match="Pattern"):
            parse_pattern(bad)


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(BillhookError, match="does not divide a width of 10"):
        NM(2, 4).keep(torch.rand(3, 10), 0.5)
