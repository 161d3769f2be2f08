"""The trial of a finished GGUF file: llama.cpp has to split texts and write tokens as the PyTorch model does."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.export.gguf.tensors import ALTERNATIVE, Entry
from billhook.export.gguf.tokenizer import Vocabulary, encode, tokenizer_of
from billhook.models.load import load

log = logging.getLogger("billhook")

_CHECKED = 12  # tokens per prompt that must agree
_LENGTH = 16  # tokens per prompt that are generated
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils at",
    "def add(a, b):\n    return",
)
_TEXTS = (
    *_PROMPTS,
    "Hello, world! It's 2024, isn't it? I'VE paid $1234.56 (50%).",
    "  two  spaces,\ttabs\n\nlines\r\n   and a tail  ",
    "Übergrößenträger, naïve café, Привет, 你好世界, 日本語, हिन्दी, 🙂👍🏽 ½ x² ١٢٣",
    "if (x != y) { return foo_bar[0]->baz; } // http://example.com/a?b=c&d",
)
# By how much a token's log-probability may fall short of the largest where two tokens count as equally good. llama.cpp
# multiplies f16 and bf16 weights with inputs rounded to the same type; what that does to this very model is measured
# and allowed for, since pruned models can be sensitive to it.
_TIE = {"f32": 0.01, "f16": 0.02, "bf16": 0.1}
_NOISE = 4.0  # times the measured effect of that rounding
_LARGEST_TIE = 1.0
_ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Check:
    """What llama.cpp wrote, next to what the PyTorch model would have written.

    Attributes:
        tokens: tokens that were compared.
        agreement: share of them that are the PyTorch model's first choice; None where nothing was generated.
        ties: tokens that are not, but whose probability is the same up to rounding.
        difference: the largest difference between the log-probabilities of a token; None where llama.cpp gave none.
        text: the first prompt and what llama.cpp wrote after it.
    """

    tokens: int
    agreement: float | None
    ties: int
    difference: float | None
    text: str


def try_file(
    path: Path, folder: Path, model: Any, vocabulary: Vocabulary, entries: list[Entry], kind: str, context: int
) -> Check:
    """Run the file in llama.cpp and compare it with the PyTorch model, token by token.

    Raises:
        BillhookError: llama.cpp refuses the file, splits text otherwise, or generates other tokens.
    """
    tokenizer = tokenizer_of(folder / "tokenizer.json")
    context = min(512, context)
    texts = list(_TEXTS)
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content:
            texts.append(f"one{token.content}two")
    expected = [encode(tokenizer, vocabulary, text) for text in texts]
    prompts = [encode(tokenizer, vocabulary, text) for text in _PROMPTS]
    prompts = [prompt for prompt in prompts if prompt and len(prompt) + _LENGTH < context]
    if not prompts:
        raise BillhookError(f"A context of {context} tokens is too short to try the file: export it with verify=False.")
    request = {
        "model": str(path),
        "context": context,
        "threads": torch.get_num_threads(),
        "texts": texts,
        "prompts": prompts,
        "length": _LENGTH,
    }
    response = _llamacpp(request, folder)
    for text, ours, theirs in zip(texts, expected, response["tokens"], strict=True):
        if ours != theirs:
            raise BillhookError(
                f"llama.cpp splits {text!r} into other tokens than the tokenizer of {folder} (it took the rules of "
                f"{vocabulary.pre!r}), so GGUF export cannot convert this tokenizer: {ALTERNATIVE}."
            )
    ends = {i for i, t in enumerate(vocabulary.types) if t == 3} | {vocabulary.ids["eos"]}
    return _compare(path, folder, tokenizer, prompts, response["answers"], ends, entries, kind)


def _llamacpp(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("llamacpp_run.py")
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work) / "request.json", Path(work) / "response.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, str(script), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answered.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            log.debug("%s", done.stderr)
            telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
            # Its log lines start with the time and a letter for the level.
            reason = re.sub(r"^[\d.]+ [A-Z] ", "", telling[0])[:300] if telling else f"it ended with {done.returncode}"
            raise BillhookError(f"llama.cpp does not run the file made from {folder} ({reason}): {ALTERNATIVE}.")
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return result


def _compare(
    path: Path,
    folder: Path,
    tokenizer: Any,
    prompts: list[list[int]],
    answers: list[dict[str, Any]],
    ends: set[int],
    entries: list[Entry],
    kind: str,
) -> Check:
    model, _ = load(folder, dtype=torch.float32)
    _round(model, kind)
    agreeing = ties = total = 0
    difference: float | None = None
    for prompt, answer in zip(prompts, answers, strict=True):
        written = [t for t in answer["tokens"] if t >= 0]
        logprobs = _logprobs(model, prompt, written)
        tie = _tie(model, prompt, written, logprobs, kind)
        for place, token in enumerate(written):
            own = logprobs[place]
            short = float(own.max() - own[token])
            total += 1
            agreeing += short == 0
            ties += 0 < short <= tie < math.inf
            if len(answer["logprobs"]) == len(written):  # it gives none for tokens that end amid a character
                difference = max(difference or 0.0, abs(float(own[token]) - answer["logprobs"][place]))
            if short > tie and place < _CHECKED:
                raise _disagreement(path, folder, tokenizer, prompt, written[:place], token, own, entries)
        ended = answer["stop"] == "eos" and not (written and written[-1] in ends)
        if ended and len(written) < _CHECKED:
            own = logprobs[len(written)]
            best = max(ends, key=lambda token: float(own[token]))
            if float(own.max() - own[best]) > tie:
                raise _disagreement(path, folder, tokenizer, prompt, written, best, own, entries)
    text = tokenizer.decode(prompts[0] + [t for t in answers[0]["tokens"] if t >= 0], skip_special_tokens=False)
    return Check(total, agreeing / total if total else None, ties, difference, text)


def _logprobs(model: nn.Module, prompt: list[int], written: list[int]) -> Tensor:
    """Of every token at the places of `written` and the one behind it."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt + written])).logits
    return logits[0, len(prompt) - 1 :].log_softmax(-1)


