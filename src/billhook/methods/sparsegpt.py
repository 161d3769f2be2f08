"""SparseGPT: one-shot pruning with second-order repair of the weights that stay."""

from __future__ import annotations

from pydantic import Field

from billhook.calibrate.gram import Gram
from billhook.calibrate.walk import Walk
from billhook.methods.base import Paper, SparseMethod, register
from billhook.sparsity.obs import sweep
from billhook.sparsity.patterns import Scope


@register("sparsegpt")
class SparseGPT(SparseMethod):
    title = "SparseGPT"
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "E. Frantar, D. Alistarh",
        "ICML 2023",
        "2301.00774",
    )
    summary = (
        "Sweeps over the columns of each matrix, removes the weights of smallest w² / [H⁻¹]_jj, and compensates each "
        "removal in the columns to its right."
    )
    when = (
        "The strongest one-shot baseline at 60% and above and under N:M patterns. Wants more calibration data than "
        "Wanda (more tokens than a matrix has inputs), and memory for one in × in matrix."
    )

    scope: Scope = Field(
        "layer",
        description="Weights compete within 128 columns over all rows (layer) or within each row of them (row).",
    )
    damping: float = Field(0.01, gt=0, le=1, description="Share of the mean diagonal added to the Gram matrix.")
    block_size: int = Field(128, ge=1, description="Columns whose mask is chosen at once.")
    true_sequential: bool = Field(
        False, description="Collect anew after each group of projections instead of once per block."
    )

    def prune(self, walk: Walk) -> None:
        sparsity = self.targets(walk)
        for block in walk:
            for sites in block.stages if self.true_sequential else [block.sites]:
                grams = block.collect(Gram, sites)
                for site in sites:
                    gram = grams[site]
                    weight, _ = sweep(
                        site.weight.float(),
                        gram.inverse_factor(self.damping),
                        sparsity=sparsity[site.name],
                        pattern=self.nm,
                        scope=self.scope,
                        dead=gram.dead,
                        block_size=self.block_size,
                    )
                    site.write(weight)
