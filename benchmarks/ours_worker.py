"""One timed run of billhook on given calibration tokens; prints one JSON object, the form of peer_worker.py.

    python benchmarks/ours_worker.py --model DIR --tokens FILE.safetensors --method wanda --out DIR --json

What is timed is `prune(...)` alone. As the model is streamed, that includes reading every weight from disk
and writing the pruned folder, which the peer's timed part does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("TQDM_DISABLE", "1")
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
    parser.add_argument("--method", required=True, help="as in billhook compare: wanda, fasp(uniform=true)+perp, ...")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="unstructured or N:M, e.g. 2:4")
    parser.add_argument("--repair", action="store_true", help="the method repairs a pruned model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="folder for the pruned model; a temporary one by default")
    parser.add_argument("--json", action="store_true", help="one compact line instead of indented JSON")
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as spare:
        result = run(args, args.out or os.path.join(spare, "out"))
    print(json.dumps(result, indent=None if args.json else 2))


def run(args: argparse.Namespace, out: str) -> dict[str, object]:
    import torch
    import transformers
    from safetensors.torch import load_file

    import billhook as bh
    from billhook.compare import steps_of
    from billhook.methods.base import METHODS

    torch.set_num_threads(args.threads)
    ids = load_file(args.tokens)["input_ids"]
    batches = list(ids.split(args.batch_size))
    imported = peak_mib()
    model, _ = bh.load(args.model, stream=True)
    loaded = peak_mib()

    if args.repair:
        steps = [METHODS.parse(args.method)]
    else:
        steps = steps_of(args.method, str(args.sparsity) if args.pattern == "unstructured" else args.pattern)
    start = time.perf_counter()
    bh.prune(model, steps, batches, out=out)
    seconds = time.perf_counter() - start
    peak = peak_mib()
    try:
        release = version("billhook")
    except PackageNotFoundError:
        release = str(getattr(bh, "__version__", "unknown"))
    return {
        "tool": "billhook",
        "version": release,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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
        "warnings": [],
        "out": args.out,
    }


if __name__ == "__main__":
    main()
