"""What a method is: declared hyperparameters, a card, and a function of a walk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from billhook.calibrate.walk import Needs, Walk
from billhook.errors import BillhookError, nearest
from billhook.sparsity.allocations import allocate
from billhook.sparsity.patterns import NM, Pattern, Scope, Unstructured, parse_pattern


@dataclass(frozen=True)
class Paper:
    """Where a method is published."""

    title: str
    authors: str
    venue: str
    arxiv: str | None = None


class Method(BaseModel):
    """Base of all post-training methods.

    A subclass declares its hyperparameters as fields (type, default, range, a sentence), its card as class
    variables, and `prune`. Command-line options, recipes, validation and the card all derive from that.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper | None]
    needs: ClassVar[Needs] = "calibration"
    summary: ClassVar[str]  # what it does, one sentence
    when: ClassVar[str]  # when to use it, and when not

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise BillhookError(_sentence(error, type(self))) from None

    @abstractmethod
    def prune(self, walk: Walk) -> None:
        """Edit the weights of every block that the walk yields."""

    def check(self, walk: Walk) -> None:
        """Refuse what cannot work on this model, before any work is done."""

    def options(self) -> dict[str, Any]:
        """The hyperparameters as plain values."""
        return self.model_dump(mode="json")


class SparseMethod(Method):
    """A method that sets weights to zero: adds the sparsity, its pattern and its allocation."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Fraction of the weights removed; 0.5 unless given or implied by N:M."
    )
    pattern: str = Field("unstructured", description="unstructured, or N:M: N of every M consecutive inputs are kept.")
    scope: Scope = Field("row", description="Weights compete within an output row (row) or a whole matrix (layer).")
    allocation: str = Field("uniform", description="How sparsity is shared out over the matrices.")

    @model_validator(mode="after")
    def _reachable(self) -> SparseMethod:
        nm = parse_pattern(self.pattern)
        if nm is not None and self.sparsity is not None and abs(self.sparsity - nm.sparsity) > 1e-6:
            raise ValueError(
                f"sparsity {self.sparsity:g} is not reachable under pattern {nm}, which removes exactly "
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
        return 0.5 if self.sparsity is None else self.sparsity

    def check(self, walk: Walk) -> None:
        nm = self.nm
        for site in walk.all_sites():
            if nm is not None and site.shape[1] % nm.m:
                raise BillhookError(
                    f"Pattern {nm} does not divide the {site.shape[1]} inputs of {site.name}: use an M that divides "
                    "every width, or an unstructured pattern."
                )

    def targets(self, walk: Walk) -> dict[str, float]:
        """Sparsity per site name; also tells the walk, for the report."""
        walk.targets = allocate(self.allocation, walk, self.overall)
        return walk.targets


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Decorator: make a method known under the name that users type."""

    def add(cls: M) -> M:
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """All methods by name."""
    return dict(sorted(_METHODS.items()))


def method(name: str, /, **options: Any) -> Method:
    """Make a method by its name.

    Raises:
        BillhookError: no such method or option (names the nearest), or a value out of range.
    """
    if name not in _METHODS:
        raise BillhookError(f"No method {name!r}{nearest(name, _METHODS)}: there are {', '.join(methods())}.")
    return _METHODS[name](**options)


def _sentence(error: ValidationError, cls: type[Method]) -> str:
    """One sentence for the first thing that is wrong with a method's options."""
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    label = getattr(cls, "name", cls.__name__)
    if first["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        return f"Method {label} has no option {option!r}{nearest(option, known)}: it has {', '.join(known)}."
    message = str(first["msg"]).removeprefix("Value error, ")
    if not option:
        return f"Method {label}: {message}."
    return f"Method {label}: {option}={first['input']!r} is not possible: {message[0].lower()}{message[1:]}."
