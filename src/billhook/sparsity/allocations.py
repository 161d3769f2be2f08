"""Allocations: how a model's sparsity is shared out over its sites.

An allocation is a function of a walk (for the sites' shapes and, where it needs them, their weights) and the
overall sparsity; it returns the sparsity of each site. Register one with `@allocation("name")` and every
method can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError, nearest
from billhook.sparsity.saliency import magnitude
from billhook.sparsity.select import budget, global_counts

Allocation = Callable[[Walk, float], dict[str, float]]
_ALLOCATIONS: dict[str, Allocation] = {}


def allocation(name: str) -> Callable[[Allocation], Allocation]:
    """Decorator: make an allocation known under the name that users type."""

    def register(function: Allocation) -> Allocation:
        _ALLOCATIONS[name] = function
        return function

    return register


def allocations() -> list[str]:
    """Names of all allocations."""
    return sorted(_ALLOCATIONS)


def allocate(name: str, walk: Walk, sparsity: float) -> dict[str, float]:
    """Sparsity per site name, by the allocation called `name`.

    Raises:
        BillhookError: no such allocation.
    """
    if name not in _ALLOCATIONS:
        raise BillhookError(
            f"No allocation {name!r}{nearest(name, _ALLOCATIONS)}: there are {', '.join(allocations())}."
        )
    return _ALLOCATIONS[name](walk, sparsity)


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
    counts = global_counts(scores, budget(sum(sizes.values()), sparsity))
    return {name: counts[name] / sizes[name] for name in sizes}
