"""How far apart training ends: distances between networks, and the error on the line from one to another.

Source: Frankle, Dziugaite, Roy & Carbin, "Stabilizing the Lottery Ticket Hypothesis" (1903.01611), for stability to
pruning and to data order; Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (1912.05671),
for the barrier, which tells more than distances do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Apart:
    """Two networks as vectors: ‖a − b‖, and the angle between a and b in degrees (NaN if one is zero)."""

    l2: float
    angle: float


@dataclass(frozen=True)
class Barrier:
    """Scores on the line between two networks, first at 0 and second at 1; higher is better."""

    at: list[float]
    scores: list[float]

    @property
    def height(self) -> float:
        """How far the worst point is below the mean of the two ends; an error barrier if the score is an accuracy."""
        return (self.scores[0] + self.scores[-1]) / 2 - min(self.scores)


@dataclass(frozen=True)
class Stability:
    """Of a sparse network: to pruning (against the dense one, same data order) and to data order (against itself)."""

    pruning: Apart
    order: Apart
    barrier: Barrier | None  # between the two data orders


@torch.no_grad()
def apart(first: State, second: State, masks: State | None = None) -> Apart:
    """Distance and angle over the tensors of `masks` where they are True, or over all floating tensors of `first`.

    Sums are in float64, one tensor at a time.

    Raises:
        BillhookError: a tensor is missing or has another shape.
    """
    difference = one = two = inner = 0.0
    for name in masks if masks is not None else (n for n, t in first.items() if t.is_floating_point()):
        if name not in first or name not in second or first[name].shape != second[name].shape:
            raise BillhookError(f"The networks to compare do not both have {name} in one shape.")
        a, b = (state[name].detach().cpu().double() for state in (first, second))
        if masks is not None:
            mask = masks[name].cpu()
            a, b = a * mask, b * mask
        difference += float((a - b).square().sum())
        one, two, inner = one + float(a.square().sum()), two + float(b.square().sum()), inner + float((a * b).sum())
    if not one or not two:
        return Apart(math.sqrt(difference), math.nan)
    # from chord lengths: the arc cosine is blind below 1e-6 degrees, and not zero for equal vectors
    chord = max(difference - (math.sqrt(one) - math.sqrt(two)) ** 2, 0.0) / math.sqrt(one * two)
    return Apart(math.sqrt(difference), math.degrees(2 * math.asin(min(math.sqrt(chord) / 2, 1.0))))


def spread(states: Sequence[State], masks: State | None = None) -> dict[str, dict[str, float]]:
    """Least, mean and largest distance and angle over all pairs of networks."""
    pairs = [apart(a, b, masks) for a, b in combinations(states, 2)]
    found = {"l2": [pair.l2 for pair in pairs], "angle": [pair.angle for pair in pairs]}
    return {
        key: {"least": min(values), "mean": sum(values) / len(values), "largest": max(values)}
        for key, values in found.items()
        if values
    }


@torch.no_grad()
def error_barrier(
    model: nn.Module,
    first: State,
    second: State,
    evaluate: Callable[[nn.Module], float],
    points: int = 30,
    settle: Callable[[nn.Module], None] | None = None,
) -> Barrier:
    """Scores at evenly spaced points of the line between two networks.

    Args:
        model: of their kind; it is used for the measurement and is as before in the end.
        first, second: parameters and buffers by name, of equal names; those that are not floating stay the first's.
        evaluate: score of a model in evaluation mode, higher is better.
        points: how many, both ends included.
        settle: called on the model at each point before it is evaluated, to re-estimate BatchNorm's statistics, which
            are otherwise interpolated like weights.

    Raises:
        BillhookError: fewer than two points, or states of another kind.
    """
    if points < 2:
        raise BillhookError(f"points={points}: a line has at least its two ends.")
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in first.items():
        shapes = {tuple(t.shape) for t in (tensor, second.get(name), own.get(name)) if t is not None}
        if name not in own or name not in second or len(shapes) > 1:
            raise BillhookError(f"The model and the two networks do not all have {name} in one shape.")
    before = {name: own[name].detach().clone() for name in own}
    training = model.training
    at, scores = [i / (points - 1) for i in range(points)], []
    try:
        for alpha in at:
            for name, tensor in first.items():
                there = tensor.to(own[name].device)
                if tensor.is_floating_point():
                    there = torch.lerp(there, second[name].to(there), alpha)
                own[name].copy_(there)
            if settle is not None:
                settle(model)
            model.eval()
            scores.append(float(evaluate(model)))
    finally:
        for name, tensor in before.items():
            own[name].copy_(tensor)
        model.train(training)
    return Barrier(at, scores)
