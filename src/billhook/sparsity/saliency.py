"""Saliencies: what a weight is worth. Pure functions of a weight [out, in] and the statistics of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32 [out, in]."""
    return weight.float().abs()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Sun et al. 2024, eq. 1): magnitude weighted by the norm of the input it multiplies.

    Args:
        weight: [out, in].
        norm: ℓ2 norm of each input channel over the calibration tokens, [in].

    Returns:
        float32 [out, in].
    """
    return weight.float().abs() * norm


def relative_importance(weight: Tensor) -> Tensor:
    """RI: |W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij| (Zhang et al. 2024); 0/0 in dead rows or columns is 0."""
    size = weight.float().abs()
    columns = size.sum(dim=0, keepdim=True)
    rows = size.sum(dim=1, keepdim=True)
    return torch.nan_to_num(size / columns) + torch.nan_to_num(size / rows)


def ria(weight: Tensor, norm: Tensor, exponent: float = 0.5) -> Tensor:
    """RIA: RI · ‖X_j‖₂^a (Zhang et al. 2024); `norm` as in `wanda`; float32 [out, in]."""
    return relative_importance(weight) * norm.float() ** exponent


def obs(weight: Tensor, diagonal: Tensor) -> Tensor:
    """w² / U_jj² (Frantar & Alistarh 2023, eq. 3, on the weights as they are); float32 [out, in].

    Args:
        weight: [out, in].
        diagonal: of U, where (H + damping)⁻¹ = UᵀU; [in].
    """
    return (weight.float() / diagonal).square()
