"""PERP by its authors' layers and by ours: the same pruned model, tokens, optimizer and number of steps.

    python benchmarks/official_perp.py --code DIR --model DIR --wikitext DIR --adapter mask_lora --steps 48

DIR of the code is a checkout of github ZIB-IOL/PERP. Its `SelectivePEFT` chooses and wraps what is trained (biases,
norms, adapters on all matrices of the blocks) and merges it at the end; it needs peft, and `datasets`, which it
imports and is not asked for. Its runner hands that to the Trainer of Transformers on C4; here both sides take steps
of AdamW, without decay, at one rate that rises for a tenth of them and falls linearly, on sequences of WikiText-2
train, and norms of gradients are not cut off. The model is pruned by magnitude first. Adapters start from draws of
their own. Prints one JSON object; the perplexities are the protocol's, on the first windows.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import protocol
import torch
from transformers import get_linear_schedule_with_warmup

import billhook as bh

SEED = 100  # of the text to train on


def theirs(code: Path, model: Any, batches: list[torch.Tensor], args: argparse.Namespace) -> None:
    sys.path.insert(0, str(code.resolve()))
    with mock.patch.dict(sys.modules, {"datasets": mock.MagicMock()}):
        strategy_of = importlib.import_module("peft_methods").SelectivePEFT
    config = SimpleNamespace(
        peft_use_bias=True,
        peft_use_ln=True,
        peft_use_lm_head=False,
        peft_use_lora=True,
        lora_r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        lora_type=args.adapter,
    )
    strategy = strategy_of(model=model, runner=None, config=config, total_iterations=args.steps, is_reconstruct=False)
    strategy.select_peft_layers()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * args.steps), args.steps)
    for step in range(args.steps):
        ids = batches[step % len(batches)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
    strategy.at_train_end()


def ours(model: Any, batches: list[torch.Tensor], args: argparse.Namespace) -> None:
    options = {"rank": args.rank, "alpha": args.alpha, "training_steps": args.steps, "lr": args.lr}
    perp = bh.PERP(objective="global", adapter=args.adapter, adapter_lr=args.lr, draw=args.draw, **options)
    bh.prune(model, perp, batches, precision="highest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", required=True, type=Path, help="checkout")
    parser.add_argument("--model", required=True, help="plain Hugging Face folder, fp32")
    parser.add_argument("--wikitext", required=True, type=Path)
    parser.add_argument("--adapter", default="mask_lora", choices=["mask_lora", "scale_lora", "lora_prune"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=48, help="of one sequence each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--draw", type=int, default=0, help="of the adapters' start")
    parser.add_argument("--windows", type=int, default=10)
    args = parser.parse_args()
    dense, tokenizer = bh.load(args.model)
    windows = protocol.evaluation_tokens(tokenizer, args.wikitext, windows=args.windows)
    tokens = protocol.calibration_tokens(tokenizer, args.wikitext, samples=args.steps, seed=SEED)
    batches = list(tokens.split(1))
    bh.prune(dense, bh.Magnitude(sparsity=args.sparsity))
    result: dict[str, Any] = {"adapter": args.adapter, "steps": args.steps}
    result["pruned"] = protocol.perplexity(dense, windows)
    for side in ("ours", "theirs"):
        model = copy.deepcopy(dense)
        torch.manual_seed(args.draw)
        start = time.perf_counter()
        if side == "ours":
            ours(model, batches, args)
        else:
            theirs(args.code, model, batches, args)
        result[side] = {
            "seconds": time.perf_counter() - start,
            "perplexity": protocol.perplexity(model, windows),
            "zeros": protocol.linear_sparsity(model),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
