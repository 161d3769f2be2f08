"""How unequal magnitudes are: the PQ index and the Gini index, from weights alone.

0 for equal magnitudes, close to 1 when few entries hold almost everything. In a network that is pruned and trained in
turns the PQ index falls while pruning regularises, rises when capacity gets short, and falls again in collapse.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv:2302.05601.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.system import finite

Several = Tensor | Mapping[str, Tensor]


def pq_index(
    x: Several,
    p: float = 0.5,
    q: float = 1.0,
    mask: Several | None = None,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """I = 1 − (mean |x|^p)^(1/p) / (mean |x|^q)^(1/q), means over the entries of the mask.

    Neither scale nor length matters. 0 <= I <= 1 − d^(1/q − 1/p) for d entries: 0 where all magnitudes are equal, the
    most where one alone is not zero.

    Args:
        x: weights or scores, any shape and float dtype; or several by name, which count as one long vector.
        p, q: the two norms, 0 < p < q.
        mask: which entries are there (all, by default), shaped like x; absent zeros would raise the index.
        dim: what to reduce; everything unless given, and always so for several tensors.

    Returns:
        float64, of x's shape without `dim`; 0 where all entries are zero or absent.

    Raises:
        BillhookError: p and q are out of order, a value is not finite, or there are no values.

    Source: definition and theorem 1.
    """
    if not 0 < p < q:
        raise BillhookError(f"The PQ index with p={p:g} and q={q:g} is not defined: use 0 < p < q.")
    if isinstance(x, Tensor):
        assert mask is None or isinstance(mask, Tensor)
        sums = _power_sums(x, p, q, mask, dim)
    else:
        assert mask is None or not isinstance(mask, Tensor)
        parts = [_power_sums(x[name], p, q, None if mask is None else mask[name], None) for name in x]
        if not parts:
            raise BillhookError("There are no weights to take the PQ index of.")
        sums = _joined(parts, p, q)
    ratio = (sums.p / sums.entries) ** (1 / p) / (sums.q / sums.entries) ** (1 / q)
    return torch.where(sums.q > 0, 1 - ratio, 0.0).clamp_min(0.0)


class _PowerSums(NamedTuple):
    """Of |x| / largest, so that no power over- or underflows."""

    entries: Tensor
    largest: Tensor
    p: Tensor
    q: Tensor


def _power_sums(x: Tensor, p: float, q: float, mask: Tensor | None, dim: int | tuple[int, ...] | None) -> _PowerSums:
    sizes = _magnitudes(x, mask)
    over = tuple(range(x.dim())) if dim is None else dim
    largest = sizes.amax(over, keepdim=True)
    if not finite(largest):
        raise BillhookError("The weights hold a value that is not finite, so their inequality is not defined.")
    sizes = sizes / torch.where(largest > 0, largest, 1.0)
    count = (torch.ones_like(sizes, dtype=torch.bool) if mask is None else mask.bool()).sum(over)
    by_p, by_q = (sizes.pow(power).sum(over, dtype=torch.float64) for power in (p, q))
    return _PowerSums(count.double(), largest.double().sum(over), by_p, by_q)


def _joined(parts: list[_PowerSums], p: float, q: float) -> _PowerSums:
    count, sizes, by_p, by_q = (torch.stack([value.cpu() for value in values]) for values in zip(*parts, strict=True))
    largest = sizes.max()
    scale = sizes / largest if largest > 0 else sizes
    return _PowerSums(count.sum(), largest, (scale**p * by_p).sum(), (scale**q * by_q).sum())


def gini(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The Gini index of the magnitudes, Σ_i (2i − n − 1)·|x|_(i) / (n·Σ|x|), i = 1 for the smallest of n.

    Args:
        x: any shape and float dtype.
        mask: which entries count (all, by default), shaped like x.

    Returns:
        float64, 0-dimensional: 0 for equal magnitudes, 1 − 1/n where one alone is not zero; 0 where all are zero.

    Raises:
        BillhookError: a value is not finite, or there are no values.
    """
    sizes = _magnitudes(x, mask)
    sizes = (sizes.flatten() if mask is None else sizes[mask.bool()]).double().sort().values
    if not finite(sizes):
        raise BillhookError("The weights hold a value that is not finite, so their inequality is not defined.")
    n, total = sizes.numel(), sizes.sum()
    if not total > 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    place = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return ((2 * place - n - 1) * sizes).sum() / (n * total)


def _magnitudes(x: Tensor, mask: Tensor | None) -> Tensor:
    """|x| in float32 at least, 0 where absent."""
    if x.numel() == 0:
        raise BillhookError("There are no weights to take the inequality of.")
    if mask is not None and mask.shape != x.shape:
        raise BillhookError(f"The mask has shape {list(mask.shape)}, but the weights have {list(x.shape)}.")
    sizes = x.detach().abs()
    sizes = sizes if sizes.dtype == torch.float64 else sizes.float()
    return sizes if mask is None else torch.where(mask.bool(), sizes, 0.0)
