"""BiP beside its controls: a small classifier at extreme sparsity, all in the same number of steps.

    python benchmarks/bip.py

Needs scikit-learn, for its 8×8 digits. A ReLU network 64-300-100-10 is trained densely, then pruned by each method in
twice `--steps` steps of SGD at a cosine rate: so many gradients does BiP take for `--steps` steps of the weights.
HYDRA learns its mask in the first half and fine-tunes in the second. IMP rewinds to 5% of the dense training and
removes a fifth per round, each round as long as that training. Prints a Markdown table: test accuracy, mean and
standard deviation over the seeds (of split, network and batches), the mask's IoU with the magnitude mask, mean time.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import billhook as bh
from billhook.methods import OneShot
from billhook.training import Stretch
from billhook.training.bilevel import BiLevel

BATCH = 64
TRAIN = 1297  # of 1797

METHODS: dict[str, dict[str, Any]] = {
    "one-shot, retrained": {"method": OneShot},
    "HYDRA, before fine-tuning": {"method": bh.HYDRA, "stop": 0.5},
    "HYDRA, fine-tuned": {"method": bh.HYDRA},
    "BiP, no implicit term": {"method": bh.BiP, "implicit": 0.0},
    "BiP": {"method": bh.BiP},
    "IMP with rewinding": {"method": bh.IMPRewind, "rewind_to": 0.05},
}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(pixels).float()[order] / 16, torch.tensor(labels).long()[order]
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def network(norms: bool, he: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((64, 300), (300, 100)):
        layers += [nn.Linear(fan_in, fan_out), *([nn.BatchNorm1d(fan_out)] if norms else []), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    for module in model.modules() if he else ():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def batches(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH)[:-1]:
            yield x[chosen], y[chosen]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, method: Any, stop: float) -> Any:
    """SGD at a cosine rate, cut off after a fraction `stop`; the pruner, if there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    pruner = method.attach(model, optimizer, steps) if method else None
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, (images, labels) in zip(range(round(stop * steps)), batches(x, y, seed), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if pruner:
            pruner.step()
        rate.step()
    return pruner


def tickets(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, method: Any) -> Any:
    """IMP from a fresh network; every round is a dense training's length."""

    def train_part(model: nn.Module, stretch: Stretch) -> None:
        begin, end = stretch.steps(steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        for step, (images, labels) in zip(range(end), batches(x, y, stretch.seed), strict=False):
            if step < begin:
                continue
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return method.run(model, train_part)


def restore_norms(model: nn.Module, x: Tensor) -> None:
    """Running statistics of the final weights, over the whole training set."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(x)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def iou(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    both = sum(int((mask & second[name]).sum()) for name, mask in first.items())
    return both / sum(int((mask | second[name]).sum()) for name, mask in first.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the dense training, and of BiP's weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", default="0.03,0.02")
    parser.add_argument("--norms", action="store_true", help="a network with batch norms")
    parser.add_argument("--init", choices=("he", "default"), default="he", help="He's, or PyTorch's default")
    parser.add_argument("--rates", default="0.1", help="learning rates of the scores")
    parser.add_argument("--clips", default="1", help="score_clip, none for no bound")
    parser.add_argument("--only", default="", help="methods whose name contains this")
    arguments = parser.parse_args()

    dense = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        x, y, test_x, test_y = digits(seed)
        model = network(arguments.norms, arguments.init == "he")
        train(model, x, y, arguments.steps, seed, None, 1.0)
        dense.append(model)
    reached = [accuracy(model, *digits(seed)[2:]) for seed, model in enumerate(dense)]
    print(f"dense: {statistics.mean(reached):.1f} ± {statistics.stdev(reached):.1f}", flush=True)
    print("| keep | method | score rate | clip | accuracy | IoU | time |\n|---|---|---|---|---|---|---|")
    for keep in map(float, arguments.keep.split(",")):
        for label, options in METHODS.items():
            if arguments.only not in label:
                continue
            learns = issubclass(options["method"], BiLevel)
            for rate in arguments.rates.split(",") if learns else [""]:
                for clip in arguments.clips.split(",") if learns else [""]:
                    more = {k: v for k, v in options.items() if k not in ("method", "stop")}
                    if learns:
                        more |= {"mask_rate": float(rate), "score_clip": None if clip == "none" else float(clip)}
                    found, alike, seconds = [], [], []
                    for seed, start in enumerate(dense):
                        x, y, test_x, test_y = digits(seed)
                        model = copy.deepcopy(start)
                        method = options["method"](sparsity=1 - keep, **more)
                        first = OneShot(sparsity=1 - keep).attach(
                            twin := copy.deepcopy(start), torch.optim.SGD(twin.parameters(), lr=0.1), 1
                        )
                        begin = time.perf_counter()
                        if options["method"] is bh.IMPRewind:
                            torch.manual_seed(seed)
                            model = network(arguments.norms, arguments.init == "he")
                            pruner = tickets(model, x, y, arguments.steps, seed, method)
                        else:
                            length, stop = 2 * arguments.steps, options.get("stop", 1.0)
                            pruner = train(model, x, y, length, 100 + seed, method, stop)
                        seconds.append(time.perf_counter() - begin)
                        restore_norms(model, x)
                        found.append(accuracy(model, test_x, test_y))
                        alike.append(iou(first.masks, pruner.masks))
                    print(
                        f"| {keep:.0%} | {label} | {rate} | {clip} | {statistics.mean(found):.1f} ± "
                        f"{statistics.stdev(found):.1f} | {statistics.mean(alike):.2f} | "
                        f"{statistics.mean(seconds):.1f} s |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
