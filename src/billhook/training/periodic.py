"""What pruners share that change the mask every so many steps."""

from __future__ import annotations

from pydantic import Field, model_validator

from billhook.errors import BillhookError
from billhook.training.pruner import Pruner, SparseTraining
from billhook.training.schedules import cubic


class Periodic(SparseTraining):
    """Changes the mask every `update_every` steps between two points of the training."""

    update_every: int | None = Field(
        None, ge=1, description="Steps between changes of the mask; a hundredth of the training unless given."
    )
    start: float = Field(0.0, ge=0, lt=1, description="Where changes begin, as a fraction of the training.")
    end: float = Field(0.75, gt=0, le=1, description="Where changes end, as a fraction of the training.")

    @model_validator(mode="after")
    def _forward(self) -> Periodic:
        if self.start >= self.end:
            raise ValueError(f"start={self.start:g} is not before end={self.end:g}")
        return self

    def interval(self, total_steps: int) -> int:
        """Steps between two changes."""
        return self.update_every or max(1, total_steps // 100)

    def span(self, total_steps: int) -> tuple[int, int]:
        """The steps of the beginning and of the last change, multiples of the interval.

        Raises:
            BillhookError: no change fits between them.
        """
        interval = self.interval(total_steps)
        first = int(self.start * total_steps) // interval * interval
        last = int(round(self.end * total_steps, 6)) // interval * interval
        if last <= first:
            raise BillhookError(
                f"A change of the mask every {interval} steps does not fit between {self.start:.0%} and {self.end:.0%} "
                f"of {total_steps} steps: lower update_every, or move start and end apart."
            )
        return first, last

    def begin(self, pruner: Pruner) -> None:
        self.span(pruner.total_steps)

    def due(self, step: int, total_steps: int) -> bool:
        first, last = self.span(total_steps)
        return step % self.interval(total_steps) == 0 and first < step <= last


class Gradual(Periodic):
    """Raises the sparsity along a cubic curve between `start` and `end`."""

    end: float = Field(0.5, gt=0, le=1, description="Where the last weight is removed, as a fraction of the training.")
    initial_sparsity: float = Field(0.0, ge=0, lt=1, description="Sparsity at the start.")

    @model_validator(mode="after")
    def _rising(self) -> Gradual:
        if self.initial_sparsity > self.sparsity:
            raise ValueError(f"initial_sparsity={self.initial_sparsity:g} is above sparsity={self.sparsity:g}")
        return self

    def sparsity_at(self, step: int, total_steps: int) -> float:
        """The sparsity after this step."""
        return cubic(step, *self.span(total_steps), self.initial_sparsity, self.sparsity)
