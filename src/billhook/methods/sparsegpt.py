"""SparseGPT: one-shot pruning with second-order repair of the weights that stay."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.gram import Gram, inverse_cholesky
from billhook.calibrate.walk import Block, Walk
from billhook.methods.base import Paper, SparseMethod, register
from billhook.sparsity.obs import sweep
from billhook.sparsity.patterns import Scope
from billhook.sparsity.saliency import obs


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
        True,
        description="Projections see what those before them became (one halting pass), not the block as it was (two "
        "passes, less memory, the authors' code).",
    )

    @property
    def exact_passes(self) -> bool:
        return False  # what a near-tie costs is compensated by the weights that stay

    def prune(self, walk: Walk) -> None:
        sparsity = self.targets(walk)
        for block in walk:
            for sites, grams in block.in_turn(Gram, together=not self.true_sequential):
                for together in _sharing(sites, grams, sparsity):
                    gram = grams[together[0]]
                    upper = inverse_cholesky(gram.matrix, self.damping)
                    heights = [site.shape[0] for site in together]
                    keep = None  # chosen in the course of the sweep
                    if self.refiner is not None:  # a refiner wants the whole mask, and the dense weights beside it
                        keep = torch.cat([self._refined_mask(block, site, upper, gram, sparsity) for site in together])
                    weight, _ = sweep(
                        torch.cat([site.weight.float() for site in together]),
                        upper,
                        sparsity=sparsity[together[0].name],
                        pattern=self.nm,
                        scope=self.scope,
                        keep=keep,
                        dead=gram.dead,
                        block_size=self.block_size,
                        matrices=heights,
                    )
                    for site, part in zip(together, torch.split(weight, heights), strict=True):
                        site.write(part)

    def _refined_mask(self, block: Block, site: Site, upper: Tensor, gram: Gram, sparsity: dict[str, float]) -> Tensor:
        """The mask by w² / U_jj² on the dense weights, refined; the sweep then repairs for it."""
        score = obs(site.weight, upper.diagonal()).masked_fill(gram.dead, 0.0)
        return self.refined(block, site, self.density_pattern.keep(score, sparsity[site.name]))


def _sharing(sites: list[Site], grams: dict[Site, Gram], sparsity: dict[str, float]) -> list[list[Site]]:
    """Sites of one input and one target: rows are independent, so they are swept as one tall matrix."""
    groups: dict[tuple[int, float], list[Site]] = {}
    for site in sites:
        groups.setdefault((id(grams[site]), sparsity[site.name]), []).append(site)
    return list(groups.values())
