"""Exact selection of the smallest scores.

Reference implementations compare with a threshold, which removes more weights than asked where scores tie.
Here the number removed is exact: ties are resolved in favour of pruning the lower index first, so the result
equals a stable sort, at the cost of a selection (O(n)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_THIN = 4096  # groups up to which all comparisons at once are faster than one after the other


def budget(total: int, sparsity: float) -> int:
    """Number of weights to remove out of `total`: floor(total · sparsity), immune to binary rounding."""
    return math.floor(round(total * sparsity, 6))


def keep_largest(scores: Tensor, prune: int) -> Tensor:
    """Mask that drops the `prune` smallest scores of every row, exactly.

    Args:
        scores: [rows, n], any float dtype, no NaN.
        prune: number of entries to drop per row, 0 <= prune <= n.

    Returns:
        bool mask [rows, n], True where kept; equal to dropping the first `prune` indices of a stable sort.
    """
    n = scores.shape[1]
    if prune <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if prune >= n:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, prune)
    keep = scores > threshold
    surplus = prune - (n - keep.sum(dim=1, keepdim=True))  # <= 0: entries at the threshold that must stay
    if bool((surplus < 0).any()):
        ties = scores == threshold
        from_the_right = ties.flip(1).cumsum(1).flip(1)
        keep |= ties & (from_the_right <= -surplus)
    return keep


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the `n` largest of every `m` consecutive scores of a row, exactly.

    Args:
        scores: [rows, columns] with columns divisible by m.

    Returns:
        bool mask [rows, columns].
    """
    rows, columns = scores.shape
    lanes = scores.reshape(-1, m).T
    if lanes.shape[1] <= _THIN:
        return keep_lanes(lanes, n).T.reshape(rows, columns)
    ranks = [torch.full_like(lane, m - 1 - i, dtype=torch.int8) for i, lane in enumerate(lanes)]
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = lanes[i] <= lanes[j]
            ranks[j] += later_wins
            ranks[i] -= later_wins.to(torch.int8)
    return torch.stack([rank >= m - n for rank in ranks], dim=-1).reshape(rows, columns)


def keep_lanes(scores: Tensor, n: int) -> Tensor:
    """`keep_n_of_m` of groups that lie side by side, for few enough that the calls cost more than the work.

    Ranks are counted from the m(m−1)/2 comparisons of a group, which beats sorting for the small m that hardware
    knows: rank = A · [earlier ≤ later] + b, with each comparison's point for the one or the other of its pair.

    Args:
        scores: [m, groups], no NaN.
        n: how many of each group to keep.

    Returns:
        bool mask [m, groups].
    """
    m = len(scores)
    pairs = _pairs(m, scores.device)
    later_wins = (scores[pairs.earlier] <= scores[pairs.later]).float()
    return torch.addmm(pairs.offset, pairs.points, later_wins) >= m - n - 0.5


class _Pairs(NamedTuple):
    earlier: Tensor  # int64 [pairs], the lower index
    later: Tensor  # int64 [pairs]
    points: Tensor  # float32 [m, pairs]
    offset: Tensor  # float32 [m, 1]


@lru_cache
def _pairs(m: int, device: torch.device) -> _Pairs:
    earlier, later = torch.triu_indices(m, m, 1, device=device)
    points = torch.zeros(m, len(earlier), device=device)
    each = torch.arange(len(earlier), device=device)
    points[later, each] = 1.0
    points[earlier, each] = -1.0  # its point is 1 − [earlier ≤ later]: ties go against the lower index
    offset = torch.arange(m - 1, -1, -1, dtype=torch.float32, device=device)[:, None]
    return _Pairs(earlier, later, points, offset)


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of every row of [rows, n], as [rows, 1]."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy's selection is vectorised: several times faster than kthvalue here
        return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def global_counts(matrices: Callable[[], Iterable[tuple[str, Tensor]]], prune: int) -> dict[str, int]:
    """How many entries of each matrix are among the `prune` smallest of all of them together.

    The exact rank is found by two histograms over the bit pattern of float32 (whose order is the order of
    non-negative floats) and a count, so memory does not grow with the number of weights.

    Args:
        matrices: called three times; yields (name, non-negative scores) in a fixed order.
        prune: how many entries to remove in all.

    Returns:
        name -> count; the counts sum to `prune`. Ties go to the earlier matrix first.
    """
    if prune <= 0:
        return {name: 0 for name, _ in matrices()}

    def bits(scores: Tensor) -> Tensor:
        # "+ 0.0" turns -0 into +0, whose bit pattern is the smallest
        return (scores.float() + 0.0).contiguous().view(torch.int32).flatten()

    high = torch.zeros(1 << 16, dtype=torch.int64)
    for _, scores in matrices():
        high += torch.bincount(bits(scores) >> 16, minlength=1 << 16).cpu()
    below = high.cumsum(0)
    bucket = int(torch.searchsorted(below, torch.tensor(prune)))
    rest = prune - (int(below[bucket - 1]) if bucket else 0)

    low = torch.zeros(1 << 16, dtype=torch.int64)
    for _, scores in matrices():
        b = bits(scores)
        low += torch.bincount(b[(b >> 16) == bucket] & 0xFFFF, minlength=1 << 16).cpu()
    below = low.cumsum(0)
    fine = int(torch.searchsorted(below, torch.tensor(rest)))
    ties = rest - (int(below[fine - 1]) if fine else 0)
    threshold = (bucket << 16) | fine

    counts: dict[str, int] = {}
    for name, scores in matrices():
        b = bits(scores)
        taken = min(ties, int((b == threshold).sum()))
        ties -= taken
        counts[name] = int((b < threshold).sum()) + taken
    return counts
