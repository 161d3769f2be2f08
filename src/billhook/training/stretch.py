"""How a method that owns several training runs asks for one: by calling the user's own training function.

    def train(model, stretch):
        total = round(stretch.length * STEPS)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        for step in range(*stretch.steps(total)):
            optimizer.param_groups[0]["lr"] = LR * (stretch.rate or my_schedule)(step / total)
            x, y = batch(step, seed=stretch.seed)
            ...

    ticket = bh.IMPRewind(sparsity=0.95).run(model, train=train)

The function makes a fresh optimizer; absent weights stay absent without its help (`hold.held`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from billhook.errors import BillhookError


@dataclass(frozen=True)
class Stretch:
    """A part of a training.

    Attributes:
        start, stop: where it begins and ends, as fractions of the training. Learning rate and data order are those of
            that place: a stretch from 0.01 sees what an uninterrupted training sees after its first hundredth.
        length: steps of the training, as a multiple of the user's usual number.
        seed: of data order and augmentation. Equal seeds see equal batches at equal steps.
        rate: factor on the peak learning rate at a fraction of the training, instead of the user's own schedule.
    """

    start: float = 0.0
    stop: float = 1.0
    length: float = 1.0
    seed: int = 0
    rate: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.stop <= 1) or self.length <= 0:
            raise BillhookError(
                f"A stretch from {self.start:g} to {self.stop:g} of length {self.length:g} is not a part of a "
                "training: use 0 <= start <= stop <= 1 and a positive length."
            )

    def steps(self, total: int) -> tuple[int, int]:
        """The first step, and the one after the last, of a training of `total` steps."""
        return round(self.start * total), round(self.stop * total)


Train = Callable[[nn.Module, Stretch], None]
