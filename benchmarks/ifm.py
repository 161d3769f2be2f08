"""Iterative feature merging against dropping channels, at the same widths, without data or fine-tuning.

    python benchmarks/ifm.py --fashion-mnist DIR
    python benchmarks/ifm.py --cifar10 DIR --resnet resnet20.th

Fashion-MNIST as the IDX files of its authors (Debian: dataset-fashion-mnist). CIFAR-10 as tars of tiles, 10x10 images
each, image i of a split in class i % 10. ResNet: a checkpoint for CIFAR-10 with shortcuts without weights.
Prints Markdown tables: test accuracy in %, mean over seeds (± half the range). L1 drops the channels with the smallest
sum of |incoming weights| after norms are folded; random drops any. All keep the same number in every group.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from billhook.merging import merge_features
from billhook.surgery.batchnorm import fold_norms_, recalibrate_norms
from billhook.surgery.channels import channel_groups, keep_all_
from billhook.surgery.coupling import fetch

KEEP = (0.9, 0.75, 0.5, 0.3)
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--resnet", type=Path, help="checkpoint of ResNet-20, 32, 44 or 56")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=20000, help="training images of Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--nets", default="mlp,vgg")
    parser.add_argument("--keep", default=",".join(map(str, KEEP)))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    keep = [float(k) for k in arguments.keep.split(",")]
    if arguments.fashion_mnist:
        data = fashion_mnist(arguments.fashion_mnist)
        for name in arguments.nets.split(","):
            fashion(name, data, seeds, keep, arguments)
    if arguments.cifar10 and arguments.resnet:
        cifar(arguments, seeds, keep)


# The comparison

Way = Callable[[float, int], nn.Module]  # (fraction of the channels kept, seed) -> the smaller network
PAPER = {"form": "sum_mean", "distance": "running", "base": "running", "biases": False, "bn": "keep"}


def ways(model: nn.Module, example: Tensor) -> dict[str, Way]:
    folded = copy.deepcopy(model)
    fold_norms_(folded, example)

    def merge(**options: Any) -> Way:
        return lambda fraction, seed: merge_features(model, example=example, widths=fraction, **options)[0]

    return {
        "IFM": merge(),
        "IFM, the paper's code": merge(**PAPER),
        "IFM, centroid": merge(distance="centroid"),
        "L1-norm": lambda fraction, seed: dropped(folded, example, fraction, "L1-norm", seed),
        "random": lambda fraction, seed: dropped(folded, example, fraction, "random", seed),
    }


def dropped(folded: nn.Module, example: Tensor, fraction: float, by: str, seed: int) -> nn.Module:
    model = copy.deepcopy(folded)
    generator = torch.Generator().manual_seed(seed)
    choices = []
    for group in channel_groups(model, example):
        if group.fixed is None and group.producers and group.size > 1:
            weights = [slot for slot in group.producers if slot.tensor.endswith("weight")]
            score = sum(slot.rows(fetch(model, slot.tensor).data).abs().sum(1) for slot in weights)
            if by == "random":
                score = torch.rand(group.size, generator=generator)
            assert isinstance(score, Tensor)
            choices.append((group, score.topk(max(1, round(group.size * fraction))).indices))
    keep_all_(model, choices)
    return model


def print_table(title: str, runs: list[dict[str, list[float]]], dense: list[float], keep: Sequence[float]) -> None:
    print(f"\n{title}, 100%: {summary(dense)}\n")
    names = list(runs[0])
    print("| channels kept | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for k, fraction in enumerate(keep):
        cells = [summary([run[name][k] for run in runs]) for name in names]
        print(f"| {fraction:.0%} | " + " | ".join(cells) + " |", flush=True)


def print_betas(model: nn.Module, example: Tensor, accuracy: Callable[[nn.Module], float]) -> None:
    print("\n| beta | accuracy | parameters | channels left |")
    print("|---|---|---|---|")
    for beta in BETAS:
        merged, report = merge_features(model, example=example, beta=beta)
        left = "/".join(str(group.after) for group in report.groups.values())
        before, after = report.parameters
        print(f"| {beta:g} | {accuracy(merged):.1f} | {after / before:.1%} | {left} |", flush=True)


def summary(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.1f}" + (f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else "")


@torch.no_grad()
def measured(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


# Fashion-MNIST


def fashion(name: str, data: tuple[Tensor, ...], seeds: list[int], keep: list[float], arguments: Any) -> None:
    train, train_labels, test, test_labels = data
    test, test_labels = test[: arguments.test_images], test_labels[: arguments.test_images]
    if name == "mlp":
        train, test = (F.avg_pool2d(x, 2).flatten(1) for x in (train, test))
    runs, dense, start = [], [], time.perf_counter()
    for seed in seeds:
        torch.manual_seed(seed)
        model = mlp() if name == "mlp" else vgg()
        images = len(train) if name == "mlp" else arguments.images
        fit(model, train[:images], train_labels[:images], arguments.epochs, 1e-3 if name == "mlp" else 5e-4)

        def accuracy(net: nn.Module) -> float:
            return measured(net, test, test_labels)

        dense.append(accuracy(model))
        runs.append({way: [accuracy(make(k, seed)) for k in keep] for way, make in ways(model, test[:1]).items()})
    print_table(f"{name} on Fashion-MNIST, {len(seeds)} seeds", runs, dense, keep)
    print_betas(model, test[:1], accuracy)
    print(f"\n({time.perf_counter() - start:.0f} s)", flush=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for into, out, pool in ((1, 32, True), (32, 32, False), (32, 64, True), (64, 64, True)):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 10))


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, decay: float, batch: int = 128) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=decay)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def fashion_mnist(folder: Path) -> tuple[Tensor, ...]:
    result = []
    for split in ("train", "t10k"):
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
            images = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy()).long()
        result += [(images.float() / 255 - 0.286) / 0.353, labels]
    return tuple(result)


# CIFAR-10


class Block(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, out // into, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.pad = out // 4 if out > into else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        count = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(count)))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(count - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(count - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def cifar(arguments: Any, seeds: list[int], keep: list[float]) -> None:
    state = torch.load(arguments.resnet, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = sum(name.endswith("conv2.weight") for name in state)
    model = ResNet(2 * blocks + 2)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise SystemExit(f"{arguments.resnet} is not such a ResNet: {unexpected or missing}")
    model.eval()
    test, labels = cifar_images(arguments.cifar10 / "test.tar")
    train, _ = cifar_images(arguments.cifar10 / "train-0.tar", 10)
    test, labels = test[: arguments.test_images], labels[: arguments.test_images]

    def accuracy(net: nn.Module) -> float:
        return measured(net, test, labels)

    def counted(fraction: float, seed: int) -> nn.Module:
        merged, _ = merge_features(model, example=example, widths=fraction, bn="identity")
        recalibrate_norms(merged, train.split(250))
        return merged

    start, example = time.perf_counter(), test[:1]
    dense = accuracy(model)
    everything = {
        **ways(model, example),
        "IFM within blocks": lambda k, seed: merge_features(model, example=example, widths=k, exclude=["conv1"])[0],
        "IFM, norms counted on 1000 images": counted,
    }
    runs: list[dict[str, list[float]]] = []
    for seed in seeds:  # only random dropping has something to draw
        drawn = {way: everything[way] for way in everything if way == "random" or not runs}
        runs.append(
            {**(runs[0] if runs else {}), **{w: [accuracy(f(k, seed)) for k in keep] for w, f in drawn.items()}}
        )
    print_table(f"ResNet-{2 * blocks + 2} on CIFAR-10, {len(test)} test images", runs, [dense], keep)
    print_betas(model, example, accuracy)
    print(f"\n({time.perf_counter() - start:.0f} s)", flush=True)


def cifar_images(path: Path, tiles: int = 100) -> tuple[Tensor, Tensor]:
    from PIL import Image

    parts = []
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name)[:tiles]:
            file = tar.extractfile(member)
            assert file is not None
            tile = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
            parts.append(tile.reshape(10, 32, 10, 32, 3).swapaxes(1, 2).reshape(100, 32, 32, 3))
    images = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / deviation[:, None, None], torch.arange(len(images)) % 10


if __name__ == "__main__":
    main()
