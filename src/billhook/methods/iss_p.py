"""ISS-P: at every step the weights that are small right now shrink a little; those that stay small fade away."""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from billhook.declared import Paper
from billhook.errors import BillhookError
from billhook.sparsity.patterns import parse_pattern
from billhook.sparsity.select import keep_n_of_m
from billhook.training.masks import keep_in_layer
from billhook.training.prunable import TRANSPOSED
from billhook.training.pruner import Pruner, SparseTraining, pruner

_MOST = 0.995  # no layer loses more than this share


@pruner("iss-p")
class ISSP(SparseTraining):
    title = "Iterative soft shrinkage (ISS-P)"
    paper = Paper(
        "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
        "J. Wang, H. Wang, Y. Zhang, Y. Fu, Z. Tao",
        "ICCV 2023",
        "2303.09650",
    )
    summary = (
        "For the first part of the training, multiplies each layer's smallest weights by a factor below 1 after every "
        "step, with full gradients; then removes them."
    )
    when = (
        "For networks trained from nothing, super-resolution ones above all. Keep the learning rate constant while "
        "weights shrink. With steps of lr, as Adam takes them, a weight that shrinks every time grows to lr / (1 − "
        "shrink) at most: where the smallest that stay are larger, none comes back, so raise shrink for small rates."
    )

    shrink: float = Field(
        0.95, ge=0, le=1, description="Factor per step; 0 is iterative hard thresholding, 1 one-shot."
    )
    until: float = Field(1 / 3, gt=0, le=1, description="Where shrinking ends, as a fraction of the training.")
    pattern: str = Field(
        "unstructured",
        description="unstructured; or N:M, which sets the sparsity: N of every M consecutive weights of an output stay "
        "(over a convolution's kernel first); layers whose outputs M does not divide stay dense.",
    )
    least: int = Field(1000, ge=0, description="Layers with fewer weights stay dense.")

    @field_validator("pattern")
    @classmethod
    def _known(cls, text: str) -> str:
        parse_pattern(text)
        return text

    @model_validator(mode="after")
    def _one_sparsity(self) -> ISSP:
        nm = parse_pattern(self.pattern)
        if nm is not None and "sparsity" in self.model_fields_set and abs(self.sparsity - nm.sparsity) > 1e-6:
            raise ValueError(
                f"sparsity={self.sparsity:g} is not that of {self.pattern}, {nm.sparsity:g}: leave sparsity out"
            )
        return self

    def begin(self, pruner: Pruner) -> None:
        for name, weight in pruner.weights.items():
            if self.shrink < 1 and float(torch.tensor(self.shrink, dtype=weight.dtype)) == 1:
                raise BillhookError(
                    f"shrink={self.shrink:g} rounds to 1 in {str(weight.dtype).removeprefix('torch.')}, the dtype of "
                    f"{name}, so nothing would shrink: train in float32, under autocast where speed matters, or give a "
                    "smaller factor."
                )
        super().begin(pruner)

    def due(self, step: int, total_steps: int) -> bool:
        return step == self.last(total_steps)

    def last(self, total_steps: int) -> int:
        """The step at which shrinking ends."""
        return max(1, round(self.until * total_steps))

    def between(self, pruner: Pruner) -> None:
        if pruner.taken < self.last(pruner.total_steps):
            self._shrink(pruner)

    def update(self, pruner: Pruner) -> None:
        self._shrink(pruner)
        masks = {n: self.important(w.detach(), outputs(pruner, n)) for n, w in pruner.weights.items()}
        pruner.set_masks(masks)

    def reached(self, pruner: Pruner) -> bool:
        return pruner.taken >= self.last(pruner.total_steps)

    def important(self, weight: Tensor, outputs: int = 0) -> Tensor:
        """The weights that do not shrink: bool, of the weight's shape; `outputs` is the axis of its outputs."""
        everything = torch.ones_like(weight, dtype=torch.bool)
        if weight.numel() < self.least:
            return everything
        nm = parse_pattern(self.pattern)
        if nm is not None:
            rows = weight.abs().movedim(outputs, 0)
            flat = rows.flatten(1)
            if flat.shape[1] % nm.m:
                return everything
            return keep_n_of_m(flat, nm.n, nm.m).view(rows.shape).movedim(0, outputs)
        n = weight.numel()
        count = min(math.ceil(round(self.sparsity * n, 6)), int(_MOST * n))
        return keep_in_layer(weight.abs(), everything, n - count)

    @torch.no_grad()
    def _shrink(self, pruner: Pruner) -> None:
        for name, weight in pruner.weights.items():
            factor = torch.where(self.important(weight, outputs(pruner, name)), 1.0, self.shrink)
            weight.mul_(factor.to(weight.dtype))


def outputs(pruner: Pruner, name: str) -> int:
    """The axis of a weight's outputs."""
    return int(isinstance(pruner.model.get_submodule(name.rpartition(".")[0]), TRANSPOSED))
