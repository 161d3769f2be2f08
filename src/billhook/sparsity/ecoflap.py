"""ECoFLaP's coarse step: global importance of blocks sets their sparsity (Sung, Yoon, Bansal, ICLR 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from billhook.calibrate.sensitivity import first_order, shortened, zeroth_order
from billhook.calibrate.walk import Walk
from billhook.declared import Paper
from billhook.sparsity.allocations import ALLOCATIONS, Allocation, proportional_keep


@ALLOCATIONS.register("ecoflap")
class ECoFLaP(Allocation):
    title = "ECoFLaP"
    paper = Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        "Y.-L. Sung, J. Yoon, M. Bansal",
        "ICLR 2024",
        "2310.02998",
    )
    needs = "calibration"
    summary = "Blocks whose random perturbation moves the loss more are pruned less; needs forward passes only."
    when = (
        "At 60% and above, on models of unequal parts. Needs the whole model in memory, and a loss; two forward passes "
        "per block and calibration batch."
    )

    score: Literal["zo", "grad", "grad_mag", "grad_mag_sq"] = Field(
        "zo", description="Zeroth order, or Σ|∇|, Σ|W∇|, Σ(W∇)² of a backward pass, which takes more memory."
    )
    group_by: Literal["block", "matrix"] = Field("block", description="What gets a sparsity of its own.")
    cap: float = Field(0.1, ge=0, lt=1, description="No group is pruned by more than the target plus this.")
    eps: float = Field(1e-3, gt=0, description="Standard deviation of the perturbation.")
    draws: int = Field(1, ge=1, description="Perturbations per group and batch.")
    samples: int = Field(8, ge=1, description="Calibration sequences that the importance is measured on.")
    length: int = Field(256, ge=2, description="Tokens of each of them.")
    batch: int = Field(2, ge=1, description="Sequences per forward pass.")
    seed: int = Field(0, ge=0, description="Of the perturbations.")

    def shares(self, walk: Walk, sparsity: float) -> dict[str, float]:
        """Steps 1 to 3: score the groups, then water-fill the budget in proportion to the scores under the cap."""
        options = self.model_dump(exclude={"cap"})
        scores = walk.looked("importance-" + "-".join(map(str, options.values())), lambda: self._scores(walk))
        group_of = {site.name: str(site.block) if self.group_by == "block" else site.name for site in walk.all_sites()}
        sizes: dict[str, int] = {}
        totals: dict[str, float] = {}
        for site in walk.all_sites():
            group = group_of[site.name]
            sizes[group] = sizes.get(group, 0) + site.numel
            # a block perturbed as a whole has one score already; sums of squares and magnitudes add up
            shared = self.score == "zo" and self.group_by == "block"
            totals[group] = scores[site.name] + (0.0 if shared else totals.get(group, 0.0))
        keep = proportional_keep(totals, sizes, sparsity, min(sparsity + self.cap, max(0.95, sparsity)))
        return {name: 1 - keep[group] / sizes[group] for name, group in group_of.items()}

    def _scores(self, walk: Walk) -> dict[str, float]:
        """Step 1: how much the loss moves with each site, or with its block."""
        batches = shortened(walk.batches, self.samples, self.length, self.batch)
        if self.score == "zo":
            return zeroth_order(walk, batches, group_by=self.group_by, eps=self.eps, draws=self.draws, seed=self.seed)
        return first_order(walk, batches, self.score)