def _tie(model: nn.Module, prompt: list[int], written: list[int], logprobs: Tensor, kind: str) -> float:
    """By how much a token may fall short of the best one and still count as equally good."""
    if kind not in _TIE:
        return math.inf
    dtype = _ROUNDED.get(kind)
    if dtype is None:
        return _TIE[kind]

    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(dtype).to(inputs[0].dtype), *inputs[1:])

    hooks = [m.register_forward_pre_hook(rounded) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        change = (_logprobs(model, prompt, written) - logprobs).abs()
    finally:
        for hook in hooks:
            hook.remove()
    likely = logprobs.topk(min(4, logprobs.shape[-1])).indices
    noise = float(change.gather(-1, likely).max())
    return min(_TIE[kind] + _NOISE * noise, _LARGEST_TIE)


def _round(model: nn.Module, kind: str) -> None:
    """Give the matrices the precision that they have in the file, so that only other differences are left."""
    if kind in _ROUNDED:
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.copy_(parameter.data.to(_ROUNDED[kind]))


def _disagreement(
    path: Path,
    folder: Path,
    tokenizer: Any,
    prompt: list[int],
    written: list[int],
    token: int,
    logprobs: Tensor,
    entries: list[Entry],
) -> BillhookError:
    before = tokenizer.decode(prompt + written, skip_special_tokens=False)
    own = int(logprobs.argmax())
    theirs, ours = (f"{tokenizer.decode([t], skip_special_tokens=False)!r} (token {t})" for t in (token, own))
    wrong = first_difference(path, entries)
    where = (
        f"the first tensor that was written wrongly is {wrong}"
        if wrong
        else "all tensors in the file are those of the folder, so llama.cpp computes something else with them"
    )
    return BillhookError(
        f"llama.cpp continues {before!r} with {theirs}, the model in {folder} with {ours}; {where}. The file was "
        f"not kept: {ALTERNATIVE}, and report this."
    )


def first_difference(path: Path, entries: list[Entry]) -> str | None:
    """The first tensor of a file that is not the source's, up to the rounding of its type; None where all are."""
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for entry in entries:
        if entry.name not in stored:
            return f"{entry.name} ({entry.source}), which is missing"
        tensor = stored[entry.name]
        read = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        wanted = entry.make()
        bound = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 2**-7}[entry.kind] * wanted.abs().max()
        if read.shape != wanted.shape or float((read - wanted).abs().max()) > float(bound):
            return f"{entry.name} ({entry.source})"
    return None
