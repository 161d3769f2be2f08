"""iCBS on a vision transformer: accuracy at three densities beside magnitude and Wanda, without retraining.

    python benchmarks/icbs_vision.py --cifar DIR --work WORK

DIR holds CIFAR-10 as sparse_training.py reads it. A small ViT is trained first and kept in WORK. Masks are ranked per
row; calibration and iCBS's gradients see the same training images. Finished cells are kept in WORK/icbs_vision.json, so
a stopped run goes on. Prints the Markdown table that docs/benchmarks.md quotes: accuracy on the test images in %.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from sparse_training import cifar

import billhook as bh
from billhook.methods.base import METHODS
from billhook.tasks import Classification, Training, network

BATCH = 32  # images per calibration batch and step of iCBS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "icbs(budget=50 steps)", "icbs"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration images")
    parser.add_argument("--images", type=int, default=512, help="for calibration")
    parser.add_argument("--train-images", type=int, default=50_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "icbs_vision.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    images = cifar(arguments.cifar, arguments.train_images, arguments.test_images)
    training = Training(Classification(images), epochs=arguments.epochs, batch=64, lr=0.05, clip=1.0, weight_decay=1e-4)
    weights = arguments.work / "vit.safetensors"

    def fresh() -> Any:
        return network("vit", seed=0, hidden=128, layers=4, heads=4)

    if not weights.is_file():
        model = fresh()
        training(model)
        save_model(model, str(weights))

    def trained() -> Any:
        model = fresh()
        load_model(model, str(weights))
        return model

    def keep(key: str, **value: Any) -> None:
        known[key] = value
        file.write_text(json.dumps(known, indent=1))
        print(key, {k: round(v, 4) for k, v in value.items()}, flush=True)

    if "dense" not in known:
        keep("dense", accuracy=training.measure(trained()))
    for density in arguments.densities:
        for name in arguments.methods:
            for seed in arguments.seeds[: 1 if name == "magnitude" else None]:
                if f"{name} {density} {seed}" in known:
                    continue
                model, begin = trained(), time.perf_counter()
                method = METHODS.parse(name, sparsity=1 - density)
                chosen = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(seed))
                batches = [
                    {"pixel_values": images.train[part], "labels": images.train_labels[part]}
                    for part in chosen[: arguments.images].split(BATCH)
                ]
                report = bh.prune(model.inner, method, batches)
                keep(
                    f"{name} {density} {seed}",
                    accuracy=training.measure(model),
                    sparsity=report.steps[-1].sparsity,
                    seconds=time.perf_counter() - begin,
                )

    print(f"\nDense: {100 * known['dense']['accuracy']:.2f}\n")
    print("| method | " + " | ".join(f"{d:.0%} kept" for d in arguments.densities) + " |")
    print("|---|" + "---|" * len(arguments.densities))
    for name in arguments.methods:
        cells = []
        for density in arguments.densities:
            found = [known[k]["accuracy"] for s in arguments.seeds if (k := f"{name} {density} {s}") in known]
            spread = f" ± {100 * np.std(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{100 * np.mean(found):.2f}{spread}" if found else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
