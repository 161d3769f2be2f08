"""A small network and its training, for tests of methods that own several runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from billhook.training import Stretch

STEPS = 50
RATE = 0.1


def net(seed: int = 0, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(8, 16), *norms, nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points labelled by a fixed random network."""
    generator = torch.Generator().manual_seed(99)
    first, second = torch.randn(8, 6, generator=generator), torch.randn(6, 4, generator=generator)
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return x, (torch.tanh(x @ first) @ second).argmax(1)


def batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return data(16, 1000 * seed + step)


def schedule(t: float) -> float:
    return 1.0 if t < 0.5 else 0.1


class Training:
    """A user's training function that remembers what it was asked for and did."""

    def __init__(self, momentum: float = 0.9, decay: float = 1e-3, steps: int = STEPS) -> None:
        self.momentum, self.decay, self.length = momentum, decay, steps
        self.stretches: list[Stretch] = []
        self.rates: list[list[float]] = []
        self.after_step: Callable[[nn.Module], None] = lambda model: None
        self.stop_at: int | None = None  # raise at the beginning of this call

    def __call__(self, model: nn.Module, stretch: Stretch) -> None:
        if len(self.stretches) == self.stop_at:
            raise KeyboardInterrupt
        self.stretches.append(stretch)
        self.rates.append([])
        total = round(stretch.length * self.length)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=self.momentum, weight_decay=self.decay)
        for step in range(*stretch.steps(total)):
            rate = RATE * (stretch.rate or schedule)(step / total)
            self.rates[-1].append(rate)
            optimizer.param_groups[0]["lr"] = rate
            x, y = batch(step, stretch.seed)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            self.after_step(model)


def accuracy(model: nn.Module) -> float:
    x, y = data(400, 12345)
    return float((model(x).argmax(1) == y).float().mean())
