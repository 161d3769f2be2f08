"""Statistics of a site's input, gathered in one pass over the calibration data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from billhook.calibrate import distributed

R = TypeVar("R")

_ROWS = 256  # tokens at a time: their copies in float32 then stay in the processor's cache


class Statistic(ABC, Generic[R]):
    """Accumulates over tokens; sums across processes; then gives its result.

    The walk makes one per distinct input of a block (query, key and value share theirs), feeds it, and reduces
    `self.sums` across processes.
    """

    per_sequence: ClassVar[bool] = False  # whether `update` gets [sequences, tokens, in]
    sums: list[Tensor]

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.device = device

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add tokens: x is [tokens, in], in the dtype of the activations ([sequences, tokens, in] if asked for)."""

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
        for rows in torch.split(x, _ROWS):
            rows = rows.float()
            self.square_sum += (rows * rows).sum(dim=0)  # vector_norm along this dimension is ten times slower

    def result(self) -> Tensor:
        return self.square_sum.sqrt()


class Products(Statistic[R]):
    """Σ x xᵀ over all calibration tokens, [in, in], on and below the diagonal; `whole` mirrors it.

    From some width on four strips are faster than one product: three eighths of the work are saved.
    """

    dtype: ClassVar[torch.dtype]
    wide: ClassVar[int]  # channels from which there are four

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.matrix = torch.zeros(width, width, dtype=self.dtype, device=device)
        self.sums = [self.matrix]
        self._strip = width if width < self.wide else -(-width // 4)

    def update(self, x: Tensor) -> None:
        x = x.to(self.dtype)
        for start in range(0, self.width, self._strip):
            strip = slice(start, start + self._strip)
            self.matrix[start:, strip].addmm_(x[:, start:].T, x[:, strip])

    def whole(self) -> Tensor:
        """The whole matrix."""
        for start in range(0, self.width, self._strip):
            strip = slice(start, start + self._strip)
            self.matrix[strip, start + self._strip :] = self.matrix[start + self._strip :, strip].T
        return self.matrix


class Covariance(Products[Tensor]):
    """Σ x xᵀ over all calibration tokens, uncentred and accumulated in float64, [in, in]: for eigenvectors."""

    dtype = torch.float64
    wide = 256

    def result(self) -> Tensor:
        return self.whole()


@dataclass(frozen=True)
class Total:
    """Sum of a site's input over all calibration tokens, float64 [in], and how many tokens they are."""

    sum: Tensor
    tokens: float


class TokenSum(Statistic[Total]):
    """Gathers `Total`: beside a Gram matrix, what the outputs of a layer with a bias are made of."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)
        self.sums = [self.total, self.count]

    def update(self, x: Tensor) -> None:
        self.total += x.float().sum(dim=0)
        self.count += len(x)

    def result(self) -> Total:
        return Total(self.total, float(self.count))


class Tokens(Statistic[Tensor]):
    """Some of the tokens themselves, float64 [up to 2048, in]: the first 256 of every batch until there are enough.

    Under several processes each fills rows of its own share of the places, so that the sum of all is their union.
    """

    places = 2048

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.rows = torch.zeros(self.places, width, dtype=torch.float64, device=device)
        self.filled = torch.zeros(self.places, dtype=torch.float64, device=device)
        self.sums = [self.rows, self.filled]
        self._next, self._step = distributed.rank(), distributed.world()

    def update(self, x: Tensor) -> None:
        free = range(self._next, self.places, self._step)
        places = list(free)[: min(256, len(x))]
        self.rows[places] = x[: len(places)].double()
        self.filled[places] = 1.0
        self._next += len(places) * self._step

    def result(self) -> Tensor:
        return self.rows[self.filled > 0]


@dataclass(frozen=True)
class Moments:
    """First and second moments of a site's input, per channel; float32 [in] each.

    Attributes:
        token_sum: Σ_t x_tj of a sequence, averaged over sequences.
        square_sum: Σ_t x²_tj of a sequence, averaged over sequences; its root ranks like the ℓ2 norm.
        within_variance: variance over the tokens of a sequence (biased), averaged with the sequences' lengths.
        length: tokens per sequence, on average.
    """

    token_sum: Tensor
    square_sum: Tensor
    within_variance: Tensor
    length: float


class SequenceMoments(Statistic[Moments]):
    """Gathers `Moments`. Sequences of routed experts, whose tokens arrive mixed, count as one per batch."""

    per_sequence = True

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, dtype=torch.float64, device=device)
        self.between = torch.zeros(width, dtype=torch.float64, device=device)  # Σ over sequences of T · mean²
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # sequences, tokens
        self.sums = [self.first, self.second, self.between, self.counts]

    def update(self, x: Tensor) -> None:
        tokens = x.shape[1]
        if tokens == 0:
            return
        x = x.float()
        sums = x.sum(dim=1).double()
        self.first += sums.sum(dim=0)
        self.second += x.square().sum(dim=1).double().sum(dim=0)
        self.between += sums.square().sum(dim=0) / tokens
        self.counts += torch.tensor([len(x), len(x) * tokens], dtype=torch.float64, device=x.device)

    def result(self) -> Moments:
        sequences, tokens = (max(1.0, float(count)) for count in self.counts)
        return Moments(
            token_sum=(self.first / sequences).float(),
            square_sum=(self.second / sequences).float(),
            within_variance=((self.second - self.between) / tokens).clamp_(min=0).float(),
            length=tokens / sequences,
        )
