"""Refiners: what improves a mask before it is applied, at unchanged sparsity and with the dense weights.

A refiner is a declaration and a function of one matrix; it names the statistic of the input that it reads, which
the walk gathers in the same pass as the method's own. Every method with a mask can use every refiner.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.statistics import Moments, SequenceMoments, Statistic
from billhook.declared import Declared, Paper, Registry
from billhook.sparsity.dsnot import cycles_for, dsnot
from billhook.sparsity.patterns import NM


class Refiner(Declared):
    """Base of all refiners."""

    kind = "refiner"
    statistic: ClassVar[type[Statistic[Any]]]

    @abstractmethod
    def refine(self, site: Site, keep: Tensor, gathered: Any, nm: NM | None) -> Tensor:
        """A better mask (bool [out, in]) with as many kept weights in every row, and N in every group of M.

        Args:
            site: its weight is still dense.
            keep: the mask to start from.
            gathered: the result of `statistic` for the site's input.
            nm: the pattern to respect, if any.
        """


REFINERS: Registry[Refiner] = Registry("refiner")


@REFINERS.register("none")
class NoRefiner(Refiner):
    title = "No refinement"
    paper = None
    summary = "Applies the mask as it is."
    when = "The default."
    statistic = SequenceMoments

    def refine(self, site: Site, keep: Tensor, gathered: Any, nm: NM | None) -> Tensor:
        return keep


@REFINERS.register("dsnot")
class DSnoT(Refiner):
    title = "DSnoT"
    paper = Paper(
        "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        "Y. Zhang, L. Zhao, M. Lin, Y. Sun, Y. Yao, X. Han, J. Tanner, S. Liu, R. Ji",
        "ICLR 2024",
        "2310.08915",
    )
    summary = (
        "Swaps pruned and kept weights of each output row until the row's expected output error is near zero; updates "
        "no weight."
    )
    when = (
        "Almost free on top of a mask at 60% and above. At 50% and below the gain is small and may be negative, and on "
        "narrow models many swaps do harm: see the benchmarks. A mask chosen without inputs, such as magnitude's, "
        "gains most, with modules=all."
    )
    statistic = SequenceMoments

    cycles: Literal["auto"] | int = Field(
        "auto", description="Most swaps per row; auto: 50 per 4096 inputs, as the paper's models have."
    )
    threshold: float = Field(
        0.1, ge=0, description="A row stops when its error, summed over 2048 tokens, is below (scaled to the length)."
    )
    variance_power: float = Field(1.0, ge=0, le=4, description="Power of the input variance in the growing score.")
    overshoot: bool = Field(True, description="Whether the last swap may change the error's sign.")
    modules: Literal["attention", "mlp", "all"] = Field(
        "attention", description="Matrices that are refined; the authors' code leaves the MLP alone."
    )

    def refine(self, site: Site, keep: Tensor, gathered: Moments, nm: NM | None) -> Tensor:
        if self.modules != "all" and site.role not in (self.modules, "other"):
            return keep
        return dsnot(
            site.weight,
            keep,
            gathered,
            cycles=cycles_for(site.shape[1]) if self.cycles == "auto" else self.cycles,
            threshold=self.threshold,
            variance_power=self.variance_power,
            overshoot=self.overshoot,
            nm=nm,
        ).keep
