"""DSnoT's swaps on one matrix (Zhang et al., ICLR 2024): a mask whose rows have a small expected output error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.calibrate.statistics import Moments
from billhook.sparsity.patterns import NM

_PAPER_WIDTH, _PAPER_CYCLES, _PAPER_LENGTH = 4096, 50, 2048


def cycles_for(width: int) -> int:
    """Swaps per row in the paper's proportion, 50 for 4096 inputs; at least 1."""
    return max(1, round(_PAPER_CYCLES * width / _PAPER_WIDTH))


@dataclass(frozen=True)
class Swapped:
    """What came of the swaps.

    Attributes:
        keep: bool [out, in], the refined mask.
        swaps: int64 [out], how many each row made.
        before, after: float32 [out], the rows' errors ε = Σ_pruned W·S, in units of the output summed over the
            tokens of a sequence.
    """

    keep: Tensor
    swaps: Tensor
    before: Tensor
    after: Tensor


def dsnot(
    weight: Tensor,
    keep: Tensor,
    moments: Moments,
    *,
    cycles: int,
    threshold: float = 0.1,
    variance_power: float = 1.0,
    overshoot: bool = True,
    nm: NM | None = None,
) -> Swapped:
    """Swap pruned and kept weights, one pair per row and cycle, all rows at once.

    With c = W · S the mean contribution of a weight and ε = Σ_pruned c the row's error, a cycle revives the pruned
    weight of largest sign(ε) · c / v^p (v the variance of its input) and prunes the kept weight of smallest
    |W| · ‖X‖ among those whose removal also moves ε towards zero. Under N:M the pruned weight is of the revived
    one's group, whatever its sign, and a swap must keep the sign of ε. Each weight changes state at most once.

    Args:
        weight: [out, in], dense.
        keep: bool [out, in], the mask to start from.
        moments: of the input; its `length` scales the threshold.
        cycles: swaps per row at most; 0 returns the mask as it is.
        threshold: rows with |ε| at or below threshold · length / 2048 stop.
        variance_power: p; 0 ignores the variance.
        overshoot: whether ε may change its sign (unstructured only).
        nm: N:M pattern of the mask.
    """
    w = weight.float()
    contribution = w * moments.token_sum
    importance = w.abs() * moments.square_sum.clamp(min=0).sqrt()
    spread = moments.within_variance.clamp(min=1e-12) ** variance_power
    alive = moments.square_sum > 0
    keep = keep.clone()
    grow = ~keep & alive  # candidates; an index leaves its list for good once it was taken
    prune = keep.clone()
    error = (contribution * ~keep).sum(dim=1)
    before = error.clone()
    start_sign = torch.sign(error)
    limit = threshold * moments.length / _PAPER_LENGTH
    active = torch.ones_like(error, dtype=torch.bool)
    swaps = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    rows = torch.arange(len(w), device=w.device)

    for _ in range(cycles):
        active &= error.abs() > limit
        if not bool(active.any()):
            break
        sign = torch.sign(error)[:, None]
        gain = sign * contribution
        revived = torch.where(grow, gain / spread, -torch.inf).argmax(dim=1)
        if nm is None:
            candidates = prune & (gain < 0)
        else:
            group = torch.arange(w.shape[1], device=w.device) // nm.m
            candidates = prune & (group == (revived // nm.m)[:, None])
        removed = torch.where(candidates, importance, torch.inf).argmin(dim=1)
        possible = grow[rows, revived] & candidates[rows, removed] & (gain[rows, revived] > 0)
        after = error + contribution[rows, removed] - contribution[rows, revived]
        accepted = active & possible
        if nm is not None or not overshoot:
            accepted &= torch.sign(after) == start_sign
        if nm is None:
            active = accepted
        else:  # another group may still do: what was tried is not tried again
            tried = active & possible
            grow[rows[active], revived[active]] = False
            prune[rows[tried], removed[tried]] = False
            active = active & grow.any(dim=1)
        taken = rows[accepted]
        keep[taken, revived[accepted]] = True
        keep[taken, removed[accepted]] = False
        grow[taken, revived[accepted]] = False
        prune[taken, removed[accepted]] = False
        error = torch.where(accepted, after, error)
        swaps += accepted
    return Swapped(keep, swaps, before, error)
