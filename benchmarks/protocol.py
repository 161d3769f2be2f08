"""The laptop protocol: which tokens calibrate, which tokens judge, and how the perplexity is computed.

Nothing in this file imports billhook, so the perplexity can serve as a neutral judge of every tool's output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import os
import platform
import random
from pathlib import Path
from typing import Any

import torch

SAMPLES, LENGTH, SEED = 32, 512, 0
WINDOWS, WINDOW_LENGTH = 40, 1024


def rows(folder: str | Path, split: str) -> list[str]:
    """Rows of a raw split as the dataset hubs serve them: a blank line is "", others keep their newline."""
    folder = Path(folder)
    for suffix in (".gz", ".xz", ""):
        path = folder / f"wiki.{split}.raw{suffix}"
        if path.exists():
            break
    else:
        raise FileNotFoundError(f"no wiki.{split}.raw[.gz|.xz] in {folder}")
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
    with opener(path, "rt", encoding="utf8", newline="") as file:
        lines = file.read().split("\n")[:-1]
    return ["" if line == " " else line + "\n" for line in lines]


def stream(tokenizer: Any, folder: str | Path, split: str) -> torch.Tensor:
    """The whole split, joined by blank lines and tokenised once, as one vector of ids."""
    ids = tokenizer("\n\n".join(rows(folder, split)), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def calibration_tokens(
    tokenizer: Any,
    folder: str | Path,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = SEED,
) -> torch.Tensor:
    """Random windows of the train split (its stored head where the whole is absent), [samples, length]."""
    names = [path.name for path in Path(folder).iterdir()]
    split = "train" if any(name.startswith("wiki.train.raw") for name in names) else "train-head"
    tokens = stream(tokenizer, folder, split)
    draw = random.Random(seed)
    starts = [draw.randint(0, tokens.numel() - length - 1) for _ in range(samples)]
    return torch.stack([tokens[start : start + length] for start in starts])


def evaluation_tokens(
    tokenizer: Any,
    folder: str | Path,
    windows: int = WINDOWS,
    length: int = WINDOW_LENGTH,
) -> torch.Tensor:
    """The first non-overlapping windows of the test split, [windows, length]."""
    tokens = stream(tokenizer, folder, "test")
    if tokens.numel() < windows * length:
        raise ValueError(f"the test split has {tokens.numel()} tokens, {windows * length} are asked for")
    return tokens[: windows * length].view(windows, length)


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean next-token negative log-likelihood; one window at a time, log-softmax in fp32.

    Every window predicts its own tokens 2..length, so all windows weigh the same.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for window in tokens:
        ids = window.unsqueeze(0).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        picked = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])
        total -= picked.double().sum().item()
        count += picked.numel()
    model.train(training)
    return math.exp(total / count)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = (line.partition(":") for line in info.read_text().splitlines())
        cpu = next((value.strip() for key, _, value in fields if key.strip() == "model name"), cpu)
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def linear_sparsity(model: Any) -> float:
    """Share of exact zeros among the weights of all linear layers but the output head."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum((weight == 0).sum().item() for weight in weights) / sum(weight.numel() for weight in weights)


def main() -> None:
    """Two steps as processes of their own, so that a runner needs neither torch nor the model in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=["tokens", "perplexity", "machine"])
    parser.add_argument("--model", help="plain Hugging Face model folder")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; the model's own by default")
    parser.add_argument("--wikitext", help="folder with wiki.test.raw.gz and wiki.train*.raw.gz")
    parser.add_argument("--out", help="tokens: safetensors file to write the calibration ids to")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="tokens: how many sequences")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens: how long each is")
    parser.add_argument("--seed", type=int, default=SEED, help="tokens: which draw")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="perplexity: how many windows")
    parser.add_argument("--window-length", type=int, default=WINDOW_LENGTH, help="perplexity: how long each is")
    parser.add_argument("--trust-remote-code", action="store_true", help="perplexity: of models with code of their own")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    args = parser.parse_args()
    if args.step == "machine":
        print(json.dumps(machine()))
        return
    if not args.model or not args.wikitext:
        parser.error("--model and --wikitext are needed")

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    if args.step == "tokens":
        ids = calibration_tokens(tokenizer, args.wikitext, args.samples, args.length, args.seed)
        save_file({"input_ids": ids}, args.out)
        print(json.dumps({"samples": ids.shape[0], "length": ids.shape[1], "sum": int(ids.sum())}))
        return
    tokens = evaluation_tokens(tokenizer, args.wikitext, args.windows, args.window_length)
    trust = args.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=trust)
    result = {
        "perplexity": perplexity(model, tokens),
        "linear_sparsity": linear_sparsity(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "windows": tokens.shape[0],
        "window_length": tokens.shape[1],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
