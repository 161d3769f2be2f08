"""Averages of networks that have one mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.training.masks import Masks, refuse_unequal
from billhook.training.store import State


@torch.no_grad()
def merge_state_dicts(
    states: Sequence[State], weights: Sequence[float] | None = None, masks: Sequence[Masks] | None = None
) -> dict[str, Tensor]:
    """Σ_j λ_j θ_j over all tensors of state dicts, sums in float64.

    One tensor is merged at a time, so states that are read from disk on access are never in memory as a whole.
    Tensors that are not floating (such as BatchNorm's counter) are copied from the first.

    Args:
        states: of equal names and shapes.
        weights: λ_j ≥ 0 that sum to 1; equal by default.
        masks: of each state; must be equal, and absent weights are zero in the result.

    Returns:
        name -> tensor in the first state's dtype, in memory of its own.

    Raises:
        BillhookError: names, shapes or masks differ, or the weights are no average.

    Source: Zimmer, Spiegel & Pokutta, "Sparse Model Soups" (2306.16788); without masks Wortsman et al.,
    "Model soups" (2203.05482).
    """
    if not states:
        raise BillhookError("There is nothing to average: give at least one state dict.")
    shares = [1 / len(states)] * len(states) if weights is None else [float(w) for w in weights]
    if len(shares) != len(states) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise BillhookError(
            f"weights={shares} are no average of {len(states)} networks: give as many, not negative, that sum to 1."
        )
    if masks is not None and len(masks) != len(states):
        raise BillhookError(f"There are {len(masks)} masks for {len(states)} networks: give each its own.")
    for j, other in enumerate(states[1:], 1):
        if other.keys() != states[0].keys():
            name = min(other.keys() ^ states[0].keys())
            raise BillhookError(f"Network {j} is not of the first's kind: {name} is in one of them only.")
        if masks is not None:
            refuse_unequal(masks[0], masks[j], f"Average of networks 0 and {j}")
            refuse_unequal(masks[j], masks[0], f"Average of networks 0 and {j}")

    merged: dict[str, Tensor] = {}
    for name in states[0]:
        first = states[0][name]
        if not first.is_floating_point():
            merged[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float32 if first.device.type == "mps" else torch.float64)
        for j, (share, state) in enumerate(zip(shares, states, strict=True)):
            tensor = state[name]
            if tensor.shape != first.shape:
                raise BillhookError(
                    f"{name} has shape {list(tensor.shape)} in network {j} and {list(first.shape)} in the first: only "
                    "networks of equal shapes have an average."
                )
            if share:  # what is not finite in a network of no share does not count
                total.add_(tensor.to(total), alpha=share)
        if masks is not None and name in masks[0]:
            total.mul_(masks[0][name].to(total.device))
        merged[name] = total.to(first.dtype)
    return merged


def greedy_soup(scores: Sequence[float], score_of: Callable[[list[int]], float]) -> tuple[list[int], float]:
    """Choose what to average: best first, each next one if the average does not get worse.

    Args:
        scores: of each network alone, higher is better.
        score_of: the score of the average of these.

    Returns:
        indices chosen, and the score of their average; never below the best network's own.

    Source: Wortsman et al., "Model soups" (2203.05482), recipe 1.
    """
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    chosen, best = order[:1], scores[order[0]]
    for j in order[1:]:
        found = score_of([*chosen, j])
        if found >= best:
            chosen, best = [*chosen, j], found
    return chosen, best
