"""What a pruner adds to a training step, between its updates and at one, on ResNet-20 and on the demo model.

    python benchmarks/pruner_overhead.py --steps 12

Steps with and without a pruner take turns in one process; prints medians and their ratio. An update happens at every
third step, so that both kinds are seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import billhook as bh
from billhook.tasks import network


def resnet() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return network("resnet20"), lambda model: nn.functional.cross_entropy(model(x), y)


def demo() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    model, _ = bh.load("demo")
    ids = torch.randint(0, 40_000, (2, 256))
    return model, lambda m: m(input_ids=ids, labels=ids).loss


def step(model: nn.Module, optimizer: Any, loss: Any, pruner: Any) -> float:
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    if pruner is not None:
        pruner.step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each kind")
    parser.add_argument("--methods", default="gmp,granet,rigl")
    arguments = parser.parse_args()
    print("| network | method | step without | between updates | at an update |")
    print("|---|---|---|---|---|")
    for make in (resnet, demo):
        for name in arguments.methods.split(","):
            (plain, loss), (model, pruned_loss) = make(), make()
            optimizers = [torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9) for m in (plain, model)]
            total = 4 * arguments.steps
            method = bh.training.PRUNERS.make(name, sparsity=0.9, update_every=3, end=0.9)
            pruner = method.attach(model, optimizers[1], total)
            seconds: dict[str, list[float]] = {"without": [], "between": [], "update": []}
            for index in range(1, 3 * arguments.steps + 1):
                seconds["without"].append(step(plain, optimizers[0], loss, None))
                kind = "update" if method.due(index, total) else "between"
                seconds[kind].append(step(model, optimizers[1], pruned_loss, pruner))
            base, between, update = (statistics.median(values[1:]) for values in seconds.values())
            print(
                f"| {make.__name__} | {name} | {1000 * base:.0f} ms | +{between / base - 1:.1%} | "
                f"+{update / base - 1:.1%} |",
                flush=True,
            )
            pruner.detach()


if __name__ == "__main__":
    main()
