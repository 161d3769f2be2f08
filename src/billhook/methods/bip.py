"""BiP: which weights stay is learnt together with them, as the upper level of a bi-level problem."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from billhook.declared import Paper
from billhook.training.bilevel import BiLevel, implicit_gradient
from billhook.training.pruner import pruner


@pruner("bip")
class BiP(BiLevel):
    """Bi-level pruning.

    The upper level seeks the mask m under which *retrained* weights have the lowest loss, the lower level retrains:
    min over m of ℓ(m·θ*(m)), θ*(m) = argmin over θ of ℓ(m·θ) + γ/2·‖θ‖². As m and θ enter the loss by their product
    only, the upper gradient needs first derivatives alone; see `implicit_gradient`.

    Every `lower_per_upper` + 1 steps of the optimizer, one belongs to the scores. The training is that much longer for
    the same number of steps of the weights. Norms with running statistics see the batches of both kinds of steps, under
    masks that change: estimate their statistics anew after the last change where the rest of the training is short.

    The mask has its sparsity from the first step on: start from a trained network. All state that belongs to a weight
    in the optimizer is forgotten when it leaves.
    """

    title = "BiP"
    paper = Paper(
        "Advancing Model Pruning via Bi-level Optimization",
        "Y. Zhang, Y. Yao, P. Ram, P. Zhao, T. Chen, M. Hong, Y. Wang, S. Liu",
        "NeurIPS 2022",
        "2210.04092",
    )
    summary = (
        "Alternates steps on the weights with steps on scores that decide which weights are there, by the gradient of "
        "the loss after retraining."
    )
    when = (
        "To prune a trained network in one more training, at high sparsity above all. mask_rate decides: watch the "
        "overlap of successive masks."
    )

    implicit: float = Field(
        1.0, ge=0, description="Weight 1/γ of the retraining's response; 0 takes the weights as they are."
    )
    lower_per_upper: int = Field(1, ge=1, description="Steps of the weights for each step of the scores.")
    freeze_after: float = Field(
        0.75, gt=0, le=1, description="Where the mask becomes final, as a fraction of the training."
    )

    def last(self, total_steps: int) -> int:
        period = self.lower_per_upper + 1
        return math.floor(round(self.freeze_after * total_steps, 6)) // period * period

    def upper(self, step: int) -> bool:
        return step % (self.lower_per_upper + 1) == 0

    def score_gradient(self, theta: Tensor, mask: Tensor, gradient: Tensor) -> Tensor:
        return implicit_gradient(theta, mask, gradient, self.implicit)


@pruner("hydra")
class HYDRA(BiLevel):
    """Scores learn first, over weights that stand still; then the weights that are left train."""

    title = "HYDRA"
    paper = Paper(
        "HYDRA: Pruning Adversarially Robust Neural Networks",
        "V. Sehwag, S. Wang, P. Mittal, S. Jana",
        "NeurIPS 2020",
        "2002.10509",
    )
    summary = "Learns the mask of a trained network whose weights are frozen, then fine-tunes what is left."
    when = "For a loss that magnitude knows nothing of, such as robustness; otherwise BiP is the better choice."

    learn: float = Field(0.5, gt=0, le=1, description="Part of the training in which the mask is learnt.")

    def last(self, total_steps: int) -> int:
        return math.floor(round(self.learn * total_steps, 6))

    def upper(self, step: int) -> bool:
        return True
