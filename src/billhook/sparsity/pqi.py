"""How many weights the PQ index lets go, and the allocation that follows from it.

A unit is what has a count of its own: a row, a matrix, a block, a network. All functions take vectors over units.

Source: Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv:2302.05601. The
allocation to a given sparsity is ours; the paper's amounts are what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from billhook.calibrate.walk import Walk
from billhook.declared import Paper
from billhook.errors import BillhookError
from billhook.sparsity.allocations import ALLOCATIONS, Allocation
from billhook.sparsity.inequality import pq_index
from billhook.sparsity.saliency import magnitude
from billhook.sparsity.select import budget

PAPER = Paper(
    "Pruning Deep Neural Networks from a Sparsity Perspective",
    "E. Diao, G. Wang, J. Zhang, Y. Yang, J. Ding, V. Tarokh",
    "ICLR 2023",
    "2302.05601",
)

_DIGITS = 6  # counts are rounded to these before floor and ceiling, or binary rounding costs a weight


def least_kept(size: Tensor, index: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """d·(1 + η)^(−q/(q−p))·(1 − I)^(qp/(q−p)): no fewer weights can hold all but η of the rest's Σ|w|^p.

    Exact for η = 0 and weights that are zero or of one magnitude: it is then the number of the latter.

    Args:
        size: weights of each unit, d.
        index: their `pq_index` with the same p and q.
        p, q: 0 < p < q.
        eta: Σ|w|^p of what is dropped, over that of what stays.

    Returns:
        float64, not rounded.

    Source: theorem 2.
    """
    share: Tensor = (1 - index.double()) ** (q * p / (q - p)) * (1 + eta) ** (-q / (q - p))
    return size.double() * share


def excess(size: Tensor, kept: Tensor) -> Tensor:
    """1 − ⌈r⌉/d: the share of each unit that the bound lets go; 0 for units without weights."""
    share: Tensor = 1 - torch.ceil(kept.round(decimals=_DIGITS)) / size.clamp_min(1)
    return torch.where(size > 0, share, 0.0).clamp_min(0.0)


def removals(size: Tensor, share: Tensor, gamma: float = 1.0, beta: float = 0.9) -> Tensor:
    """⌊d·min(γ·share, β)⌋ per unit, int64.

    Args:
        size: weights of each unit, d.
        share: `excess` of each.
        gamma: how many times the excess goes, >= 0.
        beta: no unit loses more than this share at once. Below 1 the last weight of a unit never goes.

    Source: algorithm 1.
    """
    return (size * (gamma * share).clamp(0, beta)).round(decimals=_DIGITS).floor().long()


def removals_to(remove: int, size: Tensor, share: Tensor, beta: float = 0.9) -> Tensor:
    """`removals` with the γ for which they sum to `remove`, exactly: the largest remainders are rounded up.

    Args:
        remove: how many weights go in all.

    Returns:
        counts per unit, int64.

    Raises:
        BillhookError: the cap does not allow as many.
    """
    full = removals(size, (share > 0).double(), 1.0, beta).double()
    rate = size * share
    if float(full.sum()) < remove:
        raise BillhookError(
            f"With beta={beta:g} at most {int(full.sum())} of {int(size.sum())} weights may go at once, and {remove} "
            "have to: raise beta or lower the sparsity."
        )
    low, high = 0.0, float((full / rate)[full > 0].max()) if bool((full > 0).any()) else 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float((middle * rate).minimum(full).sum()) >= remove else (middle, high)
    wanted = (high * rate).minimum(full)
    counts = (wanted + 10.0**-_DIGITS).floor().minimum(full)
    missing = remove - int(counts.sum())
    order = (wanted - counts).argsort(descending=missing > 0, stable=True)
    # what was rounded down has room above, what was rounded up has room below
    counts[order[: abs(missing)]] += 1 if missing > 0 else -1
    return counts.long()


@ALLOCATIONS.register("pqi")
class PQI(Allocation):
    title = "PQ index"
    paper = PAPER
    summary = "Units whose weights are more unequal in magnitude, by the PQ index, are pruned more."
    when = (
        "Needs no data and one pass over the weights, but looks at magnitudes alone: on the demo model under Wanda it "
        "was worse than uniform, and per block much worse. Compare before trusting it."
    )

    p: float = Field(0.5, gt=0, description="Smaller norm of the PQ index.")
    q: float = Field(1.0, gt=0, description="Larger norm of the PQ index.")
    eta: float = Field(0.0, ge=0, description="Mass of the dropped weights over that of the kept ones, in the bound.")
    beta: float = Field(0.9, gt=0, le=1, description="No unit loses more than this share.")
    scope: Literal["block", "layer", "neuron"] = Field(
        "layer", description="What the index is taken of: a block, a matrix, or each output row of it."
    )

    @model_validator(mode="after")
    def _norms(self) -> PQI:
        if self.p >= self.q:
            raise ValueError(f"p={self.p:g} is not below q={self.q:g}")
        return self

    def shares(self, walk: Walk, sparsity: float) -> dict[str, float]:
        """The counts of all units at one common γ; a matrix of rows with counts of their own has their sum."""
        sizes: list[Tensor] = []
        indices: list[Tensor] = []
        members: list[list[str]] = []  # sites whose units are at the same place of the lists above
        for names, scores in self._groups(walk):
            if self.scope == "neuron":
                (score,) = scores.values()
                index = pq_index(score, self.p, self.q, dim=1)
                size = torch.full((score.shape[0],), score.shape[1])
            else:
                index = pq_index(scores, self.p, self.q).reshape(1)
                size = torch.tensor([sum(score.numel() for score in scores.values())])
            sizes.append(size)
            indices.append(index.cpu())
            members.append(names)
        size = torch.cat(sizes)
        share = excess(size, least_kept(size, torch.cat(indices), self.p, self.q, self.eta))
        counts = removals_to(budget(int(size.sum()), sparsity), size, share, self.beta)
        removed = torch.split(counts, [len(part) for part in sizes])
        return {
            name: int(gone.sum()) / int(part.sum())
            for names, gone, part in zip(members, removed, sizes, strict=True)
            for name in names
        }

    def _groups(self, walk: Walk) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """Magnitudes of what has an index of its own (or rows with one): a site's, or a block's."""
        if self.scope != "block":
            for site, weight in walk.weights():
                yield [site.name], {site.name: magnitude(weight)}
            return
        for sites in walk.sites:
            scores = {site.name: magnitude(weight) for site, weight in walk.weights(sites)}
            if scores:
                yield list(scores), scores
