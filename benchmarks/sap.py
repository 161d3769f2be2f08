"""SAP beside lottery tickets: accuracy and PQ index over remaining weights, on 8×8 digits.

    pip install scikit-learn matplotlib && python benchmarks/sap.py --plot pqi.svg

A ReLU MLP of 300 and 100 neurons without norms learns scikit-learn's digits: 800 to train on, 997 to test on, pixels
standardised, SGD with momentum, cosine learning rate. All methods go back to the initial weights. Prints Markdown:
every third level (remaining weights, accuracy, PQ index of the network), then accuracies at equal density, interpolated
between levels in the logarithm of the density.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import billhook as bh

BATCH, RATE, MOMENTUM, DECAY = 40, 0.1, 0.9, 5e-4
METHODS: dict[str, dict[str, Any]] = {
    "LT layer": {"fraction": 0.2},
    "LT neuron": {"fraction": 0.2, "scope": "neuron"},
    "SAP layer": {},
    "SAP neuron": {"scope": "neuron"},
    "SAP layer γ=3": {"gamma": 3.0},
    "SAP neuron γ=3": {"gamma": 3.0, "scope": "neuron"},
    "SAP global γ=3": {"gamma": 3.0, "scope": "global"},
    "SAP layer p=1 q=2": {"p": 1.0, "q": 2.0},
}
DENSITIES = (0.5, 0.25, 0.12, 0.06, 0.04)

Level = tuple[float, float, float]  # density, accuracy in %, PQ index


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    deviation = x[:800].std(dim=0)
    x = ((x - x[:800].mean(dim=0)) / deviation)[:, deviation > 0]
    return (x[:800], y[:800]), (x[800:], y[800:])


def mlp(inputs: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def trainer(x: Tensor, y: Tensor, steps: int) -> Callable[[nn.Module, bh.Stretch], None]:
    def train(model: nn.Module, stretch: bh.Stretch) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
        generator = torch.Generator().manual_seed(stretch.seed)
        for step in range(*stretch.steps(steps)):
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            chosen = torch.randint(len(x), (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return train


def run(options: dict[str, Any], seed: int, steps: int, iterations: int) -> tuple[list[Level], dict[str, Any]]:
    """The levels of one run, and the record of its last one."""
    (x, y), (test_x, test_y) = digits()

    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(test_x).argmax(dim=1) == test_y).float().mean())

    method = bh.SAP(iterations=iterations, seed=seed, **options)
    outcome = method.run(mlp(x.shape[1], seed), trainer(x, y, steps), evaluate=accuracy)
    parts = [part for part in outcome.report["parts"] if part["part"].startswith("level")]
    levels = [(1 - part["sparsity"], part["score"], part["inequality"]["network"]) for part in parts]
    densities = {name: float(mask.float().mean()) for name, mask in outcome.masks.items()}
    return levels, {"densities": densities, "inequality": parts[-1]["inequality"]["layers"]}


def at(levels: Sequence[Level], density: float) -> float | None:
    """Accuracy at a density, linear in its logarithm between two levels; None where it was not reached."""
    for (d0, a0, _), (d1, a1, _) in pairwise(levels):
        if d1 <= density <= d0 and d1 < d0:
            t = math.log(d0 / density) / math.log(d0 / d1)
            return a0 + t * (a1 - a0)
    return None


def plot(curves: dict[str, list[Level]], path: Path) -> None:
    """PQ index and accuracy over remaining weights (logarithmic), one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "billhook"  # the same figures give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7.5, 5.5), height_ratios=(2, 1))
    for name, levels in curves.items():
        density, accuracy, index = zip(*levels, strict=True)
        upper.plot(density, index, label=name)
        lower.plot(density, accuracy, label=name)
    upper.set(xscale="log", ylabel="PQ index of the trained weights", ylim=(0, None))
    upper.legend()
    lower.set(xlabel="remaining weights", ylabel="accuracy in %")
    lower.invert_xaxis()
    lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3%}".rstrip("0%").rstrip(".") + "%"))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--plot", type=Path, help="picture (.svg, .png) of PQ index and accuracy over density")
    arguments = parser.parse_args()

    found: dict[str, list[list[Level]]] = {}
    for name in arguments.methods:
        start = time.perf_counter()
        runs = [run(METHODS[name], seed, arguments.steps, arguments.iterations) for seed in range(arguments.seeds)]
        found[name] = [levels for levels, _ in runs]
        last = runs[0][1]
        layers = ", ".join(f"{d:.1%} (PQI {last['inequality'][n]:.3f})" for n, d in last["densities"].items())
        print(f"{name}: {time.perf_counter() - start:.0f} s; layers of seed 0 in the end: {layers}", flush=True)

    means: dict[str, list[Level]] = {}
    for name, seeds in found.items():
        shortest = min(map(len, seeds))  # a run ends by itself where no weight may go
        means[name] = [
            tuple(statistics.mean(values) for values in zip(*levels, strict=True))  # type: ignore[misc]
            for levels in zip(*(levels[:shortest] for levels in seeds), strict=True)
        ]
    print("\n| level | " + " | ".join(means) + " |\n|---|" + "---|" * len(means))
    for level in range(0, arguments.iterations + 1, 3):
        cells = [
            f"{levels[level][0]:.1%}, {levels[level][1]:.1f}, {levels[level][2]:.3f}" if level < len(levels) else "–"
            for levels in means.values()
        ]
        print(f"| {level} | " + " | ".join(cells) + " |")
    print("\n| remaining | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for density in DENSITIES:
        row = []
        for seeds in found.values():
            values = [value for levels in seeds if (value := at(levels, density)) is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.1f}{spread}" if len(values) == len(seeds) else "–")
        print(f"| {density:.0%} | " + " | ".join(row) + " |")
    if arguments.plot:
        plot(means, arguments.plot)


if __name__ == "__main__":
    main()
