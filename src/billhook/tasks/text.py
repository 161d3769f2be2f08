"""Text in memory, and writing on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from billhook.calibrate.data import joined, token_stream
from billhook.errors import BillhookError
from billhook.tasks.task import Task, device_of

_TEST_BATCH = 8


class Writing(Task):
    """Language modelling: cross-entropy of the next token, judged by perplexity on the held-out part of the text.

    Args:
        train, test: token ids, int64 [n, length]; windows without overlap.
        unit: what a token is, for the reader.
    """

    kind = "text"
    metric = "perplexity"
    higher = False
    optimizer = "adamw"
    lr = 1e-3
    batch = 16
    weight_decay = 0.1

    def __init__(self, train: Tensor, test: Tensor, unit: str = "token") -> None:
        self.train, self.test, self.unit = train, test, unit
        self.examples = len(train)
        self.tests = f"{test.numel():,} test {unit}s"

    def loss(self, model: nn.Module, chosen: Tensor, draws: torch.Generator) -> Tensor:
        return _loss(model, self.train[chosen])

    def measure(self, model: nn.Module) -> float:
        total = sum(float(_loss(model, ids)) * len(ids) for ids in torch.split(self.test, _TEST_BATCH))
        return math.exp(total / len(self.test))

    def say(self, value: float) -> str:
        return f"perplexity {value:.2f} per {self.unit}"


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    ids = ids.to(device_of(model))
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def load_text(spec: str, tokenizer: Any = None, length: int = 256, test_windows: int = 64) -> Writing:
    """The task of writing on a text.

    Args:
        spec: demo, wikitext2 or text:PATH, as everywhere.
        tokenizer: of the model; nothing: every byte is a token.
        length: tokens of a window.
        test_windows: of the held-out part, at most.

    Raises:
        BillhookError: the text cannot be had, or a part of it is shorter than a window.
    """
    parts = []
    for split in ("calibration", "evaluation"):
        if tokenizer is None:
            stream = torch.frombuffer(bytearray(joined(spec, split).encode()), dtype=torch.uint8).long()
        else:
            stream = token_stream(spec, tokenizer, split)
        count = len(stream) // length
        if count == 0:
            raise BillhookError(
                f"The {split} part of {spec} has {len(stream)} tokens, fewer than a window of {length}: lower length, "
                "or use a longer text."
            )
        parts.append(stream[: count * length].view(count, length))
    return Writing(parts[0], parts[1][:test_windows], "byte" if tokenizer is None else "token")
