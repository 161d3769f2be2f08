"""What a network is trained to do: a loss on chosen examples, and a figure that says how well it does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn


class Task(ABC):
    """Data and a purpose; the loop that trains knows neither.

    Attributes:
        kind: what a recipe calls its data; also what networks of `tasks.networks` are made for.
        metric: name of what `measure` gives.
        higher: whether more of it is better.
        optimizer, lr, batch, weight_decay: what a recipe that says nothing of them gets.
        examples: of the training part; as many make an epoch.
        tests: what the test part holds, for the reader: "10,000 test images".
    """

    kind: ClassVar[str]
    metric: ClassVar[str]
    higher: ClassVar[bool] = True
    optimizer: ClassVar[str]
    lr: ClassVar[float]
    batch: ClassVar[int]
    weight_decay: ClassVar[float]
    examples: int
    tests: str

    @abstractmethod
    def loss(self, model: nn.Module, chosen: Tensor, draws: torch.Generator) -> Tensor:
        """Mean loss over the training examples of indices `chosen`, int64 [n]; `draws` gives what is random."""

    @abstractmethod
    def measure(self, model: nn.Module) -> float:
        """The metric on the test part. The model is in evaluation mode and no gradients are kept."""

    @abstractmethod
    def say(self, value: float) -> str:
        """A value of the metric for people: "accuracy 91.70%"."""


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
