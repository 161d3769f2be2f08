"""Where the time of a run goes: phases, matrix products against the machine's measured peak, and the floor.

    python benchmarks/where_time_goes.py --model DIR --wikitext DIR

The floor is two forward passes over the calibration data through the blocks, as the model itself computes them in
the same precision, without hooks, selection or files. Products are counted from shapes: the linear layers and the
two products of attention, once for the pass that collects (without the block's last projection, which that pass
skips except for its first batch) and once for the pass that goes on. SparseGPT's passes halt where others end, so it
has one, and the first batch's once more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import protocol
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, sites_of


def seconds_of(function: Any, repeat: int = 5) -> float:
    """Median wall seconds of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / seconds_of(lambda: a @ b)


def floor(model: torch.nn.Module, batches: list[torch.Tensor], precision: str) -> float:
    """Seconds of one pass of all batches through the blocks, after one batch to warm up."""
    base = model.model  # without the head, which calibration does not need
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        base(batches[0], use_cache=False)
        start = time.perf_counter()
        for batch in batches:
            base(batch, use_cache=False)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--precision", default="auto", choices=["auto", "highest", "bf16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model, tokenizer = bh.load(arguments.model)
    tokens = protocol.calibration_tokens(tokenizer, arguments.wikitext)
    batches = list(torch.split(tokens, 4))
    config: Any = model.config
    sites = [s for block in sites_of(model, anatomy_of(model)) for s in block]
    linear = 2 * tokens.numel() * sum(s.numel for s in sites)
    last = 2 * (tokens.numel() - batches[0].numel()) * sum(s.numel for s in sites if "down_proj" in s.name)
    # causal attention: half of the two T x T products
    length, samples, layers = tokens.shape[1], len(tokens), config.num_hidden_layers
    attention = samples * layers * 2 * length**2 * config.num_attention_heads * config.head_dim
    products = 2 * (linear + attention) - last
    inputs = {(s.block, s.projection.split(".")[-1]): s.shape[1] for s in sites}
    grams = sum(  # query, key and value share one, gate and up too
        2 * tokens.numel() * width**2
        for (_, name), width in inputs.items()
        if name in ("q_proj", "o_proj", "gate_proj", "down_proj")
    )
    result: dict[str, Any] = {}
    for name in arguments.methods.split(","):
        streamed, _ = bh.load(arguments.model, stream=True)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            method = bh.method(name, sparsity=arguments.sparsity)
            report = bh.prune(streamed, method, batches, out=Path(folder) / "out", precision=arguments.precision)
            total = time.perf_counter() - start
        phases = {
            phase: round(sum(b.seconds.get(phase, 0) for b in report.steps[0].blocks), 2)
            for phase in ("load", "collect", "solve", "propagate", "write")
        }
        used = "bf16" if report.precision == "bf16" else "fp32"
        if f"floor_seconds_{used}" not in result:  # only where it is used: without hardware for it bfloat16 is slow
            result[f"floor_seconds_{used}"] = round(2 * floor(model, batches, report.precision), 2)
            result[f"peak_gflops_{used}"] = round(peak(torch.bfloat16 if used == "bf16" else torch.float32) / 1e9)
        result[name] = {
            "precision": report.precision,
            "seconds": round(total, 2),
            "phases": phases,
            "over_floor": round(total / result[f"floor_seconds_{used}"], 2),
            # selection, factorisations, files left out; statistics are in
            "passes": round(2 * (phases["collect"] + phases["propagate"]) / result[f"floor_seconds_{used}"], 2),
        }
        if name in ("wanda", "sparsegpt"):
            flop = products if name == "wanda" else (linear + attention) * (1 + 1 / len(batches)) + grams
            ideal = flop / (result[f"peak_gflops_{used}"] * 1e9)
            result[name] |= {
                "products_gflop": round(flop / 1e9),
                "products_at_peak_seconds": round(ideal, 2),
                "share_of_peak": round(ideal / total, 3),
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
