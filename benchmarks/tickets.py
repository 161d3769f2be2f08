"""Lottery tickets beside their controls, and sparse soups beside IMP, on a small problem made here.

    python benchmarks/tickets.py tickets --seeds 3
    python benchmarks/tickets.py soups --seeds 3

The data are noisy, shifted and scaled pieces of ten smooth random curves, 40 samples long, in ten classes, with few of
them to train on, so that there is something to generalise. A test set chooses nothing. Prints Markdown tables; every
figure is a mean over seeds with its standard deviation.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import billhook as bh
from billhook.training import Stretch
from billhook.training.prunable import prunable

CLASSES, LENGTH, BATCH = 10, 40, 40


def curves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, 40] and classes [count]; equal curves for every seed."""
    fixed, draw = torch.Generator().manual_seed(2024), torch.Generator().manual_seed(seed)
    knots = torch.randn(CLASSES, 1, 12, generator=fixed)
    shapes = nn.functional.interpolate(knots, 200, mode="linear", align_corners=True)[:, 0]
    y = torch.randint(0, CLASSES, (count,), generator=draw)
    shift = torch.randint(0, 80, (count, 1), generator=draw)
    step = 2.0 + torch.rand(count, 1, generator=draw)
    x = shapes[y].gather(1, (shift + step * torch.arange(LENGTH)).long())
    height = 0.7 + 0.6 * torch.rand(count, 1, generator=draw)
    return x * height + 0.5 * torch.randn(count, LENGTH, generator=draw), y


TRAIN, VALID, TEST = curves(2000, 1), curves(1000, 2), curves(4000, 3)


def network(seed: int, norm: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, o in ((LENGTH, 100), (100, 100), (100, 100)):
        layers += [nn.Linear(i, o), *([nn.BatchNorm1d(o)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, CLASSES))


def kaiming(model: nn.Module) -> nn.Module:
    """For the tickets: torch's own, smaller draw lets few of the sparse controls train at all in so short a time."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def stepped(t: float) -> float:
    return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01


def training(steps: int) -> Callable[[nn.Module, Stretch], None]:
    def train(model: nn.Module, stretch: Stretch) -> None:
        total = round(stretch.length * steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        per_epoch = len(TRAIN[0]) // BATCH
        order = torch.empty(0)
        for step in range(*stretch.steps(total)):
            epoch, place = divmod(step, per_epoch)
            if place == 0 or not len(order):
                draw = torch.Generator().manual_seed(7919 * stretch.seed + epoch)
                order = torch.randperm(len(TRAIN[0]), generator=draw)
            rows = order[place * BATCH : (place + 1) * BATCH]
            optimizer.param_groups[0]["lr"] = 0.1 * (stretch.rate or stepped)(step / total)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(TRAIN[0][rows]), TRAIN[1][rows]).backward()
            optimizer.step()

    return train


def accuracy(x: Tensor, y: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: 100 * float((model(x).argmax(1) == y).float().mean())


test = accuracy(*TEST)


def mean(values: list[float], digits: int = 1) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def tickets(seeds: int, steps: int, levels: list[int]) -> None:
    found: dict[tuple[int, str], list[float]] = {}
    train = training(steps)
    for seed in range(seeds):
        for k in (0.0, 0.05):
            method = bh.IMPRewind(sparsity=1 - 0.6 ** max(levels), per_round=0.4, rewind_to=k, seed=seed)
            last = method.run(kaiming(network(seed, norm=False)), train, evaluate=test)
            for level in levels:
                record = last.levels[level]
                ticket = dataclasses.replace(last, masks=last.store.masks(record["part"], prunable(last.model)))
                row = {f"dense, k={k:.0%}": last.levels[0]["score"], f"ticket, k={k:.0%}": record["score"]}
                masks = {"ticket": ticket.masks}
                for kind in ("random", "random-global", "reinit"):
                    control = ticket.control(kind, train, evaluate=test, seed=seed, initialize=kaiming)
                    row[f"{kind}, k={k:.0%}"] = control.score
                    if kind == "random":
                        masks[kind] = control.masks
                for label, mask in masks.items() if level == max(levels) else ():
                    one = ticket.stability(train, evaluate=test, masks=mask)
                    row[f"L2 to pruning: {label}, k={k:.0%}"] = one.pruning.l2
                    row[f"angle to pruning: {label}, k={k:.0%}"] = one.pruning.angle
                    row[f"L2 to data order: {label}, k={k:.0%}"] = one.order.l2
                    row[f"barrier between data orders, points: {label}, k={k:.0%}"] = one.barrier.height
                for key, value in row.items():
                    found.setdefault((level, key), []).append(value)
                print(f"level {level} seed {seed} k={k}: {row}", flush=True)
    print("| | " + " | ".join(f"{0.6**level:.1%} left" for level in levels) + " |\n|---|" + "---|" * len(levels))
    for head in sorted({key for _, key in found}):
        cells = [mean(found[level, head], 2) if (level, head) in found else "" for level in levels]
        print(f"| {head} | " + " | ".join(cells) + " |")


def soups(seeds: int, steps: int, sparsities: list[float]) -> None:
    found: dict[tuple[float, str], list[float]] = {}
    for seed in range(seeds):
        train = training(steps)
        dense = network(seed, norm=True).train()
        train(dense, Stretch(seed=100 + seed))
        for sparsity in sparsities:
            options: dict[str, Any] = {"sparsity": sparsity, "phases": 2, "length": 0.33, "seed": 10 * seed}
            row: dict[str, float] = {"dense": test(dense.eval())}
            result = bh.SparseModelSoup(candidates=3, **options).run(copy.deepcopy(dense), train, evaluate=test)
            for part in result.report["parts"]:
                if "mean_candidate" in part:
                    row[f"{part['part']}: mean candidate"] = part["mean_candidate"]
                    row[f"{part['part']}: best candidate"] = part["best_candidate"]
                    row[f"{part['part']}: soup"] = part["score"]
            valid = accuracy(*VALID)
            chosen = bh.SparseModelSoup(candidates=3, merge="greedy", **options)
            row["phase-2: greedy soup"] = test(chosen.run(copy.deepcopy(dense), train, evaluate=valid).model.eval())
            for label, fold in (("IMP", 1), ("IMP 3x", 3)):
                imp = bh.IMP(fold=fold, **options).run(copy.deepcopy(dense), train, evaluate=test)
                for part in imp.report["parts"]:
                    if part["part"] in ("phase-1", "phase-2"):
                        row[f"{part['part']}: {label}"] = part["score"]
            for key, value in row.items():
                found.setdefault((sparsity, key), []).append(value)
            print(f"seed {seed} sparsity {sparsity}: {row}", flush=True)
    heads = sorted({key for _, key in found}, key=lambda key: (key != "dense", key))
    print("| | " + " | ".join(f"{s:.0%} removed" for s in sparsities) + " |\n|---|" + "---|" * len(sparsities))
    for head in heads:
        print(f"| {head} | " + " | ".join(mean(found[s, head], 2) for s in sparsities) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tickets", "soups"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a training")
    parser.add_argument("--levels", default="4,7", help="of tickets: rounds that remove 40 percent each")
    parser.add_argument("--sparsities", default="0.8,0.9", help="of soups")
    arguments = parser.parse_args()
    if arguments.what == "tickets":
        tickets(arguments.seeds, arguments.steps, [int(level) for level in arguments.levels.split(",")])
    else:
        soups(arguments.seeds, arguments.steps, [float(s) for s in arguments.sparsities.split(",")])


if __name__ == "__main__":
    main()
