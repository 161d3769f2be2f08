"""How long a language model takes to read a prompt and to write, what it computes for it, and where the time goes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BETWEEN = "Python between the operations"
_aten = torch.ops.aten


@dataclass(frozen=True)
class OpTime:
    """What one operation of PyTorch took in all its calls of one prefill.

    Attributes:
        seconds: time in the operation itself, without the operations it calls.
        calls: how often it ran.
        shapes: shapes of its inputs in the calls that took most of the time, as text.
    """

    seconds: float
    calls: int
    shapes: str


def random_prompt(vocabulary: int, tokens: int, seed: int) -> Tensor:
    """Token ids [1, tokens], uniform over the vocabulary; equal arguments give equal ids."""
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def prefill(model: nn.Module, ids: Tensor) -> tuple[float, Any, Tensor]:
    """Run the prompt `ids` [batch, tokens] through the model into a new cache.

    Logits are computed for the last token only where the model's class can do so, as generation does.

    Returns:
        (wall seconds, cache, greedy next token [batch, 1]).
    """
    start = time.perf_counter()
    output = _forward(model, ids)
    token = output.logits[:, -1:].argmax(-1)
    seconds = time.perf_counter() - start
    return seconds, output[cache_name(model)], token


@torch.inference_mode()
def decode(model: nn.Module, cache: Any, token: Tensor, count: int) -> float:
    """Wall seconds of `count` greedy steps from `token` [batch, 1] on; `cache` grows by as many tokens."""
    held = {cache_name(model): cache, "use_cache": True}
    start = time.perf_counter()
    for _ in range(count):
        token = model(token, **held).logits[:, -1:].argmax(-1)
    return time.perf_counter() - start


def cache_name(model: nn.Module) -> str:
    """The name that a model has for its cache, as an argument and in its output; Transformers 5 changed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def count_flops(model: nn.Module, ids: Tensor) -> int:
    """Floating-point operations of the matrix products and the attention of one prefill, from their shapes.

    A multiplication and an addition are two. Zeros count like other weights, and causal attention like full
    attention: a dense kernel computes the first, and whether it skips half of the second is its own affair. Widths of
    keys and values count as the kernel gets them, so with the zeros that fill them up to one width.
    """
    own: dict[Any, Callable[..., int]] = {
        _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        _aten._grouped_mm: _grouped_flops,
    }
    # not in inference mode, in which the counter sees compositions instead of what they are made of
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        _forward(model, ids)
    return int(counter.get_total_flops())


def op_times(model: nn.Module, ids: Tensor, repeats: int = 3) -> dict[str, OpTime]:
    """Seconds of one prefill by operation, the mean of `repeats` ones, as PyTorch's profiler sees them.

    What passes between the operations is under the name `BETWEEN`.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    prefill(model, ids)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(repeats):
            with record_function(BETWEEN):
                prefill(model, ids)
    found: dict[str, list[tuple[float, int, str]]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        shapes = " x ".join(str(list(shape)) for shape in event.input_shapes or [] if shape)
        found.setdefault(event.key, []).append((event.self_cpu_time_total / 1e6, event.count, shapes))
    return {
        name: OpTime(
            seconds=sum(seconds for seconds, _, _ in calls) / repeats,
            calls=sum(count for _, count, _ in calls) // repeats,
            shapes=max(calls)[2],
        )
        for name, calls in found.items()
    }


def _forward(model: nn.Module, ids: Tensor) -> Any:
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(ids, use_cache=True, **options)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products for each head: queries with keys over the head's width, weights with values over the values'."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


def _grouped_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Each row of the first factor meets one matrix of the second."""
    return int(2 * rows[0] * rows[1] * weights[-1])
