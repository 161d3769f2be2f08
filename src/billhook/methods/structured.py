"""What methods share that remove whole parts of blocks: the budget, its allocation over blocks, and rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.influence import block_influence
from billhook.calibrate.walk import Block, Walk
from billhook.errors import BillhookError
from billhook.measure.flops import TOKENS, PlannedFlops
from billhook.methods.base import Method
from billhook.sparsity.structure import entropic, proportional

Sharing = Literal["uniform", "influence", "redundancy"]
Dims = dict[str, Any]  # of a block, as `billhook.surgery.slim.dims_of` has them
_CLOSE = 0.01  # of the FLOPs asked for


class StructuredMethod(Method):
    """A method that makes blocks smaller. Their number of parameters is counted without embeddings and head."""

    reshapes: ClassVar[bool] = True

    sparsity: float = Field(0.25, ge=0, lt=1, description="Fraction of the blocks' parameters removed.")
    target_size: float | None = Field(
        None, gt=0, le=1, description="Fraction of all parameters of the model that stays, instead of sparsity."
    )
    target_flops: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Fraction of the FLOPs of a forward pass of {TOKENS} tokens that stays, within 1% of it, instead "
        "of sparsity.",
    )

    @model_validator(mode="after")
    def _one_goal(self) -> StructuredMethod:
        goals = ("sparsity", "target_size", "target_flops")
        given = [name for name in goals if name in self.model_fields_set and getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say how much to remove: leave one of them out")
        return self

    def options(self) -> dict[str, Any]:
        """The hyperparameters as plain values, without a sparsity that nothing follows."""
        options = super().options()
        if self.target_size is not None or self.target_flops is not None:
            del options["sparsity"]
        return options

    def overall(self, walk: Walk, shares: Callable[[float], Sequence[float]] | None = None) -> float:
        """The fraction of the blocks' parameters to remove.

        Args:
            shares: the fraction removed of each block by the mean; where it is not known yet, the mean of all.

        Raises:
            BillhookError: the target size or FLOPs cannot be reached by removing parts of blocks.
        """
        if self.target_flops is not None:
            return self.ratio_for_flops(walk, shares)
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

    def shapes(self, walk: Walk, ratios: Sequence[float]) -> list[Dims | None]:
        """What blocks would hold after these fractions were removed of each; None for a block that would be gone.

        Raises:
            BillhookError: so much cannot be removed.
        """
        raise BillhookError(
            f"How many FLOPs are left by {self.title} is not known before it ran: give sparsity or target_size instead "
            "of target_flops."
        )

    def ratio_for_flops(self, walk: Walk, shares: Callable[[float], Sequence[float]] | None) -> float:
        """The ratio after which a forward pass takes the asked fraction of the FLOPs of one before.

        Raises:
            BillhookError: none comes within 1% of what is asked; says what is nearest.
        """
        assert self.target_flops is not None
        flops = PlannedFlops(walk.model)
        now = flops.now
        goal = self.target_flops * now.total
        exact = shares is not None or self.even(walk)

        def left(ratio: float) -> int:
            return flops.total(self.shapes(walk, shares(ratio) if shares is not None else [ratio] * len(walk.blocks)))

        low, high, best, found = 0.0, 1.0, 0.0, left(0.0)
        for _ in range(30):  # FLOPs fall with the ratio, in steps
            if abs(found - goal) < 0.1 * _CLOSE * goal:
                break
            ratio = (low + high) / 2
            try:
                stays = left(ratio)
            except BillhookError:  # more than can be removed
                high = ratio
                continue
            if abs(stays - goal) < abs(found - goal):
                best, found = ratio, stays
            low, high = (ratio, high) if stays > goal else (low, ratio)
        if abs(found - goal) > _CLOSE * goal and exact:
            raise BillhookError(
                f"target_flops={self.target_flops:g} cannot be reached: the nearest that {self.title} comes to is "
                f"{found / now.total:.2%} of the FLOPs of {now.tokens} tokens, since parts have a size and not all "
                "of a model may leave; ask for that, or for a smaller round if it has such an option."
            )
        note = f"A forward pass of {now.tokens} tokens takes {found / now.total:.1%} of the FLOPs, by its shapes."
        if exact and note not in walk.notes:
            walk.notes.append(note)
        return best

    def even(self, walk: Walk) -> bool:
        """Whether how the ratio is shared out over blocks is known before any data were seen."""
        return True

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
        """The fraction removed of each block; the mean is the sparsity, or what the target asks for."""
        return self.shares(walk, self.overall(walk, lambda mean: self.shares(walk, mean)))

    def shares(self, walk: Walk, mean: float) -> list[float]:
        """The fraction removed of each block, by the mean."""
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

    def even(self, walk: Walk) -> bool:
        return self.sharing == "uniform"

    def most(self, walk: Walk) -> float:
        """The largest fraction that any block can lose."""
        return 1.0


def random_scores(block: Block, size: int, draw: int) -> Tensor:
    """Random scores, the same in every run, for controls."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1_000_003 * draw + 1_009 * block.index + size))
