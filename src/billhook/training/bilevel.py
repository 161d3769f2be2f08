"""Masks that are learnt: scores rank the weights, and learn from other batches than the weights do.

A training alternates two kinds of steps. In a lower one the optimizer moves the weights that are there. In an upper
one it stands still, and the batch's gradient moves the scores of all weights, absent ones too; the best are then there.
The parameter always holds the weights as the network uses them, m·θ; what an absent weight would return with is kept
beside it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from billhook.errors import BillhookError
from billhook.sparsity.select import budget, keep_largest
from billhook.training.masks import Masks, pack
from billhook.training.pruner import Pruner, SparseTraining
from billhook.training.schedules import cosine

Granularity = Literal["weight", "filter", "channel"]

_LOOKS = 10  # how often the mask is compared with itself in a training


def implicit_gradient(theta: Tensor, mask: Tensor, gradient: Tensor, implicit: float) -> Tensor:
    """Gradient in the mask of the loss that the weights have after they were retrained under it: (θ − m·g/γ)·g.

    It is exact where the loss is linear in the effective weights z = m·θ around them, and the retraining minimises
    loss + γ/2·‖θ‖².

    Args:
        theta: weights, absent ones as they would return.
        mask: which are there.
        gradient: g of the loss in z, absent positions too.
        implicit: 1/γ; 0 leaves θ·g, the gradient in the mask of the weights as they are.

    Source: Zhang et al. (2210.04092), the gradient of the upper level under a vanishing Hessian of the loss in z.
    """
    return (theta - implicit * mask * gradient) * gradient


def top(scores: Mapping[str, Tensor], keep: int) -> Masks:
    """The `keep` largest of all scores together, of any sign; of equal ones the lower index goes first."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = keep_largest(flat[None], len(flat) - keep)[0]
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Intersection over union of two masks, given as `pack` makes them; 1 where both are empty."""
    ones = torch.tensor([bits.bit_count() for bits in range(256)])
    both = sum(int(ones[(bits & second[name]).long()].sum()) for name, bits in first.items())
    either = sum(int(ones[(bits | second[name]).long()].sum()) for name, bits in first.items())
    return both / either if either else 1.0


class BiLevel(SparseTraining):
    """Learns scores in some steps of the optimizer and weights in the others.

    What `Pruner.memory` holds until the mask is final, by name of the weight: `theta`, the absent weights, zero where
    the parameter has the value; `score` and its `velocity`, of one value per weight or group; float32, or the weight's
    dtype if that is wider. `overlap` has a row [step, IoU with the mask a tenth before, IoU with the first one].
    """

    needs_gradients: ClassVar[bool] = True
    stands_still: ClassVar[bool] = True

    granularity: Granularity = Field(
        "weight", description="What leaves: single weights, or output filters or input channels of convolutions."
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="Weights compete over all layers or within each; filters and channels always within."
    )
    mask_rate: float = Field(0.1, ge=0, description="Learning rate of the scores at first; falls to 0 along a cosine.")
    mask_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the scores.")
    score_clip: float | None = Field(
        1.0,
        gt=0,
        description="Bound of a score's gradient, as a multiple of the root mean square of its layer's scores.",
    )

    @model_validator(mode="after")
    def _groups_have_layers(self) -> BiLevel:
        if self.granularity != "weight" and "scope" in self.model_fields_set and self.scope == "global":
            raise ValueError(f"scope=global is of single weights; each layer has its own count of {self.granularity}s")
        return self

    @abstractmethod
    def last(self, total_steps: int) -> int:
        """The step after which the mask stays as it is."""

    @abstractmethod
    def upper(self, step: int) -> bool:
        """Whether scores learn in this step, rather than weights."""

    def score_gradient(self, theta: Tensor, mask: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the loss in the mask. All shaped like the weight."""
        return theta * gradient

    def candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = super().candidates(model)
        if self.granularity == "weight":
            return found
        chosen = {name: weight for name, weight in found.items() if self._axis(model, name) is not None}
        if not chosen:
            raise BillhookError(
                f"There is no convolution to remove {self.granularity}s from: use granularity=weight for this model."
            )
        return chosen

    def begin(self, pruner: Pruner) -> None:
        last = self.last(pruner.total_steps)  # where the rate of the scores has come down to zero
        learns = any(self.upper(step) for step in range(1, last))
        if self.sparsity and self.mask_rate and not learns:
            raise BillhookError(
                f"{self.title} has no step to learn the mask in: {pruner.total_steps} steps are too few, or the mask "
                "is frozen too early."
            )
        for name, weight in pruner.weights.items():
            theta = _wide(weight.detach())
            score = self._norms(pruner, name, theta)
            pruner.memory[f"score.{name}"] = score
            pruner.memory[f"velocity.{name}"] = torch.zeros_like(score)
            pruner.memory[f"theta.{name}"] = torch.zeros_like(theta)
        self._project(pruner)
        for name, mask in pruner.masks.items():
            pruner.memory[f"first.{name}"] = pruner.memory[f"before.{name}"] = pack(mask)
        pruner.memory["overlap"] = torch.zeros(0, 3, dtype=torch.float64)
        if not (self.sparsity and self.mask_rate):  # the mask is final already
            pruner.memory = {"overlap": pruner.memory["overlap"]}

    def due(self, step: int, total_steps: int) -> bool:
        learns = self.sparsity > 0 and self.mask_rate > 0  # otherwise all steps are the weights'
        return learns and step <= self.last(total_steps) and self.upper(step)

    def update(self, pruner: Pruner) -> None:
        rate = cosine(pruner.taken, self.last(pruner.total_steps), self.mask_rate)
        for name, weight in pruner.weights.items():
            theta, score, velocity = (_kept(pruner, part, name) for part in ("theta", "score", "velocity"))
            whole = torch.where(pruner.masks[name], weight.detach(), theta)
            gradient = self.score_gradient(whole, pruner.masks[name], _wide(pruner.gradient(name)))
            gradient = self._sums(pruner, name, gradient)
            if self.score_clip is not None:
                bound = float(self.score_clip * score.square().mean().sqrt())
                gradient.clamp_(-bound, bound)
            velocity.mul_(self.mask_momentum).add_(gradient)
            score.sub_(velocity, alpha=rate)
        self._project(pruner)
        self._look(pruner)

    def between(self, pruner: Pruner) -> None:
        """The ridge acts on absent weights too: they shrink like present ones without gradient."""
        for group in pruner.optimizer.param_groups:
            decay = float(group["lr"]) * group.get("weight_decay", 0.0) / (1 - group.get("momentum", 0.0))
            members = {id(parameter) for parameter in group["params"]}
            for name, weight in pruner.weights.items():
                if decay and id(weight) in members and f"theta.{name}" in pruner.memory:
                    _kept(pruner, "theta", name).mul_(1 - min(decay, 1.0))

    def reached(self, pruner: Pruner) -> bool:
        if self.granularity == "weight" and self.scope == "global":
            return super().reached(pruner)
        return all(
            int(self._norms(pruner, name, mask).count_nonzero()) <= self._groups(pruner, name)
            for name, mask in pruner.masks.items()
        )

    # -- the projection -------------------------------------------------------------------------------------

    def _project(self, pruner: Pruner) -> None:
        """The mask of the best scores; values move between the parameter and what is kept beside it."""
        scores = {name: _kept(pruner, "score", name) for name in pruner.weights}
        if self.granularity == "weight" and self.scope == "global":
            masks = top(scores, pruner.keep(self.sparsity))
        else:
            masks = {n: top({n: score}, self._groups(pruner, n))[n] for n, score in scores.items()}
        masks = {name: mask.expand_as(pruner.weights[name]).contiguous() for name, mask in masks.items()}
        for name, mask in masks.items():
            weight, theta = pruner.weights[name].data, _kept(pruner, "theta", name)
            whole = torch.where(pruner.masks[name], weight, theta)
            weight.copy_(torch.where(mask, whole, 0))
            theta.copy_(torch.where(mask, 0, whole))
        pruner.set_masks(masks)

    def _groups(self, pruner: Pruner, name: str) -> int:
        """How many groups (or weights) a layer keeps: at least one."""
        within = self._within(pruner, name)
        count = math.prod(size for axis, size in enumerate(pruner.weights[name].shape) if axis not in within)
        return max(1, count - budget(count, self.sparsity))

    def _axis(self, model: nn.Module, name: str) -> int | None:
        """The axis of a convolution's weight along which its filters or input channels lie; None where none do."""
        module = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, _ConvNd):
            return None
        axis = int((self.granularity == "channel") != isinstance(module, _ConvTransposeNd))
        return None if axis == 1 and module.groups > 1 else axis  # such a slice is a channel of each group

    def _within(self, pruner: Pruner, name: str) -> list[int]:
        """The axes within a group; none where each weight is for itself."""
        if self.granularity == "weight":
            return []
        axis = self._axis(pruner.model, name)
        return [other for other in range(pruner.weights[name].dim()) if other != axis]

    def _norms(self, pruner: Pruner, name: str, values: Tensor) -> Tensor:
        """|θ| of each weight, or ‖θ‖ of each group, with the axes within it kept at 1."""
        within = self._within(pruner, name)
        return _wide(values).square().sum(within, keepdim=True).sqrt() if within else _wide(values).abs()

    def _sums(self, pruner: Pruner, name: str, gradient: Tensor) -> Tensor:
        """The gradient in the one mask that the weights of a group share."""
        within = self._within(pruner, name)
        return gradient.sum(within, keepdim=True) if within else gradient

    # -- what the user sees of it ---------------------------------------------------------------------------

    def _look(self, pruner: Pruner) -> None:
        """Compare the mask with earlier ones now and then; when it is final, say how it went and free the memory."""
        last, memory = self.last(pruner.total_steps), pruner.memory
        final = not any(self.due(step, pruner.total_steps) for step in range(pruner.taken + 1, last + 1))
        tenth = max(1, last // _LOOKS)
        looked = int(memory["overlap"][-1, 0]) if len(memory["overlap"]) else 0
        if not final and pruner.taken - looked < tenth:
            return
        now = {name: pack(mask) for name, mask in pruner.masks.items()}
        first, before = ({n: memory[f"{when}.{n}"].cpu() for n in now} for when in ("first", "before"))
        row = [float(pruner.taken), overlap(now, before), overlap(now, first)]
        memory["overlap"] = torch.cat([memory["overlap"], torch.tensor([row], dtype=torch.float64)])
        memory.update({f"before.{name}": bits for name, bits in now.items()})
        if final:
            pruner.notes.append(
                f"The mask is final after step {pruner.taken}: IoU {row[2]:.2f} with the magnitude mask it began as, "
                f"{row[1]:.2f} with itself {pruner.taken - looked} steps before."
            )
            pruner.memory = {"overlap": memory["overlap"]}


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: in a narrower type a score would stop moving."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _kept(pruner: Pruner, part: str, name: str) -> Tensor:
    """A tensor of the memory, on its weight's device also after a resume from elsewhere."""
    key = f"{part}.{name}"
    pruner.memory[key] = pruner.memory[key].to(pruner.weights[name].device)
    return pruner.memory[key]
