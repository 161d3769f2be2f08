"""Sparse training of a super-resolution network from nothing: PSNR by method and sparsity at equal steps, one command.

    python benchmarks/super_resolution.py --data DIR --out super_resolution.json

DIR holds t91.tar (training photographs) and set5.tar, set14.tar (HR/*.png in each, to test on); the small pictures are
made by an antialiased bicubic filter. Every run starts from the same fresh EDSR and has the same steps and learning
rates: constant for a third, then a cosine. The first and the last convolution stay dense in all of them; each other
layer is to reach the sparsity. Finished cells are kept in the JSON file, so a stopped run goes on. Prints the Markdown
table that docs/benchmarks.md quotes.
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

from billhook.declared import split_outside
from billhook.tasks import Enlarging, Photos, Training, network
from billhook.training import PRUNERS, Stretch

METHODS = "static(distribution=uniform),gmp(scope=layer),iss-p(shrink=1),iss-p(shrink=0),iss-p"
NAMES = {
    "static(distribution=uniform)": "random mask",
    "gmp(scope=layer)": "gradual magnitude",
    "iss-p(shrink=1)": "one-shot magnitude",
    "iss-p(shrink=0)": "iterative hard thresholding",
    "iss-p": "ISS-P",
}


def photographs(path: Path, folder: str = "") -> list[torch.Tensor]:
    """The images of a tar, or of a folder in it: uint8 [3, height, width] each."""
    found = []
    with tarfile.open(path) as tar:
        for name in sorted(tar.getnames()):
            if name.startswith(folder) and name.endswith((".png", ".webp")):
                file = tar.extractfile(name)
                assert file is not None
                pixels = np.array(Image.open(io.BytesIO(file.read())).convert("RGB"))
                found.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return found


class Bicubic(torch.nn.Module):
    """What costs nothing: the filter of the papers (a = -0.5)."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = [int(n * self.scale) for n in x.shape[2:]]
        return torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--sparsities", default="0.9,0.95")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--features", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--patch", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()

    train = photographs(arguments.data / "t91.tar")
    sets = {name: photographs(arguments.data / f"{name}.tar", "HR/") for name in ("set5", "set14")}

    def task(test: str) -> Enlarging:
        return Enlarging(Photos(train, sets[test]), arguments.scale, arguments.patch)

    tests = {name: task(name) for name in sets}
    epochs = arguments.steps * arguments.batch / tests["set5"].examples
    training = Training(tests["set5"], epochs=epochs, batch=arguments.batch, lr=arguments.lr, warmup=0, hold=1 / 3)
    known: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}

    def keep(key: str, model: torch.nn.Module, **more: float) -> None:
        model.eval()
        with torch.no_grad():
            known[key] = {name: test.measure(model) for name, test in tests.items()} | more
        arguments.out.write_text(json.dumps(known, indent=1))
        print(key, {k: round(v, 3) for k, v in known[key].items()}, flush=True)

    def fresh(seed: int) -> torch.nn.Module:
        return network("edsr", seed=seed, scale=arguments.scale, features=arguments.features, blocks=arguments.blocks)

    if "bicubic" not in known:
        keep("bicubic", Bicubic(arguments.scale))
    methods, sparsities = split_outside(arguments.methods, ","), arguments.sparsities.split(",")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed in seeds:
        if f"dense {seed}" not in known:
            model, begin = fresh(seed), time.perf_counter()
            training.run(model, Stretch(seed=seed))
            keep(f"dense {seed}", model, seconds=time.perf_counter() - begin)
        for sparsity in sparsities:
            for name in methods:
                key = f"{name} {sparsity} {seed}"
                if key in known:
                    continue
                model, begin = fresh(seed), time.perf_counter()
                ends = ["head.weight", f"tail.{len(model.tail) - 1}.weight"]  # type: ignore[arg-type]
                method = PRUNERS.parse(name, sparsity=float(sparsity), exclude=ends, draw=seed)
                pruner = training.prune(model, method, seed=seed)
                keep(key, model, sparsity=pruner.sparsity, seconds=time.perf_counter() - begin)

    def cell(prefix: str, test: str) -> str:
        values = [known[k][test] for s in seeds if (k := f"{prefix} {s}") in known]
        spread = f" ± {np.std(values):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}" if values else ""

    print("\n| | " + " | ".join(f"{name} {float(s):.0%}" for s in sparsities for name in sets) + " |")
    print("|---|" + "---|" * (len(sparsities) * len(sets)))
    print("| bicubic | " + " | ".join(f"{known['bicubic'][t]:.2f}" for _ in sparsities for t in sets) + " |")
    print("| dense | " + " | ".join(cell("dense", t) for _ in sparsities for t in sets) + " |")
    for name in methods:
        cells = [cell(f"{name} {s}", t) for s in sparsities for t in sets]
        print(f"| {NAMES.get(name, name)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
