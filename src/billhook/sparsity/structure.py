"""Sharing out a budget over blocks, and choosing whole channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.calibrate.gram import inverse_triangular
from billhook.calibrate.statistics import Total
from billhook.errors import BillhookError


def entropic(scores: Sequence[float], mean: float, epsilon: float | None = None, cap: float = 0.85) -> list[float]:
    """One ratio per block from its importance: φ = L·φ̄·softmax(−s/ε), none above `cap`, their mean kept.

    Blocks over the cap are fixed there and the rest is shared out again among the others, which is the optimum under
    that bound. (MoDeGPT, section 3.3, from block influence.)

    Args:
        scores: importance per block; the more important, the less is removed.
        mean: φ̄, 0 <= mean < 1.
        epsilon: strength of the entropy; large is uniform. None: as small as keeps the largest ratio at min(cap, 2φ̄).
        cap: largest ratio of a block.

    Raises:
        BillhookError: `mean` is above `cap`.
    """
    if mean > cap:
        raise BillhookError(f"{mean:.0%} of every block is more than the {cap:.0%} that one block may lose at most.")
    if epsilon is None:
        low, high = 1e-6, 1e6
        for _ in range(100):
            epsilon = math.sqrt(low * high)
            top = max(_softmax_shares(scores, mean, epsilon, len(scores)))  # as if there were no cap
            low, high = (epsilon, high) if top > min(cap, 2 * mean) else (low, epsilon)
        epsilon = high
    return _softmax_shares(scores, mean, epsilon, cap)


def _softmax_shares(scores: Sequence[float], mean: float, epsilon: float, cap: float) -> list[float]:
    count = len(scores)
    logits = torch.tensor([-s / epsilon for s in scores], dtype=torch.float64)
    fixed = torch.zeros(count, dtype=torch.bool)
    ratios = torch.zeros(count, dtype=torch.float64)
    while True:
        left = mean * count - cap * float(fixed.sum())
        ratios = left * torch.softmax(logits.masked_fill(fixed, -math.inf), 0)
        ratios.masked_fill_(fixed, cap)  # where() would round the cap to float32
        over = (ratios > cap + 1e-12) & ~fixed
        if not bool(over.any()):
            return ratios.tolist()
        fixed |= over


def proportional(scores: Sequence[float], mean: float, base: float, cap: float = 0.9) -> list[float]:
    """One ratio per block from its redundancy: FS = SB + LR·(SP − SB)/mean(LR), with LR the scores scaled to 0..1.

    Where the largest would exceed `cap`, the base is raised as far as needed. (Dynamic Slicing, section 3.)

    Args:
        scores: redundancy per block; the more redundant, the more is removed.
        mean: SP, the mean of the result.
        base: SB, what every block loses; 0 <= base <= mean.
        cap: largest ratio of a block, above `mean`.
    """
    low, high = min(scores), max(scores)
    if high - low < 1e-12:
        return [mean] * len(scores)
    scaled = [(s - low) / (high - low) for s in scores]
    average = sum(scaled) / len(scaled)
    amount = mean - base
    if base + amount / average > cap:
        amount = max(0.0, (cap - mean) / (1 / average - 1))
        base = mean - amount
    return [base + s * amount / average for s in scaled]


def rounded(width: float, multiple: int, size: int) -> int:
    """The multiple that is nearest to `width`, at least one and at most `size` (itself where it is no multiple)."""
    nearest = int(width / multiple + 0.5) * multiple
    if nearest >= size or size - width < abs(width - nearest):
        return size
    return min(size, max(multiple, nearest, 1))


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last dimension, sorted; of equal ones the first stay."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def column_scores(weight: Tensor, energy: Tensor | None, norm: str = "l1") -> Tensor:
    """Importance of each input of a matrix: the norm of its column, times the norm of what enters there.

    Args:
        weight: [out, in].
        energy: diag H, the squared norms of the inputs, [in]; None: columns alone (magnitude).
        norm: "l1", the sum of Wanda's scores over the column, or "l2".
    """
    weight = weight.float()
    columns = weight.abs().sum(0) if norm == "l1" else weight.square().sum(0).sqrt()
    return columns if energy is None else columns * energy.float().sqrt()


def ridge_leverage(gram: Tensor, ridge: float) -> Tensor:
    """How much of each channel the others do not tell: s_i = [H (H + λI)⁻¹]_ii = 1 − λ [(H + λI)⁻¹]_ii, float64 [in].

    Large λ orders by energy H_ii, small λ by what a channel adds to a least-squares fit from all others, 1/[H⁻¹]_ii.
    In [0, 1); the sum is the effective dimension Σ e/(e + λ) over the eigenvalues e. (MoDeGPT, type I.)

    Args:
        gram: H = X Xᵀ, [in, in].
        ridge: λ in units of the mean of diag H.
    """
    gram = gram.double()
    scale = ridge * (float(gram.diagonal().mean()) or 1.0)
    factor, failed = torch.linalg.cholesky_ex(gram + scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if int(failed):  # rounding of a float32 sum left eigenvalues below −λ
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        shares: Tensor = vectors.square() @ (values / (values + scale))
        return shares
    inverse = inverse_triangular(factor)
    return (1 - scale * inverse.square().sum(0)).clamp_min(0)


def output_energy(weight: Tensor, bias: Tensor | None, gram: Tensor, total: Total) -> Tensor:
    """Σ over tokens of the squared outputs of a linear layer, (w·x + b)², from the moments of its input; float64 [out].

    The moment of its outputs is W H Wᵀ, bias terms aside; only the diagonal is formed.

    Args:
        weight: W, [out, in].
        bias: b, [out].
        gram: H = Σ x xᵀ, [in, in].
        total: Σ x and the number of tokens.
    """
    weight = weight.double()
    energy = ((weight @ gram.double()) * weight).sum(1)
    if bias is not None:
        bias = bias.double()
        energy = energy + 2 * bias * (weight @ total.sum) + total.tokens * bias.square()
    return energy.clamp_min(0)
