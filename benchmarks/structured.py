"""Structured methods side by side: perplexity, parameters, bytes, time, memory and, apart from it, speed.

    python benchmarks/structured.py quality --model DIR --wikitext DIR --work WORK
    python benchmarks/structured.py speed --model DIR --work WORK
    python benchmarks/structured.py table --work WORK

Laptop protocol. `quality` removes each ratio of the blocks' parameters by each method (of the hidden width: methods
that slice), in a process of its own whose peak memory the operating system counts, and judges what came out with
plain Transformers, by protocol.py, which does not know billhook. With --recover each result is then trained for a
short while, all for as many steps on the same text, none of which calibrated. `speed` is for a quiet machine: it
measures the folders that `quality` left in WORK against the dense model, in PyTorch and, where the format can say the
widths, in llama.cpp. Everything measured is in WORK/structured.json at once, so a stopped run goes on; `table` prints
it as Markdown.

This process imports neither torch nor billhook: see peer.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer import HERE, call

METHODS = (
    "fasp",
    "fasp(sharing=influence)",
    "modegpt",
    "slicegpt",
    "dynamic-slicing",
    "dotresize",
    "shortgpt",
    "wanda-widths",
    "magnitude-widths",
    "random-widths",
)
RATIOS = ("0.1", "0.2", "0.25", "0.3")
BILLHOOK = [sys.executable, "-m", "billhook"]
RECOVERY_SEED = 100  # of the text that recovery trains on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["quality", "speed", "table"])
    parser.add_argument("--model", help="plain Hugging Face model folder, fp32")
    parser.add_argument("--wikitext", help="folder with the raw WikiText-2 files")
    parser.add_argument("--work", required=True, type=Path, help="folder for the results and the pruned models")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as in billhook compare")
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--seed", type=int, default=0, help="calibration draw")
    parser.add_argument("--recover", action="store_true", help="quality: also after a short recovery")
    parser.add_argument("--recover-steps", type=int, default=64, help="optimizer steps of two sequences each")
    parser.add_argument("--windows", type=int, default=0, help="evaluation windows, for trials; 0: protocol")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="speed: of the weights in PyTorch")
    parser.add_argument("--repeats", type=int, default=3, help="speed: rounds")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = Results(args.work / "structured.json")
    if args.stage == "quality":
        quality(args, results)
    elif args.stage == "speed":
        speed(args, results)
    print(table(args, results))


class Results(dict[str, Any]):
    """Measurements by name, in a file as soon as they are made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(json.loads(path.read_text()) if path.is_file() else {})

    def keep(self, key: str, value: dict[str, Any]) -> None:
        self[key] = value
        self.path.write_text(json.dumps(self, indent=1) + "\n", encoding="utf8")
        print(key, json.dumps(value), file=sys.stderr, flush=True)


def folder_of(args: argparse.Namespace, method: str, ratio: str, recovered: bool = False) -> Path:
    name = re.sub(r"[^\w.-]+", "_", f"{method}-{ratio}").strip("_")
    return Path(args.work) / (name + ("-recovered" if recovered else ""))


# -- quality ----------------------------------------------------------------------------------------------


def quality(args: argparse.Namespace, results: Results) -> None:
    calibration = tokens(args, "calibration", args.seed, [])
    steps = args.recover_steps
    training = tokens(args, "training", RECOVERY_SEED, ["--samples", str(2 * steps)])
    if "dense" not in results:
        results.keep("dense", judge(args, Path(args.model)))
    for ratio in args.ratios:
        for method in args.methods:
            made = folder_of(args, method, ratio)
            run(args, results, f"{method} {ratio}", args.model, calibration, method, ratio, made)
            if args.recover:
                # the sparsity of a recovery is that of what it is given
                text = f"perp(objective=global,training_steps={steps})"
                again = folder_of(args, method, ratio, recovered=True)
                run(args, results, f"{method} {ratio} recovered", str(made), training, text, None, again)
                shutil.rmtree(again, ignore_errors=True)


def tokens(args: argparse.Namespace, name: str, seed: int, more: list[str]) -> Path:
    path = Path(args.work) / f"{name}-{seed}.safetensors"
    command = [sys.executable, str(HERE / "protocol.py"), "tokens", "--model", args.model]
    call([*command, "--wikitext", args.wikitext, "--seed", str(seed), "--out", str(path), *more])
    return path


