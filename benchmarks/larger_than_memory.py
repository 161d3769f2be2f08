"""A model that does not fit: 1.5 B random float32 parameters (6 GB) pruned by Wanda under a memory limit.

    python benchmarks/larger_than_memory.py --work DIR --limit 2GB

Writes the model block by block (so that making it needs no memory either), prunes it in a process of its own, and
prints what the operating system says of that process. DIR needs about 13 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.models.files import Entry, write

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make(folder: Path) -> int:
    """Write the random model; returns its parameter count."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], dtype="float32")
    config.save_pretrained(folder)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in parameters:
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(block, []).append(name)
    weight_map = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(parameters[name].shape)
            if parameters[name].ndim == 1
            else torch.randn(parameters[name].shape, generator=generator) * 0.02
            for name in names
        }
        write(folder / file, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(p.numel() for p in parameters.values())


WORKER = """
import sys, torch, billhook as bh
from billhook.system import parse_bytes
torch.manual_seed(0)
model, _ = bh.load(sys.argv[1], stream=True)
batches = [torch.randint(0, 32000, (1, 512)) for _ in range(int(sys.argv[4]))]
bh.prune(model, bh.Wanda(sparsity=0.5), batches, out=sys.argv[2], max_memory=parse_bytes(sys.argv[3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--limit", default="2GB")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    model, out = arguments.work / "model", arguments.work / "out"
    parameters = make(model) if not model.exists() else None
    start = time.perf_counter()
    command = [sys.executable, "-c", WORKER, str(model), str(out), arguments.limit, str(arguments.samples)]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    report = json.loads((out / "billhook.json").read_text())
    result = {
        "parameters": parameters or report["size_before"]["parameters"],
        "bytes": report["size_before"]["bytes"],
        "peak_resident_bytes_of_the_process": report["peak_memory"],
        "peak_resident_bytes_of_all_children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "seconds": round(seconds, 1),
        "seconds_by_phase": {
            phase: round(sum(b["seconds"].get(phase, 0) for b in report["steps"][0]["blocks"]), 1)
            for phase in ("load", "collect", "solve", "propagate", "write")
        },
        "shards": len(list(out.glob("*.safetensors"))),
        "sparsity": sum(s["sparsity"] for s in report["steps"][0]["sites"]) / len(report["steps"][0]["sites"]),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
