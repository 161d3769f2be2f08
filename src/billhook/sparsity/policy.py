"""Policies that choose rows of a matrix: sampling without replacement with its log-probability, and REINFORCE.

A draw is an order a_1 ... a_k under the Plackett-Luce model of the logits s:
P = Π_j exp(s_{a_j}) / Σ over rows i not yet drawn of exp(s_i).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def draw_rows(logits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows drawn without replacement, [..., count] in the order drawn: the largest of logits + Gumbel noise.

    Args:
        logits: [..., n]; one draw for each of the leading indices.
        generator: on the CPU, so that all devices draw alike.
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_min(torch.finfo().tiny)
    gumbel = -(-uniform.log()).log()
    noisy = logits.detach().double() + gumbel.to(logits.device)
    return noisy.argsort(dim=-1, descending=True, stable=True)[..., :count]


def log_probability(logits: Tensor, order: Tensor) -> Tensor:
    """ln P of drawing these rows in this order; exact and differentiable, a scalar.

    Args:
        logits: [n]; differences of hundreds are no trouble.
        order: distinct indices, [k].
    """
    rest = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    rest[order] = False
    drawn = logits[order]
    last = [torch.logsumexp(logits[rest], 0, keepdim=True)] if bool(rest.any()) else []
    left = torch.logcumsumexp(torch.cat([*last, drawn.flip(0)]), 0)[len(last) :].flip(0)  # rows not yet drawn
    total: Tensor = (drawn - left).sum()
    return total


def reinforce(
    logits: Tensor, count: int, reward: Callable[[Tensor], float], samples: int, generator: torch.Generator
) -> Tensor:
    """A loss whose gradient is the policy gradient of the expected reward; the other samples are the baseline.

    Each of the draws is weighted by its reward less the mean of all; for two draws, half the difference.

    Args:
        logits: [n], with gradient.
        count: rows per draw.
        reward: of the rows drawn, [count].
        samples: draws, at least 2.
    """
    draws = [draw_rows(logits, count, generator) for _ in range(samples)]
    rewards = [reward(draw) for draw in draws]
    mean = sum(rewards) / samples
    terms = [(r - mean) * log_probability(logits, draw) for r, draw in zip(rewards, draws, strict=True)]
    return -torch.stack(terms).sum() / samples


def row_features(weight: Tensor, gain: float = 5.0, norm: bool = True) -> Tensor:
    """What a policy sees of each row: gain · w_i / mean‖w‖, and its standardised norm; float64 [n, d (+ 1)]."""
    weight = weight.double()
    norms = weight.norm(dim=1, keepdim=True)
    mean = float(norms.mean()) or 1.0
    rows: Tensor = weight * (gain / mean)
    if not norm:
        return rows
    spread = norms.std(unbiased=False).clamp_min(1e-9 * mean)  # of equal norms only rounding is left
    return torch.cat([rows, (norms - norms.mean()) / spread], dim=1)


class LinearPolicy(nn.Module):
    """logit_i = f_i · v, with v = 0 at the start: all draws equally likely."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [n] of features [n, width]."""
        logits: Tensor = features @ self.v
        return logits

    def direction(self) -> tuple[Tensor, Tensor]:
        """v and c with logit_i = f_i · v + c."""
        return self.v.detach().clone(), self.v.new_zeros(())


class TwoLayerPolicy(nn.Module):
    """logit = (F Aᵀ + b) r, the published predictor before its sigmoid. Nothing bends between its two layers, so it
    ranks rows by one direction, v = Aᵀ r, like `LinearPolicy`; only the steps of the training differ.

    Args:
        width: of the features.
        hidden: the published code takes the number of rows.
        generator: of the start: A and b uniform within ±1/√width, r within 0 to 1; on the CPU.
    """

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        self.a = nn.Parameter((2 * uniform(hidden, width) - 1) / width**0.5)
        self.b = nn.Parameter((2 * uniform(hidden) - 1) / width**0.5)
        self.r = nn.Parameter(uniform(hidden))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [n] of features [n, width]."""
        logits: Tensor = (features @ self.a.T + self.b) @ self.r
        return logits

    def direction(self) -> tuple[Tensor, Tensor]:
        """v and c with logit_i = f_i · v + c."""
        return (self.a.T @ self.r).detach(), (self.b @ self.r).detach()
