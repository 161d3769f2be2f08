"""Binary gates on parts of a network: straight-through decisions, their losses, and the hooks that multiply by them.

A gate is trained like a weight and decides 0 or 1. The gated module stays plain: gates live beside it and act through
hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.errors import BillhookError

GateInput = Literal["mean", "first", "none"]


class _Binarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probability: Tensor) -> Tensor:
        return (probability >= 0.5).to(probability.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def binarise(probability: Tensor) -> Tensor:
    """Exactly 1 where p >= 0.5, else exactly 0; the gradient passes as if it were p (straight-through).

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (1308.3432).
    """
    return _Binarise.apply(probability)  # type: ignore[no-any-return,no-untyped-call]


def pooled(x: Tensor, axis: int, how: GateInput = "mean", mask: Tensor | None = None) -> Tensor:
    """What a gate looks at: one vector per input, float32 [batch, channels].

    Args:
        x: [batch, ..., channels at `axis`, ...].
        axis: of the channels.
        how: mean over all other axes, or the first token of each sequence.
        mask: [batch, tokens], nonzero where a token is not padding, which then does not count.
    """
    x = x.float().movedim(axis, -1)
    if x.ndim == 2:
        return x
    seen = mask is not None and mask.shape == x.shape[:2]
    if how == "first":
        first = mask.ne(0).int().argmax(1) if mask is not None and seen else x.new_zeros(len(x), dtype=torch.long)
        return x.flatten(1, -2)[torch.arange(len(x), device=x.device), first]
    if mask is not None and seen:
        there = mask.to(x).view(*mask.shape, *[1] * (x.ndim - 2))
        return (x * there).flatten(1, -2).sum(1) / there.sum(1).view(-1, 1).clamp(min=1)
    return x.flatten(1, -2).mean(1)


class PooledGate(nn.Module):
    """Decisions for `gates` parts from a pooled vector: z = 1[sigmoid(W2 relu(W1 v + b1) + b2) >= 0.5].

    At first W2 is small and b2 the same for all, so that every gate is open for every input. Without an input
    (channels=None) only b2 is there: the decisions are the same for every input, a learned mask.

    Args:
        channels: length of v.
        hidden: rows of W1; max(8, channels / 4) unless given.
        bias: b2 at first.
        generator: of the initial weights, on the CPU.
    """

    def __init__(
        self, channels: int | None, gates: int, hidden: int | None, bias: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.reads = channels is not None
        self.b2 = nn.Parameter(torch.full((gates,), float(bias)))
        if channels is not None:
            hidden = hidden or max(8, channels // 4)
            self.w1 = nn.Parameter(torch.randn(hidden, channels, generator=generator) / channels**0.5)
            self.b1 = nn.Parameter(torch.zeros(hidden))
            self.w2 = nn.Parameter(torch.randn(gates, hidden, generator=generator) * 0.01)

    def forward(self, v: Tensor | None) -> Tensor:
        """[batch, channels] -> [batch, gates] of 0 and 1; [1, gates] without an input."""
        a = self.b2[None]
        if self.reads:
            assert v is not None
            a = nn.functional.linear(torch.relu(nn.functional.linear(v, self.w1, self.b1)), self.w2, self.b2)
        return binarise(torch.sigmoid(a))


# losses


def polarisation(means: Sequence[Tensor]) -> Tensor:
    """Mean over all gates of m (1 - m), the variance of a decision over the inputs: 0 where all agree, at most 1/4.

    Args:
        means: of each unit the means of its gates' decisions over the batch, [gates].

    Source: Zhi et al. (2302.10798); the mean is taken before the product, or each gate would be sure of itself and
    still differ between inputs.
    """
    m = torch.cat(list(means))
    return (m * (1 - m)).mean()


@dataclass(frozen=True)
class Factor:
    """A share that depends on gates: fixed + sum over units of each · (sum of the unit's means)."""

    fixed: float
    each: tuple[tuple[int, float], ...]  # (index of the unit, share of one of its gates)


@dataclass(frozen=True)
class Cost:
    """Cost of a module: `whole` times its factors (rows and columns of a weight may both be gated)."""

    whole: float
    factors: tuple[Factor, ...]


def share_of(costs: Sequence[Cost], means: Sequence[Tensor]) -> Tensor:
    """Cost at these means over the cost with all gates open, a scalar in [0, 1]."""
    total = torch.zeros((), dtype=torch.float64, device=means[0].device)
    sums = [m.double().sum() for m in means]
    for cost in costs:
        part = torch.full_like(total, cost.whole)
        for factor in cost.factors:
            part = part * (factor.fixed + sum(share * sums[unit] for unit, share in factor.each))
        total = total + part
    return total / sum(cost.whole for cost in costs)


def budget(share: Tensor, keep: float) -> Tensor:
    """(share - keep)^2."""
    return (share - keep) ** 2


# where gates act


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor that is multiplied by a unit's gates: the input or the output of a module.

    Attributes:
        axis: along which the gates lie.
        owner: [length of the axis] long, the gate of each position, or the number of gates where there is none; None
            where the gates lie along the axis as they are, or a single one multiplies everything.
    """

    module: str
    where: Literal["input", "output"]
    axis: int = -1
    owner: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Unit:
    """Gates that share a gate module.

    Attributes:
        name: of the block or of the module that makes the channels.
        gates: how many.
        source: the module whose input the gates look at; axis and channels: of that input.
        places: what is multiplied.
        one_stays: whether a network without any of these parts would not run.
    """

    name: str
    gates: int
    source: str
    axis: int
    channels: int
    places: tuple[Place, ...]
    one_stays: bool


class Hooks:
    """Gates at work in a model's forward pass.

    Attributes:
        decisions: of each unit the last decisions that carry gradients, [batch or 1, gates], or None.
        seen: of each unit the last decisions, without gradients.
        static: decisions that hold for all inputs, instead of the gates' own, where set.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], gates: Sequence[PooledGate], how: GateInput) -> None:
        self.units, self.gates, self.how = units, gates, how
        self.stop_gradient = False
        self.decisions: list[Tensor | None] = [None] * len(units)
        self.seen: list[Tensor | None] = [None] * len(units)
        self.static: list[Tensor] | None = None
        self._now: list[Tensor | None] = [None] * len(units)
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, unit in enumerate(units):
            source = model.get_submodule(unit.source)
            self._handles.append(source.register_forward_pre_hook(self._deciding(index)))
            for place in unit.places:
                module = model.get_submodule(place.module)
                if place.where == "input":
                    self._handles.append(module.register_forward_pre_hook(self._before(index, place)))
                else:
                    self._handles.append(module.register_forward_hook(self._after(index, place)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.decisions = [None] * len(self.units)
        self.seen = [None] * len(self.units)
        self._now = [None] * len(self.units)

    def taken(self) -> list[Tensor]:
        """The decisions of the last forward pass, once.

        Raises:
            BillhookError: there was none since, or it passed a unit by.
        """
        missing = [unit.name for unit, z in zip(self.units, self.decisions, strict=True) if z is None]
        if missing:
            raise BillhookError(
                f"The gates of {missing[0]} have decided nothing since the last loss: run the model with gradients, "
                "then call gates.loss() once, before backward."
            )
        found = [z for z in self.decisions if z is not None]
        self.decisions = [None] * len(self.units)
        return found

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._now = [None] * len(self.units)

    def _deciding(self, index: int) -> Callable[..., None]:
        unit, gate = self.units[index], self.gates[index]

        def decide(module: nn.Module, args: Any) -> None:
            if self.static is not None:
                self._now[index] = self.static[index][None]
                return
            x: Tensor = args[0]
            with torch.autocast(x.device.type, enabled=False):
                v = pooled(x, unit.axis, self.how, self._mask) if gate.reads else None
                z = gate(v.detach() if v is not None and self.stop_gradient else v)
            self._now[index] = z
            self.seen[index] = z.detach()
            if z.requires_grad:
                self.decisions[index] = z

        return decide

    def _before(self, index: int, place: Place) -> Callable[..., Any]:
        def multiply(module: nn.Module, args: Any) -> Any:
            return (self._multiplied(index, place, args[0]), *args[1:])

        return multiply

    def _after(self, index: int, place: Place) -> Callable[..., Any]:
        def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self._multiplied(index, place, output)

        return multiply

    def _multiplied(self, index: int, place: Place, x: Tensor) -> Tensor:
        z = self._now[index]
        assert z is not None  # the source runs before what reads its outcome
        shape = [len(z)] + [1] * (x.ndim - 1)
        if place.owner is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], 1)[:, place.owner.to(z.device)]
        shape[place.axis] = z.shape[1]
        return x * z.to(x.dtype).view(shape)
