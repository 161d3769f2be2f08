"""The sparse-training table: every method at every sparsity from one trained network, at equal budgets, one command.

    python benchmarks/sparse_training.py --cifar DIR --weights resnet20-12fca82f.th --out sparse_training.json

DIR holds CIFAR-10 as tiles (test.tar, train-0.tar, ...: lossless WebP of 10x10 images; image i has class i % 10).
Without --weights every run starts from a fresh network. Finished cells are kept in the JSON file, so a stopped run goes
on. Prints the Markdown table that docs/benchmarks.md quotes.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import billhook as bh
from billhook.declared import split_outside
from billhook.tasks import Classification, Images, Training, network
from billhook.training import PRUNERS
from billhook.training.runs import RUNS

METHODS = "one-shot,gmp,granet,bip,iss-p"


def tiles(path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` images of a tar of 320x320 tiles, uint8 [count, 32, 32, 3], and their classes."""
    images: list[np.ndarray] = []
    with tarfile.open(path) as tar:
        for name in sorted(tar.getnames()):
            if len(images) * 100 >= count or not name.endswith(".webp"):
                continue
            file = tar.extractfile(name)
            assert file is not None
            tile = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
            images.append(tile.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3))
    return torch.from_numpy(np.concatenate(images)[:count]), torch.arange(count) % 10


def cifar(folder: Path, train: int, test: int) -> Images:
    """CIFAR-10, normalised as the published networks expect it."""
    parts = [tiles(folder / f"train-{i}.tar", min(10_000, train - 10_000 * i)) for i in range(-(-train // 10_000))]
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    test_x, test_y = tiles(folder / "test.tar", test)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def normal(images: torch.Tensor) -> torch.Tensor:
        return ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()

    return Images(normal(x), y, normal(test_x), test_y)


def start(arguments: argparse.Namespace, seed: int) -> nn.Module:
    """The network that all methods start from."""
    model = network(arguments.network, seed=seed)
    if arguments.weights:
        state = torch.load(arguments.weights, map_location="cpu", weights_only=True)["state_dict"]
        missing = model.load_state_dict({k.removeprefix("module."): v for k, v in state.items()}, strict=False)
        assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys), missing
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument(
        "--weights", type=Path, help="a published CIFAR ResNet; without it training starts from nothing"
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--methods", default=METHODS, help="pruners, or methods that own several runs: granet(growth=random),..."
    )
    parser.add_argument("--sparsities", default="0.8,0.9,0.95,0.98")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--epochs", type=float, default=1.0, help="of every method's whole training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    arguments = parser.parse_args()

    known: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    images = cifar(arguments.cifar, arguments.train_images, arguments.test_images)
    training = Training(Classification(images), epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr)

    def keep(key: str, **value: Any) -> None:
        known[key] = value
        arguments.out.write_text(json.dumps(known, indent=1))
        print(key, {k: round(v, 4) for k, v in value.items()}, flush=True)

    if "dense" not in known:
        keep("dense", accuracy=training.measure(start(arguments, 0)))
    methods, sparsities = split_outside(arguments.methods, ","), arguments.sparsities.split(",")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed in seeds:
        for sparsity in sparsities:
            for name in methods:
                key = f"{name} {sparsity} {seed}"
                if key in known:
                    continue
                model, begin = start(arguments, seed), time.perf_counter()
                if name.split("(")[0] in RUNS.known():
                    RUNS.parse(name, sparsity=float(sparsity)).run(model, train=training)
                else:
                    training.prune(model, PRUNERS.parse(name, sparsity=float(sparsity), draw=seed), seed=seed)
                seconds = time.perf_counter() - begin
                weights = bh.training.prunable.prunable(model)
                absent = 1 - sum(int(w.count_nonzero()) for w in weights.values()) / sum(
                    w.numel() for w in weights.values()
                )
                keep(key, accuracy=training.measure(model), sparsity=absent, seconds=seconds)

    print(f"\nDense: {100 * known['dense']['accuracy']:.2f}\n")
    print("| method | " + " | ".join(f"{float(s):.0%}" for s in sparsities) + " |")
    print("|---|" + "---|" * len(sparsities))
    for name in methods:
        cells = []
        for sparsity in sparsities:
            values = [100 * known[k]["accuracy"] for s in seeds if (k := f"{name} {sparsity} {s}") in known]
            mean, spread = float(np.mean(values)), float(np.std(values))
            cells.append(f"{mean:.2f} ± {spread:.2f}" if len(values) > 1 else f"{mean:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
