"""Statistics of a site's input, gathered in one pass over the calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


class Statistic(ABC, Generic[R]):
    """Accumulates over tokens; sums across processes; then gives its result.

    The walk makes one per distinct input of a block (query, key and value share theirs), feeds it, and reduces
    `self.sums` across processes.
    """

    sums: list[Tensor]

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.device = device

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add tokens: x is [tokens, in], in the dtype of the activations."""

    @abstractmethod
    def result(self) -> R:
        """What the method reads, after all tokens of all processes were added."""


class ColumnNorm(Statistic[Tensor]):
    """ℓ2 norm of each input channel over all calibration tokens, float32 [in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.square_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.sums = [self.square_sum]

    def update(self, x: Tensor) -> None:
        x = x.float()
        self.square_sum += (x * x).sum(dim=0)

    def result(self) -> Tensor:
        return self.square_sum.sqrt()
