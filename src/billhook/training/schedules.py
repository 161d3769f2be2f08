"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def cubic(step: float, start: float, end: float, first: float, last: float) -> float:
    """Sparsity at `step`: `first` until `start`, `last` from `end` on; between, steep at first and flat at the end.

    Source: Zhu & Gupta, "To prune, or not to prune" (1710.01878), equation 1.
    """
    if step >= end:
        return last
    rest = 1 - max(step - start, 0) / (end - start)
    return float(last + (first - last) * rest**3)


def cosine(step: float, total: float, first: float, last: float = 0.0) -> float:
    """`first` at step 0, `last` at `total`, half a period of a cosine between."""
    return last + (first - last) * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2


def geometric(round: int, rounds: int, sparsity: float) -> float:
    """Sparsity after `round` of `rounds` that each remove the same fraction of what is left, `sparsity` in the end."""
    return sparsity if round >= rounds else float(1 - (1 - sparsity) ** (round / rounds))
