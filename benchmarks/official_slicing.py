"""SliceGPT and Dynamic Slicing by their authors' code, on the protocol's model and tokens, judged by the protocol.

    PYTHONPATH=OLD python benchmarks/official_slicing.py --code DIR --model DIR --wikitext DIR --tokens FILE \
        --sparsity 0.2 [--like FOLDER]

DIR of the code is a checkout of github microsoft/TransformerCompression or RazvanDu/DynamicSlicing, which is run as it
is, but for `datasets`, which it imports and is not asked for. OLD holds the Transformers that it was written for and
what else it imports (`pip install --target OLD --no-deps "transformers==4.45.2" "tokenizers==0.20.3"
"huggingface_hub<0.27" ml_collections absl-py`). FILE is what `protocol.py tokens` wrote. The adapter of Llama serves
SmolLM2, which is of that class; it gets the model directly, as its loader knows Llama 2 and 3 by name.

With --like, each layer's width is that of a folder that `billhook prune --method dynamic-slicing` wrote, so that the
two are compared at equal widths. With --embeddings kept, the mean that the code takes from the embeddings of every
family, which changes models of RMSNorm, is left in.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import protocol
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer


class Tokens:
    """A tokenizer file, called as the protocol calls a tokenizer."""

    def __init__(self, folder: str) -> None:
        self.inner = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def __call__(self, text: str, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text).ids}


def opened(folder: str) -> Any:
    """The model by old Transformers, which read the base of the rotary angles from another key."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

    values = json.loads((Path(folder) / "config.json").read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values.pop("dtype", None)
    config = LlamaConfig(**values, torch_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    model.config.torch_dtype = torch.float32
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--code", required=True, help="checkout")
    parser.add_argument("--model", required=True, help="plain Hugging Face folder of a Llama-like model, fp32")
    parser.add_argument("--wikitext", required=True, help="folder with the raw WikiText-2 files")
    parser.add_argument("--tokens", required=True, help="safetensors file of protocol.py tokens")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--round", type=int, default=8)
    parser.add_argument("--like", help="folder of a sliced model whose widths are taken")
    parser.add_argument("--embeddings", default="centred", choices=["centred", "kept"])
    parser.add_argument("--windows", type=int, default=protocol.WINDOWS)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    importlib.import_module("transformers")  # which looks for datasets before it is replaced
    sys.modules["datasets"] = mock.MagicMock()
    sys.path.insert(0, str(Path(args.code).resolve() / "src"))
    fusion, rotate = (importlib.import_module(f"slicegpt.{name}") for name in ("layernorm_fusion", "rotate"))
    adapter_of = importlib.import_module("slicegpt.adapters.llama_adapter").LlamaModelAdapter

    evaluation = protocol.evaluation_tokens(Tokens(args.model), args.wikitext, args.windows)
    ids = load_file(args.tokens)["input_ids"]
    loader = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(2)]
    adapter = adapter_of(opened(args.model))
    adapter.model.config.use_cache = False
    embeddings = adapter.get_embeddings()[0].weight.detach().clone()

    begin = time.perf_counter()
    fusion.replace_layers(adapter)
    fusion.fuse_modules(adapter)
    if args.embeddings == "kept":
        adapter.get_embeddings()[0].weight.data = embeddings
    width = int((1 - args.sparsity) * adapter.hidden_size)
    width -= width % args.round
    if hasattr(rotate, "slice_particular_layer_percent"):  # Dynamic Slicing
        widths = [width] * (len(adapter.get_layers()) + 1)
        if args.like:
            layers = json.loads((Path(args.like) / "config.json").read_text())["slim"]["layers"]
            widths = [layer["stream"][0] for layer in layers] + [adapter.hidden_size]
        cuts = [one / adapter.hidden_size for one in widths]
        rotate.rotate_and_slice(adapter, loader, cuts, 0, 0.0, width, 0)
    else:
        schedule = importlib.import_module("slicegpt.slicing_scheduler").ConstSlicingScheduler(width)
        rotate.rotate_and_slice(adapter, loader, schedule, apply_mask=False)
    seconds = time.perf_counter() - begin
    result = {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in adapter.model.parameters()),
        "perplexity": protocol.perplexity(adapter.model, evaluation),
        "windows": args.windows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
