"""Gradual magnitude pruning: the smallest weights leave a few at a time, along a cubic curve."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from billhook.declared import Paper
from billhook.training.densities import erk, uniform
from billhook.training.periodic import Gradual
from billhook.training.pruner import Pruner, pruner


@pruner("gmp")
class GMP(Gradual):
    title = "Gradual magnitude pruning"
    paper = Paper(
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        "M. Zhu, S. Gupta",
        "2017",
        "1710.01878",
    )
    summary = "Raises the sparsity along a cubic curve; at each step the smallest weights leave for good."
    when = "The strong and simple baseline for pruning while training; costs nothing beside the training."

    scope: Literal["global", "layer"] = Field(
        "global", description="Weights compete over all layers, or every layer has the same sparsity."
    )

    def begin(self, pruner: Pruner) -> None:
        super().begin(pruner)
        if self.initial_sparsity > 0:
            share = erk if self.scope == "global" else uniform
            pruner.start_from(share(pruner.shapes, 1 - self.initial_sparsity))

    def update(self, pruner: Pruner) -> None:
        sparsity = self.sparsity_at(pruner.taken, pruner.total_steps)
        if self.scope == "global":
            pruner.prune_globally(sparsity)
        else:
            pruner.prune_layers(uniform(pruner.shapes, 1 - sparsity))
