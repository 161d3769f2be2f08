"""How much each block changes the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from billhook.calibrate import distributed
from billhook.calibrate.walk import Walk


def block_influence(walk: Walk) -> list[float]:
    """1 − mean cosine between a block's input and output, over all calibration tokens, per block.

    One dense pass over the model. (ShortGPT's block influence; 1 minus it is the layer redundancy of Dynamic Slicing.
    Outputs are taken at the block, before the final norm.)
    """
    found = walk.looked("influence", lambda: {str(i): v for i, v in enumerate(_measured(walk))})
    return [found[str(i)] for i in range(len(found))]


def _measured(walk: Walk) -> list[float]:
    sums: list[Tensor] = []
    look = walk.dense()
    handle = None
    for block in look:
        if handle is not None:
            handle.remove()
        total = torch.zeros(2, dtype=torch.float64, device=look.device)
        sums.append(total)
        handle = block.module.register_forward_hook(_listener(look, total), with_kwargs=True)
    if handle is not None:
        handle.remove()
    look.close()
    distributed.sum_(sums)
    return [1.0 - float(total[0] / total[1]) for total in sums]


def _listener(look: Walk, into: Tensor) -> Callable[..., None]:
    """Adds up [sum of cosines, tokens] as the block is called with one batch after the other."""
    turns = count()

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = next(turns)
        before = look.rows(batch, args[0] if args else kwargs["hidden_states"]).float()
        after = look.rows(batch, output[0] if isinstance(output, tuple) else output).float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1, eps=1e-8)
        into.add_(torch.tensor([float(cosine.double().sum()), cosine.numel()], device=into.device))

    return listen
