"""SNIP: before the first step, keep the weights whose removal the loss would feel most."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from billhook.declared import Paper
from billhook.training.pruner import Pruner, SparseTraining, pruner


@pruner("snip")
class SNIP(SparseTraining):
    title = "SNIP"
    paper = Paper(
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        "N. Lee, T. Ajanthan, P. H. S. Torr",
        "ICLR 2019",
        "1810.02340",
    )
    summary = "Keeps the largest |w · ∂L/∂w| of all layers together, by the gradients of the first step."
    when = "A baseline of pruning at initialisation. The first batch decides: make it a large one."

    def before_first_step(self, pruner: Pruner) -> None:
        scores: Mapping[str, Tensor] = {
            name: (weight.detach() * pruner.gradient(name)).abs() for name, weight in pruner.weights.items()
        }
        pruner.prune_globally(self.sparsity, scores)

    def due(self, step: int, total_steps: int) -> bool:
        return False


@pruner("one-shot")
class OneShot(SparseTraining):
    title = "One-shot magnitude pruning"
    paper = None
    summary = "Removes the smallest weights of all layers together at once, then trains what is left."
    when = "The baseline for a trained network: prune, then retrain."

    def begin(self, pruner: Pruner) -> None:
        pruner.prune_globally(self.sparsity)

    def due(self, step: int, total_steps: int) -> bool:
        return False
