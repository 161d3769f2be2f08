"""What methods share that remove whole parts of blocks: the budget, its allocation over blocks, and rounding."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.influence import block_influence
from billhook.calibrate.walk import Block, Walk
from billhook.errors import BillhookError
from billhook.methods.base import Method
from billhook.sparsity.structure import entropic, proportional

Sharing = Literal["uniform", "influence", "redundancy"]


class StructuredMethod(Method):
    """A method that makes blocks smaller. Their number of parameters is counted without embeddings and head."""

    reshapes: ClassVar[bool] = True

    sparsity: float = Field(0.25, ge=0, lt=1, description="Fraction of the blocks' parameters removed.")
    target_size: float | None = Field(
        None, gt=0, le=1, description="Fraction of all parameters of the model that stays, instead of sparsity."
    )

    def overall(self, walk: Walk) -> float:
        """The fraction of the blocks' parameters to remove.

        Raises:
            BillhookError: the target size cannot be reached by removing parts of blocks.
        """
        if self.target_size is None:
            return self.sparsity
        blocks = sum(p.numel() for block in walk.blocks for p in block.parameters())
        tied: dict[str, str] = getattr(walk.model, "all_tied_weights_keys", None) or {}
        # streaming may have taken the two names of a tied parameter apart
        counts = {tied.get(name, name): p.numel() for name, p in walk.model.named_parameters(remove_duplicate=False)}
        total = sum(counts.values())
        ratio = (1 - self.target_size) * total / blocks
        if ratio >= 1:
            raise BillhookError(
                f"A target size of {self.target_size:g} cannot be reached: outside its blocks the model has "
                f"{(total - blocks) / total:.0%} of its parameters, which this method leaves."
            )
        return ratio

    def site(self, block: Block, name: str) -> Site | None:
        """The site of a projection of the block, if it has it."""
        return next((site for site in block.sites if site.projection == name), None)


class WidthMethod(StructuredMethod):
    """A method that narrows blocks: adds how the budget is shared out over them, and what widths are multiples of."""

    sharing: Sharing = Field(
        "uniform", description="How the ratio is shared out over blocks: uniform, influence, redundancy."
    )
    round: int = Field(1, ge=1, description="Widths are multiples of this; hardware likes 32 or 64.")

    def ratios(self, walk: Walk) -> list[float]:
        """The fraction removed of each block; the mean is the sparsity, or what the target size asks for."""
        mean = self.overall(walk)
        count = len(walk.blocks)
        if self.sharing == "uniform" or mean == 0:
            return [mean] * count
        scores = block_influence(walk)
        most = self.most(walk)
        if mean >= most:  # what cannot be shared out unevenly is refused, or done, evenly
            return [mean] * count
        if self.sharing == "influence":
            return entropic(scores, mean, cap=min(0.85, most))
        return proportional([1 - s for s in scores], mean, base=mean * 2 / 3, cap=min(0.9, most))

    def most(self, walk: Walk) -> float:
        """The largest fraction that any block can lose."""
        return 1.0


def random_scores(block: Block, size: int, draw: int) -> Tensor:
    """Random scores, the same in every run, for controls."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1_000_003 * draw + 1_009 * block.index + size))
