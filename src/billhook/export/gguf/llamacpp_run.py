"""Run a GGUF file in llama.cpp: a script of its own, which imports nothing of billhook.

llama.cpp ends the whole process where a file does not suit it, so it must not run in the process that exports.

    python llamacpp_run.py REQUEST RESPONSE

REQUEST is JSON {"model", "context", "threads", "prompts": lists of token ids, "texts": texts to split, "length"};
RESPONSE is JSON {"tokens": ids of each text, "answers": [{"tokens", "logprobs", "stop"}] for each prompt}.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load the file and answer the request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.ui = False
    params.cpuparams.n_threads = request["threads"]
    # What can be exact is made exact: the comparison is about the file, not about the cache's number format.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True
    server = xllamacpp.Server(params)
    return {
        "tokens": [_tokens(server.listening_address, text) for text in request["texts"]],
        "answers": [_answer(server, prompt, request["length"]) for prompt in request["prompts"]],
    }


def _tokens(address: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    post = urllib.request.Request(f"{address}/tokenize", data=body, headers={"Content-Type": "application/json"})
    # A proxy from the environment would be asked for this machine's own address.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(post) as answer:
        tokens: list[int] = json.load(answer)["tokens"]
    return tokens


def _answer(server: Any, prompt: list[int], length: int) -> dict[str, Any]:
    question = {
        "prompt": prompt,
        "n_predict": length,
        "temperature": 0,
        "n_probs": 1,
        "verbose": True,
        "return_tokens": True,
        "cache_prompt": False,
    }
    answer = server.handle_completions(question)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    if "choices" not in answer:
        raise RuntimeError(json.dumps(answer))
    logprobs = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    details = answer["__verbose"]
    return {
        "tokens": details["tokens"],
        "logprobs": [entry["logprob"] for entry in logprobs],
        "stop": details["stop_type"],
    }


if __name__ == "__main__":
    # The folder of this file is named gguf too, and holds a tokenizer.py.
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(run(asked)), encoding="utf-8")
