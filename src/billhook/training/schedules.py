"""Schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


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


# Learning rates of a retraining, as factors on the peak rate at a fraction `t` of it.
# Source: Zimmer, Spiegel & Pokutta, "How I Learned to Stop Worrying and Love Retraining" (2111.00843), and the papers
# it compares: Renda et al. (2003.02389) for LRW, Le & Hua (2105.03193) for SLR and CLR.

WARMUP = 0.1


def _warm(t: float, after: Callable[[float], float]) -> float:
    """Half a period of a cosine from 0 up to `after(0)` in the first tenth, then `after` over what is left."""
    if t < WARMUP:
        return cosine(t, WARMUP, 0.0, after(0.0))
    return after(min((t - WARMUP) / (1 - WARMUP), 1.0))


def ft(t: float, low: float) -> float:
    """Fine-tuning: constant at `low`, the lowest rate of the dense training."""
    return low


def lrw(t: float, dense: Callable[[float], float], part: float) -> float:
    """Learning-rate rewinding: the last `part` of the dense training's own schedule."""
    return dense(1 - part + part * t)


def slr(t: float, dense: Callable[[float], float]) -> float:
    """Scaled restart: the whole schedule of the dense training in less time, after a warm-up."""
    return _warm(t, dense)


def clr(t: float, low: float) -> float:
    """Cyclic restart: warm-up to the peak, then a cosine down to `low`."""
    return _warm(t, lambda u: cosine(u, 1.0, 1.0, low))


def llr(t: float) -> float:
    """Linear restart: warm-up to the peak, then linearly to zero."""
    return _warm(t, lambda u: 1 - u)


def allr_peak(distance: float, removed: float, length: float) -> float:
    """The peak of an adaptive linear restart: the more a pruning has damaged for what it removed, the higher.

    Args:
        distance: ‖θ − θ_pruned‖ / ‖θ‖ over all parameters, norms and biases too.
        removed: fraction of the weights that were there which this pruning removed.
        length: of the retraining, as a multiple of the dense training's.

    Returns:
        distance / sqrt(removed), between min(length, 1) and 1.
    """
    ratio = distance / math.sqrt(removed) if removed > 0 else 0.0
    return min(max(ratio, min(length, 1.0)), 1.0)
