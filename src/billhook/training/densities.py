"""How many weights each layer keeps, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, int]:
    """The same fraction of every layer, rounded."""
    return {name: round(density * math.prod(shape)) for name, shape in shapes.items()}


def erk(shapes: Shapes, density: float) -> dict[str, int]:
    """Erdős–Rényi-kernel: density of a layer in proportion to the sum of its dimensions over their product.

    Thin layers stay denser. A layer that would have more than all of its weights keeps all, and the others share the
    rest.

    Args:
        shapes: name -> shape of the weight, [out, in, *kernel].
        density: fraction of all weights that stays.

    Returns:
        name -> number of weights kept; they sum to density · total within one per layer.

    Source: Evci et al., "Rigging the Lottery" (1911.11134), section 3.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if density >= 1:
        return sizes
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in full)
        shared = sum(raw[name] * sizes[name] for name in shapes if name not in full)
        scale = budget / shared if shared else 0.0
        over = {name for name in shapes if name not in full and scale * raw[name] > 1}
        if not over:
            return {
                name: sizes[name] if name in full else max(0, round(scale * raw[name] * sizes[name])) for name in shapes
            }
        # only the thinnest at a time: filling it lowers the others' share
        full |= {name for name in over if raw[name] == max(raw[other] for other in over)}