def run(
    args: argparse.Namespace,
    results: Results,
    key: str,
    model: str,
    text: Path,
    method: str,
    ratio: str | None,
    out: Path,
) -> None:
    if key in results:
        return
    command = [sys.executable, str(HERE / "ours_worker.py"), "--model", model, "--tokens", str(text)]
    command += ["--method", method, "--batch-size", "2", "--threads", str(args.threads), "--out", str(out), "--json"]
    try:
        done = call([*command, "--sparsity", ratio] if ratio else [*command, "--repair"])
    except RuntimeError as error:
        results.keep(key, {"failed": str(error).strip().splitlines()[-1]})
        return
    facts = {"seconds": done["seconds"], "rss_peak_mib": done["rss_peak_mib"]}
    facts["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    results.keep(key, facts | judge(args, out))


def judge(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "protocol.py"), "perplexity", "--model", str(folder), "--trust-remote-code"]
    command += ["--tokenizer", args.model, "--wikitext", args.wikitext, "--threads", str(args.threads)]
    result = call(command + (["--windows", str(args.windows)] if args.windows else []))
    return {key: result[key] for key in ("perplexity", "parameters", "windows")}


# -- speed ------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace, results: Results) -> None:
    dense = gguf(args, Path(args.model), Path(args.work) / "dense-f16.gguf")
    for ratio in args.ratios:
        for method in args.methods:
            key = f"speed {method} {ratio}"
            made = folder_of(args, method, ratio)
            if key in results or not made.is_dir():
                continue
            facts = compared(args, [args.model, str(made)], args.dtype)
            product = gguf(args, made, made.with_name(made.name + "-f16.gguf"))
            if isinstance(product, Path) and isinstance(dense, Path):
                facts["llama.cpp"] = compared(args, [str(dense), str(product)], "float32")
                product.unlink()
            else:
                facts["llama.cpp"] = product if isinstance(product, str) else dense
            results.keep(key, facts)


def gguf(args: argparse.Namespace, folder: Path, out: Path) -> Path | str:
    """The model as F16 for llama.cpp, or why that cannot be."""
    done = subprocess.run(
        [*BILLHOOK, "export", str(folder), "--format", "gguf", "--out", str(out), "--force", "-q"],
        capture_output=True,
        text=True,
    )
    return out if done.returncode == 0 else " ".join(done.stderr.split()).replace(f"In {folder}, ", "")


def compared(args: argparse.Namespace, models: list[str], dtype: str) -> dict[str, Any]:
    command = [*BILLHOOK, "bench", *models, "--dtype", dtype, "--repeats", str(args.repeats), "--json"]
    measured = call([*command, "--threads", str(args.threads)])["models"]
    keys = ("prefill_speedup", "decode_speedup", "flops_speedup", "share", "memory", "bytes", "culprit")
    facts = {key: measured[1].get(key) for key in keys}
    for name in ("prefill", "decode"):
        facts[name] = [one[name]["seconds"] for one in measured]
    return facts


# -- the table --------------------------------------------------------------------------------------------


def table(args: argparse.Namespace, results: Results) -> str:
    lines = [
        "| removed | method | perplexity | recovered | parameters | bytes | minutes | peak memory | prefill | decode | "
        "llama.cpp prefill | decode |",
        "|---|" + "---|" * 11,
    ]
    dense = results.get("dense")
    if dense:
        lines.append(f"| 0 | dense | {dense['perplexity']:.2f} | | {dense['parameters'] / 1e6:.1f} M |" + " |" * 7)
    for ratio in args.ratios:
        for method in args.methods:
            one = results.get(f"{method} {ratio}")
            if one is None:
                continue
            if "failed" in one:
                lines.append(f"| {float(ratio):.0%} | `{method}` | {one['failed']} |" + " |" * 9)
                continue
            after = results.get(f"{method} {ratio} recovered")
            timed = results.get(f"speed {method} {ratio}", {})
            other = timed.get("llama.cpp")
            cells = [f"{float(ratio):.0%}", f"`{method}`", number(one["perplexity"])]
            cells += [number(after["perplexity"]) if after and "perplexity" in after else ""]
            cells += [f"{one['parameters'] / 1e6:.1f} M", f"{one['bytes'] / 1e6:.0f} MB"]
            cells += [f"{one['seconds'] / 60:.1f}", f"{one['rss_peak_mib']:.0f} MiB"]
            for source in (timed, other if isinstance(other, dict) else {}):
                cells += [f"×{source[k]:.2f}" if k in source else "" for k in ("prefill_speedup", "decode_speedup")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
