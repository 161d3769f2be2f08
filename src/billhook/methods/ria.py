"""RIA: relative importance (a weight's share of its row and of its column) times input activation."""

from __future__ import annotations

from pydantic import Field

from billhook.calibrate.statistics import ColumnNorm
from billhook.calibrate.walk import Walk
from billhook.methods.base import Paper, SparseMethod, register
from billhook.sparsity.patterns import Scope
from billhook.sparsity.saliency import ria


@register("ria")
class RIA(SparseMethod):
    title = "RIA"
    paper = Paper(
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        "Y. Zhang, H. Bai, H. Lin, J. Zhao, L. Hou, C. V. Cannistraci",
        "ICLR 2024",
    )
    summary = "Removes the weights with the smallest (|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^a."
    when = (
        "As cheap as Wanda and often a little better at moderate sparsity, because whole input or output channels "
        "are not emptied."
    )

    scope: Scope = Field("layer", description="Weights compete within an output row (row) or a matrix (layer).")
    exponent: float = Field(0.5, ge=0, le=4, description="Power a of the input norm; 0 ignores the data.")

    def prune(self, walk: Walk) -> None:
        sparsity = self.targets(walk)
        for block in walk:
            norms = block.collect(ColumnNorm)
            for site in block.sites:
                score = ria(site.weight, norms[site], self.exponent)
                self.apply(block, site, self.density_pattern.keep(score, sparsity[site.name]))
