"""What a method is: declared hyperparameters, a card, and a function of a walk."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.walk import Block, Needs, Walk
from billhook.declared import Declared, Paper, Registry
from billhook.errors import BillhookError
from billhook.sparsity import ecoflap as _ecoflap  # noqa: F401 -- registers itself
from billhook.sparsity import pqi as _pqi  # noqa: F401 -- registers itself
from billhook.sparsity.allocations import ALLOCATIONS, Allocation
from billhook.sparsity.patterns import NM, Pattern, Scope, Unstructured, parse_pattern
from billhook.sparsity.refiners import REFINERS, Refiner

__all__ = ["METHODS", "Method", "Paper", "SparseMethod", "method", "methods", "register"]


class Method(Declared):
    """Base of all post-training methods: a declaration, and `prune`."""

    kind = "method"
    needs: ClassVar[Needs] = "calibration"
    reshapes: ClassVar[bool] = False  # whether it removes whole parts, so that blocks have to be slim ones
    trains: ClassVar[bool] = (
        False  # whether it fits the calibration data, so that they must not be those it is judged on
    )

    @property
    def requires(self) -> Needs:
        """What this method needs with these options."""
        return self.needs

    @property
    def finishes_outside(self) -> bool:
        """Whether it edits modules outside the blocks after the last one, again if a run is resumed there."""
        return False

    @property
    def exact_passes(self) -> bool:
        """Whether rounded calibration passes could cost quality, so that "auto" precision must not round them."""
        return False

    @property
    def wants_original(self) -> bool:
        """Whether this step, where it is not the first, looks at the weights from before the run."""
        return False

    @abstractmethod
    def prune(self, walk: Walk) -> None:
        """Edit the weights of every block that the walk yields."""

    def check(self, walk: Walk) -> None:
        """Refuse what cannot work on this model, before any work is done."""


class SparseMethod(Method):
    """A method that sets weights to zero: adds the sparsity, its pattern and its allocation."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Fraction of the weights removed; 0.5 unless given or implied by N:M."
    )
    density: float | None = Field(None, gt=0, le=1, description="Fraction of the weights kept, instead of sparsity.")
    pattern: str = Field(
        "unstructured", description="unstructured, or N:M, which keeps N of every M consecutive inputs."
    )
    scope: Scope = Field("row", description="Weights compete within an output row (row) or a whole matrix (layer).")
    allocation: str = Field("uniform", description="How sparsity is shared out: uniform, owl, ecoflap, pqi.")
    refine: str = Field("none", description="How the mask is improved before it is applied: none, dsnot.")

    @field_validator("allocation", "refine", mode="before")
    @classmethod
    def _as_text(cls, given: Any, info: Any) -> str:
        registry: Registry[Any] = ALLOCATIONS if info.field_name == "allocation" else REFINERS
        text: str = registry.parse(given).text()  # its own sentence is the clearest
        return text

    @model_validator(mode="after")
    def _reachable(self) -> SparseMethod:
        if self.density is not None and self.sparsity is not None and abs(self.density + self.sparsity - 1) > 1e-9:
            raise ValueError(
                f"density {self.density:g} is not 1 - sparsity {self.sparsity:g}: leave one of the two out"
            )
        nm = parse_pattern(self.pattern)
        asked = self.sparsity if self.density is None else 1 - self.density
        if nm is not None and asked is not None and abs(asked - nm.sparsity) > 1e-6:
            raise ValueError(
                f"sparsity {asked:g} is not reachable under pattern {nm}, which removes exactly "
                f"{nm.sparsity:g}: leave one of the two out"
            )
        if nm is not None and self.allocation != "uniform":
            raise ValueError(f"pattern {nm} has the same sparsity everywhere: allocation must be uniform")
        return self

    @property
    def nm(self) -> NM | None:
        return parse_pattern(self.pattern)

    @property
    def density_pattern(self) -> Pattern:
        """The pattern object that selects what stays."""
        return self.nm or Unstructured(self.scope)

    @property
    def overall(self) -> float:
        """The sparsity that is aimed at."""
        if self.nm is not None:
            return self.nm.sparsity
        if self.density is not None:
            return round(1 - self.density, 12)
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def allocator(self) -> Allocation:
        """The allocation object."""
        return ALLOCATIONS.parse(self.allocation)

    @property
    def refiner(self) -> Refiner | None:
        """The refiner object, if a mask is to be improved."""
        return None if self.refine == "none" else REFINERS.parse(self.refine)

    @property
    def requires(self) -> Needs:
        extra = {self.allocator.needs, "nothing" if self.refiner is None else "calibration"}
        return "calibration" if "calibration" in extra else self.needs

    @property
    def exact_passes(self) -> bool:
        # N of every M leaves many near-ties, and nothing repairs a choice that rounding turned.
        return self.nm is not None

    def check(self, walk: Walk) -> None:
        nm = self.nm
        for site in walk.all_sites():
            if nm is not None and site.shape[1] % nm.m:
                raise BillhookError(
                    f"Pattern {nm} does not divide the {site.shape[1]} inputs of {site.name}: use an M that divides "
                    "every width, or an unstructured pattern."
                )

    def targets(self, walk: Walk) -> dict[str, float]:
        """Sparsity per site name; also tells the walk, for the report, and what a refiner needs gathered."""
        if self.refiner is not None:
            walk.companions = [self.refiner.statistic]
        walk.targets = walk.remembered("allocation", lambda: self.allocator.shares(walk, self.overall))
        return walk.targets

    def refined(self, block: Block, site: Site, keep: Tensor) -> Tensor:
        """The mask (bool [out, in]) after the refiner, for a site whose weight is still dense."""
        refiner = self.refiner
        if refiner is None:
            return keep
        return refiner.refine(site, keep, block.gathered(refiner.statistic, site), self.nm)

    def apply(self, block: Block, site: Site, keep: Tensor) -> None:
        """Zero the weights outside `keep` after it was refined, if that is asked for."""
        site.mask(self.refined(block, site, keep))


METHODS: Registry[Method] = Registry("method")
register = METHODS.register


def methods() -> dict[str, type[Method]]:
    """All methods by name."""
    return METHODS.known()


def method(name: str, /, **options: Any) -> Method:
    """Make a method by its name.

    Raises:
        BillhookError: no such method or option (names the nearest), or a value out of range.
    """
    return METHODS.make(name, **options)
