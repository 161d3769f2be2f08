"""GraNet: prune a little, then exchange weak weights for those of large gradient, all along one training."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from billhook.declared import Paper
from billhook.training.densities import erk
from billhook.training.masks import Growth
from billhook.training.periodic import Gradual
from billhook.training.pruner import Pruner, pruner
from billhook.training.schedules import cosine


@pruner("granet")
class GraNet(Gradual):
    title = "GraNet"
    paper = Paper(
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        "S. Liu, T. Chen, X. Chen, Z. Atashgahi, L. Yin, H. Kou, L. Shen, M. Pechenizkiy, Z. Wang, D. C. Mocanu",
        "NeurIPS 2021",
        "2106.10404",
    )
    summary = (
        "Raises the sparsity along a cubic curve by magnitude over all layers, and each time exchanges some of every "
        "layer's weakest weights for the absent ones of largest gradient."
    )
    when = (
        "To train a sparse network in one run, from scratch or from a trained one. From a random start "
        "(initial_sparsity=0.5) the training itself is sparse."
    )
    needs_gradients: ClassVar[bool] = True

    regeneration: float = Field(0.5, ge=0, le=1, description="Share of a layer's weights exchanged at first.")
    least_regeneration: float = Field(0.005, ge=0, le=1, description="The same at the end of the training.")
    growth: Growth = Field("gradient", description="What grows: where the gradient is largest, or at random.")

    def begin(self, pruner: Pruner) -> None:
        super().begin(pruner)
        if self.initial_sparsity > 0:
            pruner.start_from(erk(pruner.shapes, 1 - self.initial_sparsity))

    def due(self, step: int, total_steps: int) -> bool:
        # weights are exchanged to the end, long after the last one was removed
        first, last = self.span(total_steps)
        return step % self.interval(total_steps) == 0 and first < step <= max(last, total_steps - 1)

    def update(self, pruner: Pruner) -> None:
        step, total = pruner.taken, pruner.total_steps
        pruner.prune_globally(self.sparsity_at(step, total))
        if step < total:  # what grew with the last step would never be trained
            pruner.exchange(cosine(step, total, self.regeneration, self.least_regeneration), self.growth)
