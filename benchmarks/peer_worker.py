"""One timed run of llm-compressor (the peer) on given calibration tokens; prints one JSON object.

Runs with a python of its own that has llmcompressor 0.14 (it pins another transformers than the project):

    PEER_PYTHON benchmarks/peer_worker.py --model DIR --tokens FILE.safetensors --method wanda --json

What is timed is `oneshot(...)` alone: the model and the tokenizer are loaded before, the model is saved
after. The settings, and why (each is meant to help the peer or to keep the work the same):

- The model is loaded in fp32 and handed over as an object, the processor too, so `oneshot` loads nothing.
- The data set is pre-tokenized (`input_ids`), so `oneshot` skips its own preprocessing. No attention mask, as
  all sequences are full and a mask of ones would only be carried along.
- `shuffle_calibration_samples=False`, `num_calibration_samples` and `max_seq_length` as the tokens are: the
  same tokens in the same order as the other tool gets. The default shuffles, which it advises against for
  batches.
- `batch_size` 1, its default. A trial on a CPU (16 x 512 tokens, Wanda) showed no gain from 8 or 16 in
  processor time, and more memory. `--batch-size` changes it.
- `pipeline` stays "independent", which runs the sequential pipeline for a single modifier. One decoder layer
  per subgraph and `propagate_error=True` (its defaults) do what the papers do: calibrate a layer, prune it,
  send the pruned layer's outputs on. `dampening_frac=0.01` and `block_size=128` are its defaults, too, and
  those of SparseGPT's own code.
- `ignore=["re:.*lm_head"]`, the form in its documentation. A plain "lm_head" does not match, because the
  modifier looks the name up with a dot appended: the head (and the embedding tied to it) would be pruned.
- No progress bars and no log; its warnings are collected and returned (a Hessian that cannot be inverted
  would be one).

It forces eager attention while it calibrates; that is its own doing and no argument switches it off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def peak_mib() -> float:
    """Highest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="plain Hugging Face model folder")
    parser.add_argument("--tokens", required=True, help="safetensors file with the calibration ids, input_ids")
    parser.add_argument("--method", required=True, choices=["wanda", "sparsegpt"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="unstructured or N:M, e.g. 2:4")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="folder for the pruned model, dense weights")
    parser.add_argument("--json", action="store_true", help="one compact line instead of indented JSON")
    args = parser.parse_args()
    # Its logger writes to standard output, which is to hold the JSON only.
    with contextlib.redirect_stdout(sys.stderr):
        result = run(args)
    print(json.dumps(result, indent=None if args.json else 2))


def run(args: argparse.Namespace) -> dict[str, object]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from loguru import logger
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    warned: set[str] = set()
    keep = logger.add(
        lambda message: warned.add(message.record["message"]),
        filter=lambda record: record["level"].name == "WARNING",
    )
    ids = load_file(args.tokens)["input_ids"]
    imported = peak_mib()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    loaded = peak_mib()

    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    structure = "0:0" if args.pattern == "unstructured" else args.pattern
    settings = {"sparsity": args.sparsity, "mask_structure": structure, "ignore": ["re:.*lm_head"]}
    if args.method == "wanda":
        modifier = WandaPruningModifier(**settings)
    else:
        modifier = SparseGPTModifier(**settings, dampening_frac=0.01, block_size=128)
    start = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=modifier,
        dataset=dataset,
        num_calibration_samples=ids.shape[0],
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        batch_size=args.batch_size,
    )
    seconds = time.perf_counter() - start
    peak = peak_mib()
    logger.remove(keep)

    if args.out:
        # The class's own save_pretrained: oneshot gives the instance one that writes its format and recipe.
        type(model).save_pretrained(model, args.out)
        tokenizer.save_pretrained(args.out)
    return {
        "tool": "llmcompressor",
        "version": version("llmcompressor"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "method": args.method,
        "pattern": args.pattern,
        "sparsity": args.sparsity,
        "samples": ids.shape[0],
        "length": ids.shape[1],
        "batch_size": args.batch_size,
        "threads": args.threads,
        "seconds": round(seconds, 3),
        "rss_imported_mib": round(imported, 1),
        "rss_loaded_mib": round(loaded, 1),
        "rss_peak_mib": round(peak, 1),
        "warnings": sorted(warned),
        "out": args.out,
    }


if __name__ == "__main__":
    main()
