"""PruneNet beside its controls: spectra and perplexity at the same share of MLP neurons removed.

    python benchmarks/prunenet.py --wikitext DIR

DIR with WikiText-2 raw as `benchmarks/protocol.py` reads it. The policy learns once per seed, at 30% of the neurons of
every third block, and is applied at all shares. The distance of the spectra is taken from the pruned models' own
matrices, over all blocks. FASP leaves attention alone here, so that all remove the same neurons in number. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import protocol
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.walk import Walk
from billhook.sparsity.spectrum import kolmogorov_smirnov, singular_values

LEARN_AT = 0.3


class LearnOnce(bh.PruneNet):
    """PruneNet whose policy of a seed is learnt at the first share, and used at the others."""

    def learn(self, walk: Walk, counts: dict[int, int]) -> dict[str, float]:
        if self.draw not in _learnt:
            start = time.perf_counter()
            _learnt[self.draw] = super().learn(walk, counts)
            print(f"policy of seed {self.draw}: {time.perf_counter() - start:.0f} s", flush=True)
        return dict(_learnt[self.draw])


_learnt: dict[int, dict[str, float]] = {}


def gates(model: Any) -> list[torch.Tensor]:
    """The matrix whose rows are scored, of every block of a gated model."""
    return [block.get_submodule("mlp.gate_proj").weight.detach() for block in find_blocks(model, anatomy_of(model))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder of a gated language model, or demo")
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="of the MLP neurons removed")
    parser.add_argument("--judged", default="0.2", help="those of them with a perplexity, and with what reads text")
    parser.add_argument("--seeds", type=int, default=3, help="of the policy")
    parser.add_argument("--random", type=int, default=5, help="random selections")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, and of a calibration sequence")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences, for FASP and the refit")
    arguments = parser.parse_args()

    model, tokenizer = bh.load(arguments.model)
    windows = protocol.evaluation_tokens(tokenizer, arguments.wikitext, arguments.windows, arguments.length)
    tokens = protocol.calibration_tokens(tokenizer, arguments.wikitext, arguments.samples, arguments.length)
    batches = list(torch.split(tokens, 4))
    full = [singular_values(rows) for rows in gates(model)]
    print(f"dense: {protocol.perplexity(model, windows):.2f}", flush=True)
    block = find_blocks(model, anatomy_of(model))[0]
    neurons = sum(p.numel() for p in block.get_submodule("mlp").parameters()) / sum(
        p.numel() for p in block.parameters()
    )

    policy = {"learn_at": LEARN_AT, "episodes": arguments.episodes}
    skip: dict[str, Any] = {"attention": "skip"}
    selections: dict[str, list[tuple[type[bh.Method], dict[str, Any]]]] = {
        "random": [(bh.PruneNet, {"score": "random", "draw": seed}) for seed in range(arguments.random)],
        "largest norm": [(bh.PruneNet, {"score": "norm"})],
        "policy": [(LearnOnce, {**policy, "draw": seed}) for seed in range(arguments.seeds)],
        "policy, refit on text": [(LearnOnce, {**policy, "restore": True})],
        "random, refit on text": [(bh.PruneNet, {"score": "random", "restore": True})],
        "FASP without refit": [(bh.FASP, {**skip, "restore": False})],
        "FASP": [(bh.FASP, skip)],
    }
    shares, judged = ([float(s) for s in given.split(",")] for given in (arguments.shares, arguments.judged))
    found: dict[tuple[str, str, float], list[float]] = {}
    for name, runs in selections.items():
        for share, (kind, options) in itertools.product(shares, runs):
            method = kind(sparsity=share * neurons, **options)
            reads = method.requires == "calibration"
            if reads and share not in judged:
                continue
            pruned, _ = bh.load(arguments.model)
            bh.prune(pruned, method, batches if reads else [])
            spectra = [singular_values(rows) for rows in gates(pruned)]
            distances = [kolmogorov_smirnov(a, b) for a, b in zip(full, spectra, strict=True)]
            values = {"KS": sum(distances) / len(distances)}
            if share in judged:
                values["perplexity"] = protocol.perplexity(pruned, windows)
            for what, value in values.items():
                found.setdefault((name, what, share), []).append(value)
            print(f"{name} {share:g} {options}: {values}", flush=True)

    columns = [("KS", share, ".3f") for share in shares] + [("perplexity", share, ",.0f") for share in judged]
    print("\n| selection | " + " | ".join(f"{what}, {share:.0%}" for what, share, _ in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in selections:
        cells = []
        for what, share, form in columns:
            cell = found.get((name, what, share), [])
            text = [format(value, form) for value in (sum(cell) / max(len(cell), 1), *sorted(cell))]
            spread = f" ({text[1]} to {text[-1]})" if len(cell) > 1 else ""
            cells.append(text[0] + spread if cell else "–")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
