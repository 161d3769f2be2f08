"""Allocations: how a model's sparsity is shared out over its sites.

An allocation is a declaration and a function of a walk and the overall sparsity; it returns the sparsity of each
site. Every method can use every one of them. `@allocation("name")` makes one of a plain function.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from billhook.calibrate.statistics import ColumnNorm
from billhook.calibrate.walk import Needs, Walk
from billhook.declared import Declared, Paper, Registry
from billhook.sparsity.saliency import magnitude, wanda
from billhook.sparsity.select import budget, global_cut

Shares = Callable[[Walk, float], dict[str, float]]


class Allocation(Declared):
    """Base of all allocations."""

    kind = "allocation"
    needs: ClassVar[Needs] = "nothing"

    @abstractmethod
    def shares(self, walk: Walk, sparsity: float) -> dict[str, float]:
        """Sparsity per site name; weighted by size their mean is `sparsity`."""


ALLOCATIONS: Registry[Allocation] = Registry("allocation")


def allocation(name: str) -> Callable[[Shares], Shares]:
    """Decorator: make an allocation without options of a function (walk, sparsity) -> sparsity per site name."""

    def register(function: Shares) -> Shares:
        first = (function.__doc__ or name).strip().splitlines()[0]

        class OfFunction(Allocation):
            title = name
            paper = None
            summary = first
            when = first

            def shares(self, walk: Walk, sparsity: float) -> dict[str, float]:
                return function(walk, sparsity)

        ALLOCATIONS.add(name, OfFunction)
        return function

    return register


@allocation("uniform")
def uniform(walk: Walk, sparsity: float) -> dict[str, float]:
    """The same sparsity everywhere."""
    return {site.name: sparsity for site in walk.all_sites()}


@allocation("global-magnitude")
def global_magnitude(walk: Walk, sparsity: float) -> dict[str, float]:
    """One ranking of |W| over all sites; each site's share of the floor(n · s) smallest is its sparsity.

    Followed by a selection within each matrix this is exactly global magnitude pruning. At high sparsity a site
    whose weights are all small can be emptied: the report shows it.
    """

    def scores() -> Iterable[tuple[str, Tensor]]:
        for site, weight in walk.weights():
            yield site.name, magnitude(weight)

    sizes = {site.name: site.numel for site in walk.all_sites()}
    counts = global_cut(scores, budget(sum(sizes.values()), sparsity)).counts
    return {name: counts[name] / sizes[name] for name in sizes}


def proportional_keep(
    scores: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    max_sparsity: float,
) -> dict[str, int]:
    """How many weights each group keeps: a guaranteed minimum, the rest in proportion to the scores.

    Every group keeps at least ceil(n · (1 − max_sparsity)). What is left of the budget of
    N − floor(N · sparsity) goes to groups in proportion to their scores; a group that is full leaves the others
    its share. Rounded by largest remainder, so the counts sum to the budget exactly. (Step 3 of ECoFLaP, whose
    own code exceeds the budget by up to two weights per group.)

    Args:
        scores: non-negative importance per group.
        sizes: weights per group.
        sparsity: 0 <= sparsity <= max_sparsity < 1.
    """
    total = sum(sizes.values())
    target = total - budget(total, sparsity)
    least = {g: sizes[g] - budget(sizes[g], max_sparsity) for g in sizes}
    keep = {g: float(least[g]) for g in sizes}
    weights = {g: max(0.0, float(scores[g])) for g in sizes}
    rest = target - sum(keep.values())
    if rest < 0:  # the rounding of the minima alone exceeds the budget, by less than one weight per group
        return _rounded({g: sizes[g] * (1 - sparsity) for g in sizes}, dict.fromkeys(sizes, 0), sizes, target)
    while rest > 1e-6:
        room = {g: sizes[g] - keep[g] for g in sizes if sizes[g] - keep[g] > 1e-9}
        if not room:
            break
        shares = {g: weights[g] for g in room if weights[g] > 0} or room
        unit = rest / sum(shares.values())
        for g, share in shares.items():
            keep[g] += min(room[g], share * unit)
        rest = target - sum(keep.values())
    return _rounded(keep, least, sizes, target)


def _rounded(
    keep: Mapping[str, float], least: Mapping[str, int], sizes: Mapping[str, int], target: int
) -> dict[str, int]:
    """Whole numbers near `keep` that sum to `target`: the largest remainders are rounded up."""
    whole = {g: min(sizes[g], max(least[g], math.floor(keep[g] + 1e-9))) for g in keep}
    order = sorted(keep, key=lambda g: (whole[g] - keep[g], g))
    missing = target - sum(whole.values())
    while missing:
        step = 1 if missing > 0 else -1
        moved = 0
        for g in order if step > 0 else reversed(order):
            if missing and (whole[g] < sizes[g] if step > 0 else whole[g] > least[g]):
                whole[g] += step
                missing -= step
                moved += 1
        if not moved:
            break
    return whole


@ALLOCATIONS.register("owl")
class OWL(Allocation):
    title = "OWL"
    paper = Paper(
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "L. Yin, Y. Wu, Z. Zhang, C.-Y. Hsieh, Y. Wang, Y. Jia, G. Li, A. Jaiswal, M. Pechenizkiy, Y. Liang, "
        "M. Bendersky, Z. Wang, S. Liu",
        "ICML 2024",
        "2310.05175",
    )
    needs = "calibration"
    summary = "Blocks with more outliers (Wanda scores above a multiple of the block's mean) are pruned less."
    when = "At 60% and above on language models; one more pass over the calibration data."

    multiple: float = Field(5.0, gt=1, description="A score is an outlier above this multiple of the block's mean.")
    limit: float = Field(0.08, ge=0, lt=0.5, description="Sparsities stay within this much of the target.")

    def shares(self, walk: Walk, sparsity: float) -> dict[str, float]:
        """Density of block b: linear in its share of outliers, spread over ±limit, mean 1 − sparsity (section 3.2)."""
        found = walk.looked(f"outliers-{self.multiple:g}", lambda: self._outliers(walk))
        return owl_shares([found[name] for name in walk.names], walk, sparsity, self.limit)

    def _outliers(self, walk: Walk) -> dict[str, float]:
        """The share of outliers among the weights of each block, by its name."""
        outliers: dict[str, float] = {}
        look = walk.dense()
        for block in look:
            norms = block.collect(ColumnNorm)
            scores = [wanda(site.weight, norms[site]) for site in block.sites]
            count = sum(s.numel() for s in scores)
            bound = self.multiple * float(sum(s.double().sum() for s in scores)) / max(count, 1)
            outliers[block.name] = sum(int((s > bound).sum()) for s in scores) / max(count, 1)
        look.close()
        return outliers


def owl_shares(outliers: list[float], walk: Walk, sparsity: float, limit: float) -> dict[str, float]:
    """Sparsity per site from the share of outliers per block, centred on `sparsity` by the blocks' sizes."""
    ratio = torch.tensor(outliers, dtype=torch.float64)
    span = float(ratio.max() - ratio.min())
    density = (ratio - ratio.min()) * (2 * limit / span) if span > 0 else torch.zeros_like(ratio)
    sizes = torch.tensor([sum(s.numel for s in sites) for sites in walk.sites], dtype=torch.float64)
    centre = float((density * sizes).sum() / sizes.sum())
    block = [min(max(sparsity - (float(d) - centre), 0.0), 0.999) for d in density]
    return {site.name: block[index] for index, sites in enumerate(walk.sites) for site in sites}
