"""Binary gates: their gradients, the penalty that holds them to a budget, and the way from gates to a mask.

A gate D is 1 with a probability that grows with its logit z. Samples are made from uniform draws U in [0, 1) that the
caller gives, so that one generator decides everything. Functions work elementwise on tensors of any one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from billhook.errors import BillhookError

Noise = Literal["logistic", "gumbel"]


class _ReinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, uniform: Tensor, tau: float) -> Tensor:
        probability = logits.sigmoid()
        gate = (uniform < probability).to(logits.dtype)
        ctx.save_for_backward(gate, probability, (logits / tau).sigmoid())
        return gate

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, probability, smooth = ctx.saved_tensors
        middle = (gate + smooth) / 2
        return grads[0] * (2 * middle * (1 - middle) - probability * (1 - probability) / 2), None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, uniform: Tensor) -> Tensor:
        probability = logits.sigmoid()
        ctx.save_for_backward(probability)
        return (uniform < probability).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (probability,) = ctx.saved_tensors
        return grads[0] * probability * (1 - probability), None


class _Hardened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        return (soft > 0.5).to(soft.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def reinmax(logits: Tensor, uniform: Tensor, tau: float = 1.0) -> Tensor:
    """Hard gates D ~ Bernoulli(σ(z)) whose gradient is of second order.

    ∂L/∂z = ĝ · [2q(1 − q) − σ(z)(1 − σ(z))/2] with q = (D + σ(z/τ))/2 and ĝ = ∂L/∂D; at τ = 1 that is ĝ (1 − σ(z))/2
    where D = 1 and ĝ σ(z)/2 where D = 0, whose mean over D is exact for every loss quadratic in D. (ReinMax, Liu et
    al. 2023, arXiv:2304.08612, for two classes.) Below τ = 1 the factor can be negative.
    """
    result: Tensor = _ReinMax.apply(logits, uniform, tau)  # type: ignore[no-untyped-call]
    return result


def straight_through(logits: Tensor, uniform: Tensor) -> Tensor:
    """Hard gates D ~ Bernoulli(σ(z)) with ∂L/∂z = ĝ σ'(z): exact in the mean for losses linear in D only."""
    result: Tensor = _StraightThrough.apply(logits, uniform)  # type: ignore[no-untyped-call]
    return result


def gumbel_sigmoid(logits: Tensor, uniform: Tensor, tau: float = 0.4) -> Tensor:
    """Soft gates σ((z + G)/τ) with one Gumbel noise G = −ln(−ln U), as the code of DISP-LLM has them."""
    noise = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
    return ((logits + noise) / tau).sigmoid()


def hardened(soft: Tensor) -> Tensor:
    """1 where a soft gate is above one half, else 0; the gradient passes as if nothing was rounded."""
    result: Tensor = _Hardened.apply(soft)  # type: ignore[no-untyped-call]
    return result


def kept_probability(logits: Tensor, noise: Noise = "logistic") -> Tensor:
    """P(D = 1): σ(z), or 1 − exp(−exp z) for one-sided Gumbel noise."""
    return logits.sigmoid() if noise == "logistic" else -torch.expm1(-logits.exp())


def likely(logits: Tensor, noise: Noise = "logistic") -> Tensor:
    """The gates with P(D = 1) > ½, bool: z > 0, or z > ln ln 2 for one-sided Gumbel noise."""
    return logits > (0.0 if noise == "logistic" else math.log(math.log(2)))


def log_ratio(size: Tensor, target: float) -> Tensor:
    """ln(max(T, t) / min(T, t)): zero at the target only, the same for twice and for half of it. (DISP-LLM.)

    Args:
        size: T > 0, scalar.
        target: t > 0.
    """
    return (size.log() - math.log(target)).abs()


def within_budget(scores: Tensor, cost: Callable[[Tensor], float], budget: float) -> Tensor:
    """The gates of the highest scores, as many as the budget allows, by bisection; of equal scores the first stay.

    Args:
        scores: [n].
        cost: what a mask (bool [n]) costs; never less for a mask that keeps more.
        budget: what is kept costs at most this, and with the next gate more.

    Returns:
        bool [n].

    Raises:
        BillhookError: keeping nothing already costs more.
    """
    order = torch.argsort(scores, descending=True, stable=True)

    def first(count: int) -> Tensor:
        keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        keep[order[:count]] = True
        return keep

    if cost(first(0)) > budget:
        raise BillhookError(
            f"The budget of {budget:g} is below {cost(first(0)):g}, what is left without any gate: raise it."
        )
    low, high = 0, len(scores) + 1  # the first `low` fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(first(middle)) <= budget else (low, middle)
    return first(low)
