"""What better masks and repair cost, as ratios against a named peer in the same run.

    python benchmarks/repair_cost.py dsnot   --model DIR --wikitext DIR     # time, against Wanda alone
    python benchmarks/repair_cost.py ecoflap --model DIR --wikitext DIR     # peak memory, against inference
    python benchmarks/repair_cost.py perp    --model DIR --wikitext DIR     # step time, against LoRA by PEFT
    python benchmarks/repair_cost.py icbs    --model DIR --wikitext DIR     # perplexity by time, in Wanda's times

Laptop protocol; DIR with the model in float32. Times want a quiet machine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from peer import HERE, call

SEQUENCES = 2  # per training step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dsnot", "ecoflap", "perp", "icbs"])
    parser.add_argument("--model", required=True, help="plain Hugging Face model folder, fp32")
    parser.add_argument("--wikitext", required=True, help="folder with the raw WikiText-2 files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--looks", type=int, nargs="+", default=[0, 10, 30, 100], help="icbs: after these many steps")
    parser.add_argument("--windows", type=int, default=40, help="icbs: of the perplexities")
    parser.add_argument("--plot", type=Path, help="icbs: where to draw the perplexity over the budget (svg, png)")
    parser.add_argument("--result", type=Path, help="icbs: what an earlier run printed, to draw it without a run")
    parser.add_argument("--child", choices=["inference", "ecoflap"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(memory(args)))
        return
    if args.result:
        drawn(json.loads(args.result.read_text()), args.plot)
        return
    measure = {"dsnot": dsnot, "ecoflap": ecoflap, "perp": perp, "icbs": icbs}[args.what]
    result = measure(args)
    print(json.dumps(result, indent=1))
    if args.plot:
        drawn(result, args.plot)


# -- DSnoT: the whole run with and without the refinement ---------------------------------------------------


def dsnot(args: argparse.Namespace) -> dict[str, Any]:
    """Processes that take turns, as in peer.py; this one imports no torch."""
    methods = ("wanda", "wanda(refine=dsnot)")
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as work:
        tokens = Path(work) / "tokens.safetensors"
        command = [sys.executable, str(HERE / "protocol.py"), "tokens", "--model", args.model]
        call([*command, "--wikitext", args.wikitext, "--out", str(tokens)])
        for turn in range(args.rounds):
            for method in methods if turn % 2 == 0 else methods[::-1]:
                command = [sys.executable, str(HERE / "ours_worker.py"), "--model", args.model, "--json"]
                command += ["--tokens", str(tokens), "--method", method, "--sparsity", str(args.sparsity)]
                seconds[method].append(call([*command, "--batch-size", "2"])["seconds"])
    middle = {method: median(values) for method, values in seconds.items()}
    return {"seconds": seconds, "ratio": middle[methods[1]] / middle[methods[0]]}


# -- ECoFLaP: peak memory of the importance, and of the forward passes alone -------------------------------


def ecoflap(args: argparse.Namespace) -> dict[str, Any]:
    peaks: dict[str, dict[str, float]] = {}
    for child in ("inference", "ecoflap"):
        command = [sys.executable, __file__, "ecoflap", "--model", args.model, "--wikitext", args.wikitext]
        peaks[child] = call([*command, "--child", child])
    return {
        **peaks,
        "ratio": peaks["ecoflap"]["peak_mib"] / peaks["inference"]["peak_mib"],
        "ratio_seconds": peaks["ecoflap"]["seconds"] / peaks["inference"]["seconds"],
    }


def memory(args: argparse.Namespace) -> dict[str, float]:
    import protocol
    import torch
    from ours_worker import peak_mib

    import billhook as bh
    from billhook.calibrate.sensitivity import shortened, task_loss, zeroth_order
    from billhook.calibrate.walk import Walk

    model, tokenizer = bh.load(args.model)
    tokens = protocol.calibration_tokens(tokenizer, args.wikitext)
    options = bh.ECoFLaP()
    batches = shortened([tokens], options.samples, options.length, options.batch)
    loaded, start = peak_mib(), time.perf_counter()
    if args.child == "ecoflap":
        zeroth_order(Walk(model, batches), batches)
    else:
        with torch.inference_mode():
            for batch in batches:
                task_loss(model(input_ids=batch, use_cache=False), batch)
    return {"loaded_mib": loaded, "peak_mib": peak_mib(), "seconds": time.perf_counter() - start}


# -- PERP: a step on the next token, and one of PEFT's LoRA on the dense model -----------------------------


def perp(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import protocol
    import torch

    import billhook as bh
    from billhook.anatomy import anatomy_of, sites_of
    from billhook.calibrate.sensitivity import task_loss
    from billhook.recover.adapters import attach
    from billhook.recover.groups import parameters_of
    from billhook.recover.train import Loop

    options = bh.PERP(objective="global")
    dense, tokenizer = bh.load(args.model)
    batches = protocol.calibration_tokens(tokenizer, args.wikitext).split(SEQUENCES)
    sparse, _ = bh.load(args.model)
    bh.prune(sparse, bh.Magnitude(sparsity=0.5))

    def loss_of(model: Any) -> Any:
        return lambda i: task_loss(model(input_ids=batches[i], use_cache=False), batches[i]).float()

    generator = torch.Generator().manual_seed(0)
    for sites in sites_of(sparse, anatomy_of(sparse)):
        for site in sites:
            attach(site.module, options.adapter, site.weight != 0, options.rank, options.alpha, generator)
    groups = parameters_of(sparse, options.chosen(sparse))
    ours = Loop(sparse, groups, options.rates, loss_of(sparse), 1000)

    wanted = peft.LoraConfig(r=options.rank, lora_alpha=int(options.alpha), target_modules="all-linear")
    theirs = peft.get_peft_model(dense, wanted)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=options.rates["adapters"])
    their_loss = loss_of(theirs)

    def step_ours(number: int) -> None:
        ours.run(until=number + 1)

    def step_theirs(number: int) -> None:
        optimizer.zero_grad()
        their_loss(number).backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"perp": [], "peft": []}
    for number in range(2 * args.rounds + 1):
        for name, step in (("perp", step_ours), ("peft", step_theirs)):
            start = time.perf_counter()
            step(number)
            seconds[name].append(time.perf_counter() - start)
    kept = {name: values[1:] for name, values in seconds.items()}  # the first warms up
    return {"seconds": kept, "ratio": median(kept["perp"]) / median(kept["peft"]), "peft": peft.__version__}


# -- iCBS: perplexity against time -------------------------------------------------------------------------


def icbs(args: argparse.Namespace) -> dict[str, Any]:
    import protocol

    import billhook as bh
    from billhook.methods import icbs as method

    model, tokenizer = bh.load(args.model)
    tokens = protocol.calibration_tokens(tokenizer, args.wikitext)
    windows = protocol.evaluation_tokens(tokenizer, args.wikitext, windows=args.windows)
    batches = list(tokens.split(2))
    start = time.perf_counter()
    looks: list[dict[str, Any]] = []

    class Watched(method.Search):
        """Keeps the best masks at the looks."""

        def judge(self, value: float) -> None:
            super().judge(value)
            if self.number in args.looks and self.number not in [look["steps"] for look in looks]:
                seconds = time.perf_counter() - start
                looks.append({"steps": self.number, "seconds": seconds, "held_out": self.best_value, "mask": self.best})

        def begin(self, *given: Any) -> None:
            super().begin(*given)
            self.judge(given[1])

    method.Search, kept = Watched, method.Search  # type: ignore[misc]
    try:
        bh.prune(model, bh.ICBS(sparsity=args.sparsity, budget=f"{max(args.looks)} steps"), batches)
    finally:
        method.Search = kept  # type: ignore[misc]
    dense, _ = bh.load(args.model)
    originals = dict(dense.named_parameters())
    for look in looks:
        for name, pruned in look.pop("mask").items():
            weight = model.get_submodule(name).weight.data
            weight.copy_(originals[f"{name}.weight"].data.masked_fill(pruned.view(weight.shape), 0.0))
        look["perplexity"] = protocol.perplexity(model, windows)
        print(json.dumps(look), file=sys.stderr, flush=True)

    again, _ = bh.load(args.model)
    start = time.perf_counter()
    bh.prune(again, bh.Wanda(sparsity=args.sparsity), batches)
    wanda = time.perf_counter() - start
    return {
        "sparsity": args.sparsity,
        "wanda_seconds": wanda,
        "looks": [look | {"in_wanda_times": look["seconds"] / wanda} for look in looks],
    }


def drawn(result: dict[str, Any], path: Path) -> None:
    """Perplexity over the steps; the first look is the starting mask, Wanda's."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "billhook"  # the same figures give the same file

    looks = result["looks"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([look["steps"] for look in looks], [look["perplexity"] for look in looks], marker="o", label="iCBS")
    axes.axhline(looks[0]["perplexity"], linestyle="--", color="gray", label="its start: Wanda")
    axes.set(
        xlabel="steps", ylabel="perplexity", title=f"{result['sparsity']:.0%} of the weights removed", ylim=(0, None)
    )
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
