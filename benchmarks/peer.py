"""Billhook against llm-compressor: time, peak memory and perplexity, in alternating runs on one machine.

    python benchmarks/peer.py --model DIR --wikitext DIR --peer-python VENV/bin/python --out FILE.json

Every run is a process of its own (ours_worker.py with this python, peer_worker.py with the peer's). Both get
the same calibration tokens in the same order and as many threads, each in batches of the size that suits it.
The two take turns, and who goes first changes from round to round; every round has a calibration draw of its
own. When all is timed, every output is judged by protocol.py, which knows neither tool. Memory is that of the
whole process, libraries included; their share is rss_imported_mib in the JSON.

This process imports neither torch nor any tool: a child's peak memory, as the kernel counts it, starts from
its parent's at the time of the start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
TOOLS = ("ours", "peer")
COLUMNS = (
    ("time", "seconds", "s", 1),
    ("peak memory", "rss_peak_mib", "MiB", 0),
    ("perplexity", "perplexity", "", 2),
)


def call(command: list[str]) -> dict[str, Any]:
    """Runs a worker and reads the last JSON object of its output."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        env.pop("PYTHONPATH", None)  # meant for this python; the peer's has packages of its own
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    begin = done.stdout.rfind("\n{") + 1  # the last object, on one line or many, after whatever libraries print
    result: dict[str, Any] = json.loads(done.stdout[begin:])
    return result


def worker(tool: str, args: argparse.Namespace, tokens: Path, method: str, pattern: str, out: Path) -> list[str]:
    python = args.peer_python if tool == "peer" else sys.executable
    command = [python, str(HERE / f"{tool}_worker.py"), "--model", args.model, "--tokens", str(tokens)]
    command += ["--method", method, "--sparsity", str(args.sparsity), "--pattern", pattern]
    batch = args.peer_batch_size if tool == "peer" else args.batch_size
    command += ["--batch-size", str(batch), "--threads", str(args.threads)]
    return [*command, "--out", str(out), "--json"]


def judge(args: argparse.Namespace, folder: str | Path) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "protocol.py"), "perplexity", "--model", str(folder)]
    command += ["--tokenizer", args.model, "--wikitext", args.wikitext, "--threads", str(args.threads)]
    return call(command + (["--windows", str(args.windows)] if args.windows else []))


def measure(args: argparse.Namespace, work: Path, method: str, pattern: str) -> dict[str, Any]:
    """The timed runs of one configuration; their outputs stay in `work` for the judge."""
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for turn, seed in enumerate(args.seeds):
        for tool in TOOLS if turn % 2 == 0 else TOOLS[::-1]:
            out = work / f"{method}-{pattern.replace(':', 'of')}-{tool}-{seed}"
            tokens = work / f"calibration-{seed}.safetensors"
            result = call(worker(tool, args, tokens, method, pattern, out)) | {"seed": seed, "out": str(out)}
            print(f"{method} {pattern} seed {seed} {tool}: {result['seconds']:.1f} s", file=sys.stderr)
            runs[tool].append(result)
    return {"method": method, "pattern": pattern, "runs": runs}


def judged(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """The result with a perplexity for every run, and the medians; perplexities are averaged in the logarithm."""
    runs = result["runs"]
    for tool in TOOLS:
        for run in runs[tool]:
            if run.get("out"):
                run |= judge(args, run["out"])
                print(f"{run['method']} {run['pattern']} {tool}: {run['perplexity']:.2f}", file=sys.stderr)
                shutil.rmtree(run.pop("out"))
    keys = ("seconds", "rss_imported_mib", "rss_loaded_mib", "rss_peak_mib")
    for tool in TOOLS:
        result[tool] = {key: median(run[key] for run in runs[tool]) for key in keys}
        result[tool]["perplexity"] = geometric_mean([run["perplexity"] for run in runs[tool]])
    result["ratio"] = {key: result["ours"][key] / result["peer"][key] for _, key, _, _ in COLUMNS}
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The summary as a markdown table; each ratio is ours divided by theirs."""
    head = ["configuration"]
    for name, _, unit, _ in COLUMNS:
        head += [f"{name} ours{f' ({unit})' if unit else ''}", "theirs", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for result in results:
        cells = [f"{result['method']} {result['label']}"]
        for _, key, _, digits in COLUMNS:
            cells += [f"{result[tool][key]:.{digits}f}" for tool in TOOLS] + [f"{result['ratio'][key]:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="plain Hugging Face model folder, fp32")
    parser.add_argument("--wikitext", required=True, help="folder with the raw WikiText-2 files")
    parser.add_argument("--peer-python", required=True, help="python of a venv with llmcompressor 0.14")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration draws, a round each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="calibration batch of ours")
    parser.add_argument("--peer-batch-size", type=int, default=1, help="of the peer; see peer_worker.py")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the unstructured configurations")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--samples", type=int, default=0, help="calibration sequences, for trials; 0: protocol")
    parser.add_argument("--length", type=int, default=0, help="their length, for trials; 0: protocol")
    parser.add_argument("--windows", type=int, default=0, help="evaluation windows, for trials; 0: protocol")
    parser.add_argument("--work", help="folder for the outputs on their way to the judge; temporary by default")
    parser.add_argument("--out", required=True, help="JSON file with everything measured")
    args = parser.parse_args()

    protocol = [sys.executable, str(HERE / "protocol.py")]
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        report: dict[str, Any] = {
            "machine": call([*protocol, "machine"]),
            "threads": args.threads,
            "batch_size": {"ours": args.batch_size, "peer": args.peer_batch_size},
            "results": [],
        }
        for seed in args.seeds:
            command = [*protocol, "tokens", "--model", args.model, "--wikitext", args.wikitext, "--seed", str(seed)]
            command += ["--out", str(work / f"calibration-{seed}.safetensors")]
            command += ["--samples", str(args.samples)] if args.samples else []
            command += ["--length", str(args.length)] if args.length else []
            report["calibration"] = call(command)

        def keep() -> None:  # often, so that an interrupted session keeps what it has
            Path(args.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")

        for method in args.methods:
            for pattern in args.patterns:
                result = measure(args, work, method, pattern)
                result["label"] = f"{args.sparsity:.0%}" if pattern == "unstructured" else pattern
                report["results"].append(result)
                keep()
        print("Timing is done; judging.", file=sys.stderr)
        report["dense"] = judge(args, args.model)
        for result in report["results"]:
            judged(args, result)
            keep()
    calibration, dense = report["calibration"], report["dense"]
    print(
        f"Medians of {len(args.seeds)} alternating runs, {args.threads} threads; calibration on "
        f"{calibration['samples']} x {calibration['length']} tokens, perplexity (geometric mean) on "
        f"{dense['windows']} x {dense['window_length']} (dense {dense['perplexity']:.2f}). "
        "Ratios are ours / theirs.\n"
    )
    print(table(report["results"]))


if __name__ == "__main__":
    main()
