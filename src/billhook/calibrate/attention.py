"""Causal attention of forward passes with bfloat16 products on CPUs.

PyTorch's fused kernel multiplies bfloat16 slowly where the CPU has no matrix tiles, and takes 512 keys at once, so at
usual lengths of calibration it computes most of the square above the diagonal too. Taken a strip of queries at a time,
against the keys that these may see, by ordinary products, the same attention takes a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_STRIP = 64  # queries


@contextmanager
def in_strips() -> Iterator[None]:
    """Have Transformers compute causal self-attention by `causal_attention`, on CPUs where no gradient is wanted."""
    stock: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None or not _suits(module, query, key, options):
            return stock(module, query, key, value, attention_mask, **options)
        with torch.autocast("cpu", enabled=False):
            query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
            return causal_attention(query, key, value, options.get("scaling")).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = stock


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Softmax attention of every query over the keys up to its own; scores are rounded to the type of the queries.

    Args:
        query: [batch, heads, tokens, width].
        key, value: [batch, KV heads, tokens, width], the values' width may be another.
        scaling: of the scores; 1/√width if not given.

    Returns:
        [batch, heads, tokens, width of the values].
    """
    batch, heads, tokens, width = query.shape
    rows = batch * key.shape[1]
    query = query * (width**-0.5 if scaling is None else scaling)
    key, value = (part.contiguous().view(rows, tokens, -1) for part in (key, value))
    later = torch.ones(_STRIP, _STRIP, dtype=torch.bool).triu(1)
    strips = []
    for start in range(0, tokens, _STRIP):
        end = min(start + _STRIP, tokens)
        count = end - start
        together = query[:, :, start:end].reshape(rows, -1, width)  # all queries that share a key
        scores = together @ key[:, :end].transpose(1, 2)
        scores.view(batch, heads, count, end)[..., start:].masked_fill_(later[:count, :count], -torch.inf)
        strips.append((scores.softmax(-1) @ value[:, :end]).view(batch, heads, count, -1))
    return torch.cat(strips, dim=2)


def _suits(module: Any, query: Tensor, key: Tensor, options: dict[str, Any]) -> bool:
    """Whether this is causal attention of a sequence to itself where strips are faster, and nothing else."""
    if query.device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    causal = options.get("is_causal")
    return (
        dtype == torch.bfloat16
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "position_bias"))
        and bool(getattr(module, "is_causal", True) if causal is None else causal)
        and 2 * _STRIP <= query.shape[2] == key.shape[2]
    )
