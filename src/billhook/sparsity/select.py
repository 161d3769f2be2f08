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

_LONG = 100_000  # entries of a row from which a sample pays
_ROW_SAMPLE, _GLOBAL_SAMPLE = 1 << 12, 1 << 16
_THIN = 4096  # groups up to which all comparisons at once are faster than one after the other


def budget(total: int, sparsity: float) -> int:
    """Number of weights to remove out of `total`: floor(total · sparsity), immune to binary rounding."""
    return math.floor(round(total * sparsity, 6))


def keep_largest(scores: Tensor, prune: int, threshold: Tensor | None = None) -> Tensor:
    """Mask that drops the `prune` smallest scores of every row, exactly.

    Args:
        scores: [rows, n], any float dtype, no NaN.
        prune: number of entries to drop per row, 0 <= prune <= n.
        threshold: the largest score dropped, where it is known: [rows, 1] or a scalar. Found by selection otherwise.

    Returns:
        bool mask [rows, n], True where kept; equal to dropping the first `prune` indices of a stable sort.
    """
    n = scores.shape[1]
    if prune <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if prune >= n:
        return torch.zeros_like(scores, dtype=torch.bool)
    if threshold is None:
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
    if len(scores) == 1 and scores.shape[1] >= _LONG:
        found = bracketed(lambda: scores, k, _ROW_SAMPLE)
        if found is not None:
            return found.view(1, 1)
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy's selection is vectorised: several times faster than kthvalue here
        return torch.from_numpy(np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def bracketed(chunks: Callable[[], Iterable[Tensor]], k: int, sample: int) -> Tensor | None:
    """The k-th smallest (from 1) of all entries, between two neighbours of its rank in a sample.

    A few comparisons of each entry and a selection among those between the neighbours: no sort, and memory for a few
    hundredths of the entries. Every 2nd, 3rd, ... entry is the sample, so that the result is repeatable; where it
    misleads (entries in an order of their own), nothing is returned rather than something wrong.

    Args:
        chunks: called three times at most; yields one-dimensional tensors of one dtype, no NaN, in a fixed order.
        sample: about how many entries to look at first.

    Returns:
        a scalar tensor, or None where the sample's neighbours do not enclose it.

    Source: Floyd & Rivest, "Expected time bounds for selection" (1975), with one round.
    """
    total = sum(len(chunk) for chunk in chunks())
    stride = max(1, total // sample)
    looked_at = torch.cat([chunk[::stride] for chunk in chunks()]).sort().values
    place = (k - 0.5) / total * len(looked_at)
    margin = 4 * math.sqrt(place * max(1 - place / len(looked_at), 0)) + 2  # four standard deviations of the rank
    first, last = math.floor(place - margin), math.ceil(place + margin)
    low = looked_at[first] if first >= 0 else looked_at.new_tensor(-math.inf)
    high = looked_at[last] if last < len(looked_at) else looked_at.new_tensor(math.inf)
    rank, between = k, []
    for chunk in chunks():
        above = chunk > low
        rank -= len(chunk) - int(above.sum())
        between.append(chunk[above & (chunk <= high)])
    if rank <= 0:  # at or below the lower neighbour
        smaller = sum(int((chunk < low).sum()) for chunk in chunks())
        return low if smaller < k else None
    inside = torch.cat(between)
    return inside.kthvalue(rank).values if rank <= len(inside) else None


class Cut(NamedTuple):
    """Where the smallest entries of several matrices end.

    Attributes:
        threshold: the largest entry removed, float32 scalar; -inf where none is.
        counts: name -> how many of a matrix are removed.
    """

    threshold: Tensor
    counts: dict[str, int]


def global_cut(matrices: Callable[[], Iterable[tuple[str, Tensor]]], prune: int) -> Cut:
    """Which entries of each matrix are among the `prune` smallest of all of them together.

    The exact rank is found between neighbours in a sample (`bracketed`), else by two histograms over the bit pattern
    of float32 (whose order is the order of non-negative floats), and a count: nothing is sorted.

    Args:
        matrices: called a few times; yields (name, non-negative scores) in a fixed order.
        prune: how many entries to remove in all.

    Returns:
        the cut; its counts sum to `prune`. Ties go to the earlier matrix first.
    """
    if prune <= 0:
        return Cut(torch.tensor(-math.inf), {name: 0 for name, _ in matrices()})

    def chunks() -> Iterable[Tensor]:
        return (scores.float().flatten() for _, scores in matrices())

    threshold = bracketed(chunks, prune, _GLOBAL_SAMPLE)
    if threshold is None:
        threshold = _by_histogram(chunks, prune)
    below: dict[str, int] = {}
    tied: dict[str, int] = {}
    for name, scores in matrices():
        scores = scores.float()
        below[name] = int((scores < threshold).sum())
        tied[name] = int((scores == threshold).sum())
    ties = prune - sum(below.values())
    counts: dict[str, int] = {}
    for name in below:
        taken = min(ties, tied[name])
        ties -= taken
        counts[name] = below[name] + taken
    return Cut(threshold, counts)


def _by_histogram(chunks: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """The k-th smallest (from 1) of all entries, float32 and non-negative, whatever their order."""

    def bits(scores: Tensor) -> Tensor:
        # "+ 0.0" turns -0 into +0, whose bit pattern is the smallest
        return (scores + 0.0).contiguous().view(torch.int32)

    high = torch.zeros(1 << 16, dtype=torch.int64)
    for scores in chunks():
        high += torch.bincount(bits(scores) >> 16, minlength=1 << 16).cpu()
    below = high.cumsum(0)
    bucket = int(torch.searchsorted(below, torch.tensor(k)))
    rest = k - (int(below[bucket - 1]) if bucket else 0)

    low = torch.zeros(1 << 16, dtype=torch.int64)
    for scores in chunks():
        b = bits(scores)
        low += torch.bincount(b[(b >> 16) == bucket] & 0xFFFF, minlength=1 << 16).cpu()
    fine = int(torch.searchsorted(low.cumsum(0), torch.tensor(rest)))
    return torch.tensor((bucket << 16) | fine, dtype=torch.int32, device=b.device).view(torch.float32)
