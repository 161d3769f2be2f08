"""What a run measured: the one record that `billhook.json`, the report page and the tables are made from.

Every number in these classes was measured in the run that wrote them; a quantity that was not measured
is `None`, never an estimate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from billhook.errors import BillhookError

FILE = "billhook.json"


class _Record(BaseModel):
    # a perplexity may be infinite, and JSON has no word for that
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")


class SiteRecord(_Record):
    """One pruned weight matrix."""

    site: str  # full module name, e.g. "model.layers.0.self_attn.q_proj"
    block: int
    projection: str  # name inside the block, e.g. "self_attn.q_proj"
    shape: tuple[int, int]  # (out, in)
    asked: float  # sparsity asked for, fraction of weights removed
    sparsity: float  # sparsity reached, counted in the written weights
    error: float | None = None  # ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on sampled rows X of the site's calibration input


class BlockRecord(_Record):
    """One block of the walk."""

    index: int
    name: str
    seconds: dict[str, float] = Field(default_factory=dict)  # phase -> wall seconds
    error: float | None = None  # ‖y−ŷ‖² / ‖y‖² of the block's output, same input, first calibration batch
    peak_memory: int | None = None  # bytes, resident peak of the process so far

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


class StepRecord(_Record):
    """One step of a recipe: a method with its options, and what it did."""

    method: str
    options: dict[str, Any]
    precision: str = "highest"  # of the matrix products of its calibration passes
    blocks: list[BlockRecord] = Field(default_factory=list)
    sites: list[SiteRecord] = Field(default_factory=list)
    seconds: float = 0.0  # wall time of the step; of the last process only when the run was resumed
    notes: list[str] = Field(default_factory=list)  # what the user should know of how it went

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all weights of the pruned matrices."""
        total = sum(s.shape[0] * s.shape[1] for s in self.sites)
        zeros = sum(s.sparsity * s.shape[0] * s.shape[1] for s in self.sites)
        return zeros / total if total else 0.0


class Evaluation(_Record):
    """A perplexity and the protocol it was measured by."""

    perplexity: float
    data: str
    length: int  # tokens per window
    windows: int
    tokens: int  # predicted tokens
    dtype: str
    seconds: float


class Size(_Record):
    """What a folder of weights holds."""

    parameters: int
    nonzero: int
    bytes: int  # of the weight files on disk


class Calibration(_Record):
    """The calibration data of a run."""

    data: str
    samples: int
    length: int
    seed: int
    fingerprint: str


class Report(_Record):
    """Everything that is known of one run."""

    billhook: str
    status: str = "finished"
    model: str  # what the user typed
    family: str
    loader: str | None = None  # the Transformers class that loads the result, such as AutoModelForCausalLM
    recipe: list[dict[str, Any]]
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    precision: str = "highest"  # of the steps' calibration passes; "/" between different ones
    processes: int = 1
    storage: str = "dense"
    modelling: str | None = None  # the file beside the weights that says what the model computes, if it has its own
    fingerprint: str | None = None  # of recipe, model and data: the same command has the same one
    calibration: Calibration | None = None
    steps: list[StepRecord] = Field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    size_before: Size | None = None
    size_after: Size | None = None
    seconds: float = 0.0
    resumed: bool = False
    peak_memory: int | None = None  # bytes, from the operating system
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `billhook.json` into `folder`."""
        (folder / FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Report:
        """Read `billhook.json` from `folder`.

        Raises:
            BillhookError: it is missing or unreadable.
        """
        try:
            return Report.model_validate(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise BillhookError(f"{folder} has no {FILE}: it was not written by billhook.") from None
        except ValueError as error:
            raise BillhookError(f"{folder / FILE} cannot be read: {error}") from None
