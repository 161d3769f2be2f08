"""ECoFLaP's ratios by its authors' code and by ours, from the same gradients of the protocol's model and tokens.

    python benchmarks/official_ecoflap.py --code DIR --model DIR --wikitext DIR

DIR of the code is a checkout of github ylsung/ECoFLaP; its `LayerSparsity`, which works on any model, is run as it is
on the CPU. First-order scores depend on no random numbers, so scores and ratios can be compared number by number; of
the zeroth order the ratios are compared, both made from our scores. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import protocol
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, sites_of
from billhook.calibrate.sensitivity import first_order, shortened, task_loss, zeroth_order
from billhook.calibrate.walk import Walk
from billhook.sparsity.allocations import proportional_keep

SCORES = {"grad": "GradOnly", "grad_mag": "GradMagAbs", "grad_mag_sq": "GradMagSquare"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", required=True, type=Path, help="checkout")
    parser.add_argument("--model", required=True, help="plain Hugging Face folder, fp32")
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--cap", type=float, default=0.1)
    parser.add_argument("--zeroth", action="store_true", help="also the zeroth order, which takes minutes")
    args = parser.parse_args()
    sys.path.insert(0, str(args.code.resolve() / "UPop"))
    official: Any = importlib.import_module("pruners.layer_single_base_pruner").LayerSparsity

    model, tokenizer = bh.load(args.model)
    options = bh.ECoFLaP()
    tokens = protocol.calibration_tokens(tokenizer, args.wikitext)
    batches = shortened([tokens], options.samples, options.length, options.batch)
    sites = [site for block in sites_of(model, anatomy_of(model)) for site in block]
    group_of = {f"{site.name}.weight": str(site.block) for site in sites}
    sizes: dict[str, int] = {}
    for site in sites:
        sizes[str(site.block)] = sizes.get(str(site.block), 0) + site.numel

    def theirs(score: str) -> Any:
        def loss(model: Any, batch: torch.Tensor, cuda: bool) -> tuple[torch.Tensor, int]:
            return task_loss(model(input_ids=batch, use_cache=False), batch), len(batch)

        return official(
            model, batches, loss, options.samples, args.sparsity, args.sparsity + args.cap, f"{score}_sum",
            layer_to_group_mapping=group_of,
        )  # fmt: skip

    def ratios(totals: dict[str, float]) -> dict[str, float]:
        keep = proportional_keep(totals, sizes, args.sparsity, args.sparsity + args.cap)
        return {group: 1 - keep[group] / size for group, size in sizes.items()}

    def apart(one: dict[str, float], other: dict[str, float]) -> float:
        return max(abs(one[group] - other[group]) for group in one)

    result: dict[str, Any] = {"sparsity": args.sparsity}
    for ours, name in SCORES.items():
        with contextlib.redirect_stdout(io.StringIO()):
            run = theirs(name)
            by_layer = run.return_sparsity()
        scores = first_order(Walk(model, batches, precision="highest"), batches, ours)  # type: ignore[arg-type]
        totals: dict[str, float] = dict.fromkeys(sizes, 0.0)
        measured: dict[str, float] = dict.fromkeys(sizes, 0.0)
        for site in sites:
            totals[str(site.block)] += scores[site.name]
            measured[str(site.block)] += float(run.importance_measure[f"{site.name}.weight"].double().sum())
        result[ours] = {
            "largest_relative_difference_of_scores": max(abs(totals[g] / measured[g] - 1) for g in sizes),
            "largest_difference_of_ratios": apart(ratios(totals), {g: by_layer[k] for k, g in group_of.items()}),
            "ratios_from_to": [min(ratios(totals).values()), max(ratios(totals).values())],
        }
    if args.zeroth:
        scores = zeroth_order(Walk(model, batches, precision="highest"), batches)
        totals = {str(site.block): scores[site.name] for site in sites}
        goal = int(sum(sizes.values()) * (1 - args.sparsity))
        found = theirs("GradOnly").compute_the_sparsity_per_group(goal, totals, sizes, args.sparsity + args.cap)
        result["zo"] = {"largest_difference_of_ratios": apart(ratios(totals), found)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
