"""Wanda: weights by magnitude times the norm of the input they multiply, compared within an output row."""

from __future__ import annotations

from billhook.calibrate.statistics import ColumnNorm
from billhook.calibrate.walk import Walk
from billhook.methods.base import Paper, SparseMethod, register
from billhook.sparsity.saliency import wanda


@register("wanda")
class Wanda(SparseMethod):
    title = "Wanda"
    paper = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "M. Sun, Z. Liu, A. Bair, J. Z. Kolter",
        "ICLR 2024",
        "2306.11695",
    )
    summary = "Removes the weights with the smallest |W_ij| · ‖X_j‖₂ of each output row; updates nothing."
    when = (
        "The default: one pass over little data, no failure modes. At 60% and above, and under 2:4, SparseGPT is "
        "better and takes a little longer."
    )

    def prune(self, walk: Walk) -> None:
        sparsity = self.targets(walk)
        for block in walk:
            norms = block.collect(ColumnNorm)
            for site in block.sites:
                score = wanda(site.weight, norms[site])
                self.apply(block, site, self.density_pattern.keep(score, sparsity[site.name]))
