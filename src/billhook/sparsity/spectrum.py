"""Spectra of a matrix and of some of its rows, and how far apart two spectra are. All in float64.

Deleting rows moves singular values to the left: with r rows gone, σ_{i+r}(W) ≤ σ_i(W_A) ≤ σ_i(W).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_values(gram: Tensor, scale: float | None = None) -> Tensor:
    """Singular values of a matrix from its Gram matrix: the square roots of the eigenvalues, ascending, float64.

    Args:
        gram: WᵀW or WWᵀ, [d, d].
        scale: the largest eigenvalue of what `gram` was subtracted from; below its rounding, values are zero.
    """
    values: Tensor = torch.linalg.eigvalsh(gram.double())
    largest = float(values[-1]) if scale is None else scale
    return values.masked_fill(values <= len(gram) * torch.finfo(torch.float64).eps * largest, 0.0).sqrt()


def singular_values(rows: Tensor) -> Tensor:
    """Singular values of [k, d], ascending, float64 [min(k, d)], through the smaller of its two Gram matrices."""
    rows = rows.double()
    return gram_values(rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows)


def downdated(gram: Tensor, gone: Tensor) -> Tensor:
    """The Gram matrix without some rows: WᵀW − PᵀP, float64 [d, d].

    Args:
        gram: WᵀW, [d, d].
        gone: P, the rows that leave, [r, d].
    """
    gone = gone.double()
    return gram.double() - gone.T @ gone


def kept_values(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """Singular values of the kept rows, ascending, float64 [min(k, d)], by whichever way is cheapest.

    Args:
        weight: W, [n, d].
        gram: WᵀW, [d, d] float64.
        keep: indices of the rows, [k], in any order.
    """
    n, d = weight.shape
    if len(keep) < d or 2 * len(keep) < n:
        return singular_values(weight[keep])
    gone = torch.ones(n, dtype=torch.bool, device=weight.device)
    gone[keep] = False
    return gram_values(downdated(gram, weight[gone]), float(gram.diagonal().sum()))  # the trace bounds the largest


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """sup_t |F_a(t) − F_b(t)| of the empirical distributions of two samples of any sizes; in [0, 1]."""
    a, b = a.sort().values, b.sort().values
    points = torch.cat([a, b])
    below_a = torch.searchsorted(a, points, right=True).double() / len(a)
    below_b = torch.searchsorted(b, points, right=True).double() / len(b)
    return float((below_a - below_b).abs().max())


def wasserstein(a: Tensor, b: Tensor) -> float:
    """∫ |F_a(t) − F_b(t)| dt of the empirical distributions of two samples of any sizes, in their unit."""
    a, b = a.double().sort().values, b.double().sort().values
    points = torch.cat([a, b]).sort().values
    left = points[:-1].contiguous()
    below_a = torch.searchsorted(a, left, right=True).double() / len(a)
    below_b = torch.searchsorted(b, left, right=True).double() / len(b)
    return float(((below_a - below_b).abs() * points.diff()).sum())
