"""Runs the authors' own code of Wanda, SparseGPT and DSnoT under the laptop protocol, for reference numbers.

Needs checkouts of github.com/locuslab/wanda, IST-DASLab/sparsegpt and zyxxmu/DSnoT; nothing of theirs is kept
here. Their drivers (`prune_wanda`, `prune_magnitude`, `llama_sequential`, `prune_DSnoT`), statistics, masks and
solver run unchanged. They were written for an older transformers and for CUDA, so this is bent from outside:

- `get_loaders` hands out the protocol's tokens, `model.seqlen` is their length, `model.hf_device_map` empty;
- every decoder layer gets rotary position embeddings for positions 0..length-1 (the drivers pass none) and
  returns a tuple again; causality needs no mask, as without one transformers' attention is causal;
- `Tensor.cuda`, `torch.cuda.synchronize` and `torch.cuda.empty_cache` do nothing.

Runs with the python of the project, which also has datasets (the wanda code imports it).

    python benchmarks/official_worker.py --wanda DIR --sparsegpt DIR --model DIR --wikitext DIR \
        --method wanda --pattern 2:4 --out DIR
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import protocol
import torch


def adapt(layer: torch.nn.Module, rotary: torch.nn.Module) -> None:
    """Makes a decoder layer of today's transformers answer the call of the old drivers."""
    forward = layer.forward

    def old_style(hidden: torch.Tensor, attention_mask: Any = None, **_: Any) -> tuple[torch.Tensor]:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        embeddings = rotary(hidden, position_ids=positions)
        out = forward(
            hidden,
            attention_mask=attention_mask,
            position_ids=positions,
            position_embeddings=embeddings,
            use_cache=False,
        )
        return (out[0] if isinstance(out, tuple) else out,)

    layer.forward = old_style  # type: ignore[method-assign]


@contextlib.contextmanager
def old_world(model: Any, length: int) -> Iterator[None]:
    """The surroundings the official drivers expect; everything is put back afterwards."""
    layers = list(model.model.layers)
    model.seqlen, model.hf_device_map = length, {}
    for layer in layers:
        adapt(layer, model.model.rotary_emb)
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "empty_cache"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            del model.seqlen, model.hf_device_map


def load(folder: str, name: str) -> Any:
    """Imports a module of a checkout (the checkouts are no packages, their roots have to be on the path)."""
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def prune(model: Any, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """Prunes in place with the official driver of the method."""
    n, m = (0, 0) if args.pattern == "unstructured" else map(int, args.pattern.split(":"))
    loader = [(row[None], None) for row in tokens]
    device = torch.device("cpu")
    if args.method == "sparsegpt":
        theirs = load(args.sparsegpt, "llama")
        # The defaults of their command line, but for the sparsity and the number of samples.
        theirs.args = argparse.Namespace(
            nsamples=len(loader),
            sparsity=0.0 if n else args.sparsity,
            prunen=n,
            prunem=m,
            percdamp=0.01,
            blocksize=128,
            wbits=16,
            minlayer=-1,
            maxlayer=1000,
            prune_only="",
            invert=False,
            true_sequential=False,
        )
        theirs.llama_sequential(model, loader, device)
        return
    theirs = load(args.dsnot if args.method == "dsnot" else args.wanda, "lib.prune")
    theirs.get_loaders = lambda *_, **__: (loader, None)
    options = argparse.Namespace(nsamples=len(loader), seed=0, sparsity_ratio=args.sparsity, use_variant=False)
    if args.method == "dsnot":  # the defaults of their command line, on Wanda's mask; cycles and modules as asked
        options = argparse.Namespace(
            **vars(options),
            initial_method="wanda",
            max_cycle_time=args.cycles,
            update_threshold=0.1,
            pow_of_var_regrowing=1,
            pow_of_var_pruning=1,
            skip_layer=args.skip_layer,
            skip_sub_layer="no_skip",
            without_same_sign=True,
            get_time_overhead=False,
            without_DSnoT=False,
        )
        theirs.prune_DSnoT(options, model, None, device, prune_n=n, prune_m=m)
        return
    driver = theirs.prune_wanda if args.method == "wanda" else theirs.prune_magnitude
    driver(options, model, None, device, prune_n=n, prune_m=m)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wanda", help="checkout of locuslab/wanda")
    parser.add_argument("--sparsegpt", help="checkout of IST-DASLab/sparsegpt")
    parser.add_argument("--dsnot", help="checkout of zyxxmu/DSnoT")
    parser.add_argument("--cycles", type=int, default=50, help="dsnot: swaps per row")
    parser.add_argument("--skip-layer", default="mlp", choices=["mlp", "no_skip"], help="dsnot: what keeps its mask")
    parser.add_argument("--model", required=True, help="plain Hugging Face folder of a Llama-like model")
    parser.add_argument("--wikitext", required=True, help="folder with the raw WikiText-2 files")
    parser.add_argument("--method", required=True, choices=["magnitude", "wanda", "sparsegpt", "dsnot"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="unstructured or N:M, e.g. 2:4")
    parser.add_argument("--samples", type=int, default=protocol.SAMPLES)
    parser.add_argument("--length", type=int, default=protocol.LENGTH)
    parser.add_argument("--windows", type=int, default=protocol.WINDOWS)
    parser.add_argument("--window-length", type=int, default=protocol.WINDOW_LENGTH)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--out", help="folder for the pruned model")
    args = parser.parse_args()
    needed = {"sparsegpt": args.sparsegpt, "dsnot": args.dsnot}.get(args.method, args.wanda)
    if not needed:
        parser.error(f"--method {args.method} needs its checkout")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokens = protocol.calibration_tokens(tokenizer, args.wikitext, args.samples, args.length)
    with torch.no_grad(), old_world(model, args.length):
        prune(model, tokens, args)
    result = {
        "tool": "official",
        "method": args.method,
        "pattern": args.pattern,
        "sparsity": args.sparsity,
        "samples": args.samples,
        "length": args.length,
        "linear_sparsity": protocol.linear_sparsity(model),
    }
    if args.out:
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        result["out"] = args.out
    evaluation = protocol.evaluation_tokens(tokenizer, args.wikitext, args.windows, args.window_length)
    result["perplexity"] = protocol.perplexity(model, evaluation)
    result["windows"] = args.windows
    print(json.dumps(result))


if __name__ == "__main__":
    main()
