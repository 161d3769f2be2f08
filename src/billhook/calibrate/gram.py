"""The Gram matrix (Hessian of the layer-wise least-squares problem) of a site's input, and its factor."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.calibrate.statistics import Products
from billhook.errors import BillhookError
from billhook.system import finite


class Gram(Products["Gram"]):
    """Gram matrix of the input, H = Σ x xᵀ over all calibration tokens, float32 [in, in].

    The constant in front of H that papers differ in (2, 1/N) changes no result: damping is relative to the
    mean of the diagonal.
    """

    dtype = torch.float32
    wide = 1024 if torch.cpu._is_amx_tile_supported() else 512  # measured

    def result(self) -> Gram:
        self.whole()
        return self

    @property
    def dead(self) -> Tensor:
        """bool [in]: channels that are zero on all calibration data."""
        return self.matrix.diagonal() == 0


def damped(gram: Tensor, damping: float) -> Tensor:
    """H with dead channels (H_jj = 0) given a unit diagonal, plus damping · mean(diag H) on the diagonal."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    result = gram.clone()
    result.diagonal()[dead] = 1.0
    result.diagonal().add_(damping * result.diagonal().mean())
    return result


def inverse_cholesky(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Upper triangular U with (damped H)⁻¹ = UᵀU, as SparseGPT's sweep reads it.

    Computed without forming the inverse: with J the reversal of the channels and J H J = LLᵀ,
    H⁻¹ = J L⁻ᵀ L⁻¹ J, so U = J L⁻¹ J. One factorisation and one triangular solve.

    Where the factorisation fails, damping grows tenfold at a time, up to 1.

    Args:
        gram: [in, in], float32 or float64.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Raises:
        BillhookError: H is not finite, or not positive definite even with damping 1.
    """
    if not finite(gram):
        raise BillhookError("The Gram matrix of the calibration input is not finite: check the activations.")
    strength = damping
    while True:
        lower = cholesky(damped(gram, strength).flip(0, 1))
        if lower is not None:
            inverse = inverse_triangular(lower)
            del lower  # as large as everything else here
            upper = inverse.flip(0, 1)
            if finite(upper):
                return upper.contiguous()
        if strength >= 1:
            raise BillhookError(
                "The Gram matrix of the calibration input is not positive definite even with damping 1: use more "
                "calibration data."
            )
        strength = min(1.0, max(strength, 1e-3) * 10)


def cholesky(matrix: Tensor, base: int = 256) -> Tensor | None:
    """Lower triangular L with LLᵀ = matrix, [n, n]; None where it is not positive definite. `matrix` is overwritten.

    Block by block: most of the work is matrix products, which are faster than the library's factorisation of the
    whole on CPUs.
    """
    n = len(matrix)
    for start in range(0, n, base):
        end = min(start + base, n)
        block, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if int(info) != 0:
            return None
        matrix[start:end, start:end] = block
        if end < n:
            below = matrix[end:, start:end]
            below.copy_(torch.linalg.solve_triangular(block, below.T, upper=False).T)
            for left in range(end, n, base):  # on and below the diagonal only
                right = min(left + base, n)
                matrix[left:, left:right].addmm_(matrix[left:, start:end], matrix[left:right, start:end].T, alpha=-1)
    return matrix.tril_()


def inverse_triangular(lower: Tensor, base: int = 256) -> Tensor:
    """L⁻¹ of a lower triangular L [n, n] by halves, so that most of the work is matrix products.

    A solve against the identity does not know that its right side is triangular and takes three times the work.
    """
    n = len(lower)
    if n <= base:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return inverse
    half = n // 2
    result = torch.zeros_like(lower)
    result[:half, :half] = first = inverse_triangular(lower[:half, :half], base)
    result[half:, half:] = last = inverse_triangular(lower[half:, half:], base)
    result[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return result
