"""Sharing out a budget over blocks, and choosing whole channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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
            top = max(_softmax_shares(scores, mean, epsilon, cap))
            low, high = (epsilon, high) if top > min(cap, 2 * mean) else (low, epsilon)
        epsilon = high
    return _softmax_shares(scores, mean, epsilon, cap)


def _softmax_shares(scores: Sequence[float], mean: float, epsilon: float, cap: float) -> list[float]:
    count = len(scores)
    logits = torch.tensor([-s / epsilon for s in scores], dtype=torch.float64)
    weights = torch.softmax(logits, 0)
    fixed = torch.zeros(count, dtype=torch.bool)
    ratios = torch.zeros(count, dtype=torch.float64)
    while True:
        left = mean * count - cap * float(fixed.sum())
        free = weights.masked_fill(fixed, 0.0)
        ratios = torch.where(fixed, cap, left * free / free.sum().clamp_min(1e-300))
        if float(free.sum()) < 1e-300 and not bool(fixed.all()):  # all weight is in fixed ones: share evenly
            ratios = torch.where(fixed, cap, left / float((~fixed).sum()))
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
    if nearest >= size:
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
