"""Whether bfloat16 products in calibration cost quality: one method at both precisions on the same draws.

    python benchmarks/precision.py --model DIR --wikitext DIR --method wanda --target 2:4 --seeds 10,11,12 --out FILE

DIR with WikiText-2 raw as `benchmarks/protocol.py` reads it. Single draws scatter by percents, so what counts is the
mean of the ratios, with its standard error. Finished draws are kept in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import protocol

import billhook as bh
from billhook.compare import steps_of
from billhook.models.files import write_atomically
from billhook.run import Options, run_steps

PRECISIONS = ("bf16", "highest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or demo")
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--target", default="2:4")
    parser.add_argument("--seeds", default="10,11,12", help="calibration draws")
    parser.add_argument("--windows", type=int, default=14, help="that judge, of 1024 tokens")
    arguments = parser.parse_args()

    _, tokenizer = bh.load(arguments.model, stream=True)
    windows = protocol.evaluation_tokens(tokenizer, arguments.wikitext, arguments.windows)
    known: dict[str, float] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    ratios = []
    for seed in map(int, arguments.seeds.split(",")):
        tokens = protocol.calibration_tokens(tokenizer, arguments.wikitext, seed=seed)
        values = []
        for precision in PRECISIONS:
            key = f"{arguments.method} {arguments.target} {precision} {seed} {arguments.windows}"
            if key not in known:
                model, _ = bh.load(arguments.model)
                steps = steps_of(arguments.method, arguments.target)
                run_steps(model, steps, list(tokens.split(4)), None, Options(precision=precision))
                known[key] = bh.perplexity(model, windows)
                write_atomically(arguments.out, [json.dumps(known, indent=1).encode()])
            values.append(known[key])
        ratios.append(math.log(values[0] / values[1]))
        print(f"draw {seed}: bf16 {values[0]:.2f}, float32 {values[1]:.2f}, {values[0] / values[1]:.3f}", flush=True)
    mean, error = statistics.mean(ratios), 0.0
    if len(ratios) > 1:
        error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    print(f"{len(ratios)} draws: bf16 / float32 {math.exp(mean):.4f} ± {error:.4f} (standard error)")


if __name__ == "__main__":
    main()
