"""Consensus gates beside their controls: does the static network keep what the gated one knew?

    python benchmarks/consensus.py --data DIR [--network mlp|resnet] [--seeds 3] [--steps 2500]

DIR with Fashion-MNIST or MNIST in its four idx files, gzipped or not (Debian: dataset-fashion-mnist). Images are
averaged to 14x14. Half of the hidden channels (or neurons) of the residual blocks are to go; all arms see the same
batches for the same number of steps. Dynamic is the test accuracy with a gate's decision per image, static that of the
plain narrow network; undecided is the share of gates on which fewer than 98% of 4096 training images agree. Prints a
Markdown table, mean and range over seeds.
"""

from __future__ import annotations

import argparse
import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import billhook as bh

BATCH, INPUTS = 128, 4096


def idx(folder: Path, name: str) -> Tensor:
    """One file of the MNIST format."""
    path = next(p for p in (folder / f"{name}.gz", folder / name) if p.exists())
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).copy()).view(sizes)


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """[n, 1, 14, 14] in about unit scale, and labels."""
    x = F.avg_pool2d(idx(folder, f"{part}-images-idx3-ubyte").float()[:, None] / 255, 2)
    return (x - 0.286) / 0.32, idx(folder, f"{part}-labels-idx1-ubyte").long()


class MLPBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.one(x)))


class ConvBlock(nn.Module):
    def __init__(self, into: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = into == out and stride == 1
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


def network(kind: str, hidden: list[int]) -> nn.Module:
    """A residual MLP of four blocks, or a ResNet-8 of three, by the hidden widths of its blocks."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 64), *(MLPBlock(64, h) for h in hidden), nn.Linear(64, 10))
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    a, b, c = hidden
    blocks = ConvBlock(16, a, 16, 1), ConvBlock(16, b, 32, 2), ConvBlock(32, c, 64, 2)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def widths(kind: str, model: Any) -> list[int]:
    if kind == "mlp":
        return [block.one.out_features for block in model if isinstance(block, MLPBlock)]
    return [block.conv1.out_channels for block in model if isinstance(block, ConvBlock)]


def batches(x: Tensor, y: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        yield x[chosen], y[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return 100 * right / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--network", default="mlp", choices=("mlp", "resnet"))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--arms", default="", help="only these, separated by semicolons; all unless given")
    arguments = parser.parse_args()
    kind, steps = arguments.network, arguments.steps
    x, y = images(arguments.data, "train")
    test = images(arguments.data, "t10k")
    full = {"mlp": [96] * 4, "resnet": [16, 32, 64]}[kind]
    found: dict[str, list[dict[str, float]]] = {}

    def run(arm: str, seed: int, hidden: list[int], method: bh.ConsensusGates | None) -> list[int]:
        torch.manual_seed(seed)
        model = network(kind, hidden)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        gates = method.attach(model, optimizer, steps, x[:1]) if method else None
        row: dict[str, float] = {}
        start = time.perf_counter()
        model.train()
        for a, b in batches(x, y, steps, seed):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(a), b)
            (loss + gates.loss() if gates else loss).backward()
            optimizer.step()
            if gates:
                gates.step()
        row["seconds"] = time.perf_counter() - start
        if gates:
            if not gates.frozen:
                row["dynamic"] = accuracy(model, *test)
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:INPUTS]
            report = gates.consensus(x[chosen].split(512))
            row |= {"kept": report.share, "undecided": 100 * report.undecided, "agreement": report.mean}
            model = gates.finalize(force=True)
        row["static"] = accuracy(model, *test)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        found.setdefault(arm, []).append(row)
        print(f"{arm}, seed {seed}: {widths(kind, model)} { ({k: round(v, 3) for k, v in row.items()}) }", flush=True)
        return widths(kind, model)

    def gated(**options: Any) -> bh.ConsensusGates:
        return bh.ConsensusGates(keep=arguments.keep, inputs=INPUTS, **options)

    arms: dict[str, bh.ConsensusGates | None] = {
        "dense": None,
        "gates, lam_pol=0": gated(lam_pol=0, freeze=0),
        "gates": gated(freeze=0),
        "gates, last 15% frozen": gated(),
        # its logits move by the learning rate only, and hover together about the threshold
        "learned mask": gated(gate_input="none", bias=0.1, repair=True),
        "narrow from scratch": None,  # with the widths that the gates left
    }
    only = [a for a in arms if not arguments.arms or a in arguments.arms.split(";")]
    for seed in range(arguments.seeds):
        narrow = full
        for arm in only:
            left = run(arm, seed, narrow if arm == "narrow from scratch" else full, arms[arm])
            narrow = left if arm == "gates, last 15% frozen" else narrow

    columns = {"static": ".2f", "dynamic": ".2f", "kept": ".3f", "undecided": ".1f", "agreement": ".4f"}
    columns |= {"parameters": ",.0f", "seconds": ".0f"}
    print(f"\n| {kind} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for arm in only:
        cells = []
        for column, form in columns.items():
            values = [row[column] for row in found[arm] if column in row]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(set(values)) > 1 else ""
            cells.append(f"{sum(values) / len(values):{form}}{spread}" if values else "")
        print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
