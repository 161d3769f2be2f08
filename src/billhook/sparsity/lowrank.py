"""Replacing the channels between two matrices by fewer ones."""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = 1e-10  # of the largest eigenvalue: directions of less energy are none


def fewer_channels(moment: Tensor, reader: Tensor | None, rank: int, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """The projection E, D of a channel space that best keeps what is read from it: min over E, D of ‖(B − B D E) v‖².

    v are the channels, with second moment A = Σ v vᵀ = L Lᵀ, and B is the matrix that reads them. With the SVD
    B L = R Θ Pᵀ the optimum is E = P_kᵀ L⁻¹, D = L P_k, and the error Σ_{i>k} θ_i². Where v = W x for inputs x with
    moment C, this is the truncated SVD of B W C^½ at the cost of an eigendecomposition as wide as v, not as x.
    (MoDeGPT, type III.)

    Args:
        moment: A, [channels, channels], symmetric positive semidefinite.
        reader: B, [out, channels]; None: what is kept is v itself (its principal components).
        rank: k, how many channels there will be.
        damping: added to the diagonal of A, in units of its largest eigenvalue.

    Returns:
        E [k, channels] for the matrix that writes the channels, E W, and D [channels, k] for the one that reads them,
        B D; float64. Channels beyond the rank of B L are zero.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    largest = float(values[-1].clamp_min(0))
    if largest == 0:  # nothing ever flows here, so all directions are alike
        values, largest = torch.ones_like(values), 1.0
    values = values + damping * largest
    some = values > _NOTHING * largest
    root = values[some].sqrt()
    vectors = vectors[:, some]
    lower, inverse = vectors * root, (vectors / root).T
    if reader is None:
        kept = torch.eye(len(root), dtype=root.dtype, device=root.device).flip(0)  # eigenvalues are ascending
        lower, inverse = vectors, vectors.T
    else:
        kept = torch.linalg.svd(reader.double() @ lower, full_matrices=False).Vh
    kept = kept[:rank]
    encode = moment.new_zeros(rank, len(moment), dtype=torch.float64)
    decode = moment.new_zeros(len(moment), rank, dtype=torch.float64)
    encode[: len(kept)] = kept @ inverse
    decode[:, : len(kept)] = lower @ kept.T
    return encode, decode


def balanced(writer: Tensor, reader: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with each channel's row and column of one norm, which loses least in a low precision.

    Args:
        writer: [k, in]; its row i makes channel i.
        reader: [out, k]; its column i reads channel i.
    """
    rows, columns = writer.norm(dim=1), reader.norm(dim=0)
    scale = torch.where((rows > 0) & (columns > 0), (columns / rows.clamp_min(1e-300)).sqrt(), 1.0)
    return writer * scale[:, None], reader / scale
