"""How alike two masks are, and how many weights of a model in pre-training are nearly zero.

Source: Jaiswal, Liu, Chen & Wang, "The Emergence of Essential Sparsity in Large Pre-trained Models", NeurIPS 2023,
arXiv:2306.03805. The correction for chance, the thresholds and the test of the event are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from billhook.errors import BillhookError

Masks = Tensor | Mapping[str, Tensor]

_ROUNDING = 1e-9  # differences of shares below this are rounding


@dataclass(frozen=True)
class MaskSimilarity:
    """Cosine of two masks m1 and m2, taken as vectors of zeros and ones over all their entries."""

    cosine: float  # |m1 & m2| / sqrt(|m1| |m2|)
    expected: float  # the same for independent masks of these densities
    densities: tuple[float, float]  # fraction kept

    @property
    def corrected(self) -> float:
        """(cosine − expected) / (1 − expected): 0 for independent masks, 1 for equal ones.

        NaN where both masks keep everything. Masks of different densities stay below 1 even when nested.
        """
        return (self.cosine - self.expected) / (1 - self.expected) if self.expected < 1 else math.nan


def mask_similarity(first: Masks, second: Masks) -> MaskSimilarity:
    """Compare two masks of one tensor or of a whole model.

    Two independent masks of densities d1 and d2 share N·d1·d2 of N entries on average, so that their cosine is
    sqrt(d1·d2) on average: d for equal densities. A high cosine at a low sparsity therefore means little.

    Args:
        first: mask, any shape, bool or numbers (nonzero = kept), or several by name.
        second: the same names and shapes.

    Raises:
        BillhookError: names or shapes differ, or a mask keeps nothing.
    """
    one = {"": first} if isinstance(first, Tensor) else first
    two = {"": second} if isinstance(second, Tensor) else second
    if one.keys() != two.keys():
        name = min(one.keys() ^ two.keys())
        raise BillhookError(f"The masks to compare are of different matrices: {name!r} is in one of them only.")
    both = kept_first = kept_second = total = 0
    for name, mask in one.items():
        if mask.shape != two[name].shape:
            shapes = f"{list(mask.shape)} and {list(two[name].shape)}"
            raise BillhookError(f"The masks to compare{f' of {name}' if name else ''} have different shapes: {shapes}.")
        a, b = mask.bool(), two[name].bool()
        both += int((a & b.to(a.device)).sum())
        kept_first += int(a.sum())
        kept_second += int(b.sum())
        total += a.numel()
    if not kept_first or not kept_second:
        raise BillhookError("A mask that keeps nothing has no cosine: compare masks with a sparsity below 1.")
    expected = math.sqrt(kept_first * kept_second) / total
    return MaskSimilarity(
        both / math.sqrt(kept_first * kept_second), expected, (kept_first / total, kept_second / total)
    )


def cosine(first: Masks, second: Masks) -> float:
    """|m1 & m2| / sqrt(|m1| |m2|). Arguments and errors as in `mask_similarity`."""
    return mask_similarity(first, second).cosine


def corrected_cosine(first: Masks, second: Masks) -> float:
    """The cosine beyond chance, (cos − d) / (1 − d) with d = sqrt(d1·d2). As in `mask_similarity`."""
    return mask_similarity(first, second).corrected


# The probe in pre-training


def near_zero_thresholds(
    weights: Mapping[str, Tensor],
    kind: Callable[[str], str] = lambda name: name.rpartition(".")[2],
    factor: float = 1e-3,
) -> dict[str, float]:
    """Below which |w| counts as nearly zero: factor · median |w| over all matrices of a kind, at the first step.

    Args:
        weights: the prunable matrices at step 0 by name, any float dtype.
        kind: name -> kind; matrices of one kind (all query projections) share a threshold. The last part of the
            dotted name by default.
        factor: also worth recording a decade below and above.

    Returns:
        name -> threshold, for `near_zero`.

    Raises:
        BillhookError: the median of a kind is zero or not finite.
    """
    kinds: dict[str, list[str]] = {}
    for name in weights:
        kinds.setdefault(kind(name), []).append(name)
    result: dict[str, float] = {}
    for label, names in kinds.items():
        middle = float(torch.cat([weights[name].detach().flatten().float().abs() for name in names]).median())
        if not (math.isfinite(middle) and middle > 0):
            raise BillhookError(
                f"The median |w| of the matrices {label!r} is {middle} at the first step: leave them out, or pass a "
                "threshold of your own to near_zero."
            )
        result |= dict.fromkeys(names, factor * middle)
    return result


def near_zero(weights: Mapping[str, Tensor], tau: float | Mapping[str, float]) -> float:
    """Share of the weights with |w| < tau, over all matrices together.

    Args:
        weights: the prunable matrices by name, any float dtype.
        tau: one threshold, or one per matrix (`near_zero_thresholds`).

    Raises:
        BillhookError: there is no weight, or no threshold for a matrix.
    """
    count = total = 0
    for name, weight in weights.items():
        if isinstance(tau, Mapping) and name not in tau:
            raise BillhookError(f"There is no threshold for the matrix {name!r}: take them from all matrices.")
        threshold = tau[name] if isinstance(tau, Mapping) else tau
        # in float64: a threshold rounded to the dtype of the weights would move across them
        count += int((weight.detach().double().abs() < threshold).sum())
        total += weight.numel()
    if total == 0:
        raise BillhookError("There are no weights to count near-zero ones in.")
    return count / total


@dataclass(frozen=True)
class Event:
    """The window of a training run in which the near-zero share grew most."""

    start: int  # step
    end: int  # step
    increase: float
    median: float  # increase over all windows
    deviation: float  # median absolute deviation of the increases


def find_event(steps: Sequence[int], shares: Sequence[float], window: int = 2000, least: float = 5.0) -> Event | None:
    """The abrupt sparsification of a training run, if there was one.

    Over every window from a checkpoint to the last one at most `window` steps later the increase is taken; the
    largest is reported if it is more than `least` median absolute deviations above the median of all windows.
    (Above the median, not above 0: a share that grows evenly has no event.)

    Args:
        steps: of the checkpoints, ascending.
        shares: near-zero share at each.
        window: steps.
        least: deviations.

    Returns:
        the event, the first one of equals; None without one, or with fewer than three windows.

    Raises:
        BillhookError: the lengths differ or the steps do not ascend.
    """
    if len(steps) != len(shares):
        raise BillhookError(f"There are {len(steps)} steps but {len(shares)} shares: give one share per checkpoint.")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise BillhookError("The steps of the checkpoints must ascend.")
    windows: list[tuple[int, int]] = []
    j = 0
    for i, step in enumerate(steps):
        if step + window > steps[-1]:
            break
        while j + 1 < len(steps) and steps[j + 1] <= step + window:
            j += 1
        if j > i:
            windows.append((i, j))
    if len(windows) < 3:
        return None
    increases = [shares[j] - shares[i] for i, j in windows]
    usual = median(increases)
    deviation = median(abs(increase - usual) for increase in increases)
    # rounding must not decide between windows that grew alike
    top = next(k for k, increase in enumerate(increases) if increase >= max(increases) - _ROUNDING)
    excess = increases[top] - usual
    if excess <= max(least * deviation, _ROUNDING):
        return None
    i, j = windows[top]
    return Event(steps[i], steps[j], increases[top], usual, deviation)
