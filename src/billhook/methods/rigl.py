"""RigL: sparse from the first step to the last; weak weights are exchanged for those of large gradient."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from billhook.declared import Paper
from billhook.training.densities import erk, uniform
from billhook.training.masks import Growth
from billhook.training.periodic import Periodic
from billhook.training.pruner import Pruner, pruner
from billhook.training.schedules import cosine


class _SparseToSparse(Periodic):
    """A random mask whose weights move while their number stays."""

    distribution: Literal["erk", "uniform"] = Field("erk", description="How weights are shared out over layers.")

    def begin(self, pruner: Pruner) -> None:
        super().begin(pruner)
        share = erk if self.distribution == "erk" else uniform
        pruner.start_from(share(pruner.shapes, 1 - self.sparsity))


@pruner("rigl")
class RigL(_SparseToSparse):
    title = "RigL"
    paper = Paper(
        "Rigging the Lottery: Making All Tickets Winners",
        "U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen",
        "ICML 2020",
        "1911.11134",
    )
    summary = "From a random sparse start, drops the smallest weights and grows those of largest gradient."
    when = "To train within a fixed number of weights, so that the dense network is never needed."
    needs_gradients: ClassVar[bool] = True

    fraction: float = Field(0.3, ge=0, le=1, description="Share of a layer's weights exchanged at first; falls to 0.")
    growth: Growth = Field("gradient", description="What grows: where the gradient is largest, or at random.")

    def update(self, pruner: Pruner) -> None:
        last = self.span(pruner.total_steps)[1]
        pruner.exchange(cosine(pruner.taken, last, self.fraction), self.growth)


@pruner("set")
class SET(_SparseToSparse):
    title = "SET"
    paper = Paper(
        "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network Science",
        "D. C. Mocanu, E. Mocanu, P. Stone, P. H. Nguyen, M. Gibescu, A. Liotta",
        "Nature Communications 2018",
        "1707.04780",
    )
    summary = "From a random sparse start, drops the smallest weights and grows as many at random."
    when = "A baseline for RigL that needs no gradient of absent weights."

    fraction: float = Field(0.3, ge=0, le=1, description="Share of a layer's weights exchanged.")

    def update(self, pruner: Pruner) -> None:
        pruner.exchange(self.fraction, "random")


@pruner("static")
class StaticMask(_SparseToSparse):
    title = "Random mask"
    paper = None
    summary = "A random mask, drawn before the training and never changed."
    when = "The control that every other method of sparse training has to beat."

    def due(self, step: int, total_steps: int) -> bool:
        return False
