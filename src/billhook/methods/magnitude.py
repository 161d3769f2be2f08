"""Magnitude pruning: the smallest weights go. Needs no data; fails early on language models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from billhook.calibrate.walk import Walk
from billhook.methods.base import Paper, SparseMethod, register
from billhook.sparsity.patterns import Pattern, Unstructured
from billhook.sparsity.saliency import magnitude


@register("magnitude")
class Magnitude(SparseMethod):
    title = "Magnitude pruning"
    paper = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks",
        "S. Han, J. Pool, J. Tran, W. J. Dally",
        "NeurIPS 2015",
        "1506.02626",
    )
    needs = "nothing"
    summary = "Removes the weights of smallest absolute value."
    when = (
        "The baseline for everything, and for vision networks often good enough. On language models it fails at "
        "about half of the weights: use Wanda or SparseGPT."
    )

    scope: Literal["row", "layer", "global"] = Field(  # type: ignore[assignment]
        "layer",
        description="Weights compete within an output row, a matrix (layer) or all matrices (global).",
    )

    @model_validator(mode="after")
    def _one_ranking(self) -> Magnitude:
        if self.scope == "global" and (self.nm is not None or self.allocation != "uniform"):
            raise ValueError("scope global has one ranking over all matrices: leave pattern and allocation out")
        return self

    @property
    def density_pattern(self) -> Pattern:
        return self.nm or Unstructured("row" if self.scope == "row" else "layer")

    def prune(self, walk: Walk) -> None:
        # A ranking over all matrices is an allocation followed by a ranking within each.
        ranking = "global-magnitude" if self.scope == "global" else self.allocation
        sparsity = self.model_copy(update={"allocation": ranking}).targets(walk)
        for block in walk:
            for site in block.sites:
                score = magnitude(site.weight)
                self.apply(block, site, self.density_pattern.keep(score, sparsity[site.name]))
