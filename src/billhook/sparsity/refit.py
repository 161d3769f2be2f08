"""Least-squares refit of a matrix whose inputs are partly removed."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = 1e-3) -> Tensor:
    """The weights on the kept inputs that best reproduce the outputs of all of them.

    min over B' of ‖B' X_M − B X‖² is solved as a correction, B'_M = B_M + B_P H_PM (H_MM + δI)⁻¹: nothing changes
    where nothing is removed, and damping shrinks the correction and not the weights. (FASP, section on restoration;
    the Nyström refit of MoDeGPT's type I is the same.)

    Args:
        weight: B, [out, in].
        gram: H = X Xᵀ over the calibration tokens, [in, in].
        keep: the inputs that stay, [k] sorted indices.
        damping: δ in units of the mean of diag H.

    Returns:
        B'_M, [out, k], float64.
    """
    rounding = torch.finfo(gram.dtype).eps
    weight, gram = weight.double(), gram.double()
    keep = keep.to(weight.device)
    gone = torch.ones(gram.shape[0], dtype=torch.bool, device=weight.device)
    gone[keep] = False
    kept = weight[:, keep]
    if not gone.any():
        return kept
    inside = gram[keep][:, keep]
    scale = float(gram.diagonal().mean()) or 1.0
    dead = inside.diagonal() == 0
    inside.diagonal().add_(damping * scale + dead * scale)
    right = weight[:, gone] @ gram[gone][:, keep]
    factor, failed = torch.linalg.cholesky_ex(inside)
    if int(failed) or float(factor.diagonal().min()) ** 2 < 4 * rounding * scale:
        # rank-deficient and hardly damped: the smallest correction that fits, without what is rounding of the sums
        inverse: Tensor = torch.linalg.pinv(inside, hermitian=True, rtol=len(inside) * rounding)
        return kept + right @ inverse
    correction: Tensor = torch.cholesky_solve(right.T, factor)
    return kept + correction.T


def refit_error(weight: Tensor, gram: Tensor, keep: Tensor) -> float:
    """‖B X − B'X_M‖² of the undamped refit: tr(B_P (H_PP − H_PM H_MM⁺ H_MP) B_Pᵀ), the Schur complement."""
    weight, gram = weight.double(), gram.double()
    gone = torch.ones(gram.shape[0], dtype=torch.bool)
    gone[keep] = False
    inside, across = gram[keep][:, keep], gram[gone][:, keep]
    schur = gram[gone][:, gone] - across @ torch.linalg.pinv(inside, hermitian=True) @ across.T
    return float(torch.trace(weight[:, gone] @ schur @ weight[:, gone].T))
