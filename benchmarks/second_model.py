"""Methods on models of LayerNorm, biases and full attention: an OPT and a GPT-2 of bytes, trained here on real text.

    python benchmarks/second_model.py --text FILE --work WORK

No package ships such a decoder, so each is trained first, in minutes, and kept in WORK. Sparse methods remove half of
the weights of the blocks, or two of four; structured ones a fifth of the blocks' parameters (of the hidden width:
methods that slice). Calibration windows come from the training part, perplexity per byte from the held-out last fifth
of FILE. Finished cells are kept in WORK/second_model.json, so a stopped run goes on. Prints the Markdown table that
docs/benchmarks.md quotes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

import billhook as bh
from billhook.declared import split_outside
from billhook.methods.base import METHODS
from billhook.tasks import Training, load_text, network

SPARSE = "magnitude,magnitude(scope=row),wanda,ria,sparsegpt,wanda(refine=dsnot),wanda(allocation=owl)"
STRUCTURED = (
    "fasp,fasp(sharing=influence),wanda-widths,magnitude-widths,random-widths,modegpt,slicegpt,dynamic-slicing,"
    "dotresize,dotresize(cost=l1,entropy=0.1),dotresize(merge=no),shortgpt"
)
COLUMNS = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}, "20% of parts": {"sparsity": 0.2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="plain text, also compressed")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=["opt", "gpt2"])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sparse", default=SPARSE)
    parser.add_argument("--structured", default=STRUCTURED)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "second_model.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    task = load_text(f"text:{arguments.text}", length=arguments.length)
    epochs = arguments.steps * task.batch / task.examples
    training = Training(task, epochs=epochs, lr=2e-3, clip=1.0)
    order = torch.randperm(task.examples, generator=torch.Generator().manual_seed(0))
    batches = list(task.train[order[: arguments.samples]].split(8))

    def keep(key: str, **value: Any) -> None:
        known[key] = value
        file.write_text(json.dumps(known, indent=1))
        print(key, {k: round(v, 3) for k, v in value.items()}, flush=True)

    for family in arguments.families:
        options = {"hidden": arguments.hidden, "layers": arguments.layers, "length": arguments.length}
        dense: Any = network(family, seed=0, **options)
        weights = arguments.work / f"{family}.safetensors"
        if weights.is_file():
            load_model(dense, str(weights))
        else:
            begin = time.perf_counter()
            training(dense)
            save_model(dense, str(weights))
            keep(f"{family} training", seconds=time.perf_counter() - begin)
        dense.eval()
        if f"{family} dense" not in known:
            keep(f"{family} dense", perplexity=training.measure(dense), parameters=size(dense))
        for column, wanted in COLUMNS.items():
            for name in split_outside(arguments.structured if column == "20% of parts" else arguments.sparse, ","):
                key = f"{family} {name} {column}"
                if key in known or (column == "2:4" and "owl" in name):
                    continue
                model, begin = copy.deepcopy(dense), time.perf_counter()
                bh.prune(model, METHODS.parse(name, **wanted), batches)
                seconds = time.perf_counter() - begin
                keep(key, perplexity=training.measure(model), parameters=size(model), seconds=seconds)

    for family in arguments.families:
        one = known[f"{family} dense"]
        print(f"\n{family}: dense {one['perplexity']:.3f} per byte, {one['parameters']:,} parameters\n")
        print("| sparse | 50% | 2:4 |\n|---|---|---|")
        for name in split_outside(arguments.sparse, ","):
            cells = [known.get(f"{family} {name} {column}") for column in ("50%", "2:4")]
            print(f"| `{name}` | " + " | ".join(f"{c['perplexity']:.3f}" if c else "" for c in cells) + " |")
        print("\n| structured, 20% | perplexity | parameters |\n|---|---|---|")
        for name in split_outside(arguments.structured, ","):
            cell = known.get(f"{family} {name} 20% of parts")
            if cell:
                print(f"| `{name}` | {cell['perplexity']:.3f} | {cell['parameters']:,} |")


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
