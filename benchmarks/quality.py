"""The quality table: every method at every target on the laptop protocol, one command.

    python benchmarks/quality.py --model DIR --wikitext DIR --out quality.json

DIR with WikiText-2 raw as `benchmarks/protocol.py` reads it. Finished cells are kept in the JSON file, so a
stopped run goes on, and several runs may share it; benchmarks/results/quality.json has those of the documentation.
Prints the Markdown table that docs/benchmarks.md quotes: means over the seeds, ± half of their range.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import protocol

import billhook as bh
from billhook.compare import steps_of
from billhook.declared import split_outside
from billhook.models.files import write_atomically
from billhook.report.table import target_text
from billhook.run import Options, run_steps

METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or demo")
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--precision", default="auto", help="of the calibration passes: auto, highest, bf16")
    parser.add_argument("--seeds", default="0", help="calibration seeds, comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help="as in billhook compare: wanda(refine=dsnot), ...")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--samples", type=int, default=protocol.SAMPLES, help="calibration sequences")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    arguments = parser.parse_args()

    known: dict[str, Any] = {}
    looks: dict[int, dict[str, dict[str, float]]] = {}  # by calibration draw: what cells need not find anew
    _, tokenizer = bh.load(arguments.model, stream=True)
    windows = protocol.evaluation_tokens(tokenizer, arguments.wikitext)

    more = "" if arguments.samples == protocol.SAMPLES else f" {arguments.samples}"  # in the names of cells

    def key_of(method: str, target: str, seed: int) -> str:
        return f"{method} {target} {arguments.precision} {seed}{more}"

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
        return found

    def measure(key: str, **run: Any) -> None:
        known.update(read())
        if key in known:
            return
        model, _ = bh.load(arguments.model)
        seconds, sparsity, precision = 0.0, 0.0, ""
        if run:
            tokens = protocol.calibration_tokens(tokenizer, arguments.wikitext, arguments.samples, seed=run["seed"])
            start = time.perf_counter()
            steps = steps_of(run["method"], run["target"])
            options = Options(precision=arguments.precision, looks=looks.setdefault(run["seed"], {}))
            records, _ = run_steps(model, steps, list(tokens.split(arguments.batch)), None, options)
            seconds, sparsity = time.perf_counter() - start, records[-1].sparsity
            precision = records[0].precision
        value = bh.perplexity(model, windows)
        parameters = sum(p.numel() for p in model.parameters())
        cell = {"perplexity": value, "sparsity": sparsity, "parameters": parameters}
        known.update(read())
        known[key] = {**run, **cell, "precision": precision, "date": f"{datetime.date.today()}"}
        write_atomically(arguments.out, [json.dumps(dict(sorted(known.items())), indent=1).encode()])
        print(f"{key}: perplexity {value:.4f}, sparsity {sparsity:.4f}, {seconds:.0f} s", flush=True)

    methods, targets = split_outside(arguments.methods, ","), arguments.targets.split(",")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    measure("dense")
    for seed in seeds:
        for target in targets:
            for method in methods:
                if method in ("magnitude", "magnitude(scope=row)") and seed != seeds[0]:
                    continue  # reads no data
                if ":" in target and "allocation" in method:
                    continue  # N:M leaves no choice
                measure(key_of(method, target, seed), method=method, target=target, seed=seed)

    print(f"\nDense: {known['dense']['perplexity']:.2f}\n")
    print("| method | " + " | ".join(target_text(t) for t in targets) + " |")
    print("|---|" + "---|" * len(targets))
    for method in methods:
        cells = []
        for target in targets:
            values = [known[key]["perplexity"] for seed in seeds if (key := key_of(method, target, seed)) in known]
            if not values:
                cells.append("")
                continue
            mean = sum(values) / len(values)
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{mean:,.2f}{spread}")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
