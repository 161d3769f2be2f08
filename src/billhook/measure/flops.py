"""What a forward pass of a slim model computes, known from shapes before anything is cut.

The model is built once without memory and its operations are counted as `billhook bench` counts them; that splits into
what lies outside the blocks and, in closed form, each block. Other widths of blocks then cost a sum.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import anatomy_of, find_blocks
from billhook.measure.latency import count_flops
from billhook.surgery.slim import dims_of, shaped

TOKENS = 512


@dataclass
class ForwardFlops:
    """Floating-point operations of one forward pass of one sequence, as `count_flops` counts them.

    Attributes:
        tokens: how many enter a block; `TOKENS`, less where the model has fewer positions, the patches of an image.
        outside: what lies outside the blocks: head, pooler, the projection of patches.
        blocks: each block's.
    """

    tokens: int
    outside: int
    blocks: list[int]

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)


def forward_flops(model: Any, tokens: int = TOKENS) -> ForwardFlops:
    """Count a slim model, wherever its weights are."""
    anatomy = anatomy_of(model)
    config = copy.deepcopy(model.config)
    config.slim["layers"] = [dims_of(block) for block in find_blocks(model, anatomy)]
    with torch.device("meta"):
        twin = type(model)._from_config(config)
        inputs = _inputs(config, anatomy.input, tokens)
    blocks = find_blocks(twin, anatomy)
    seen: list[int] = []
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    total = count_flops(twin, inputs)
    own = [block_flops(block, seen[0]) for block in blocks]
    return ForwardFlops(seen[0], total - sum(own), own)


def block_flops(block: Any, tokens: int) -> int:
    """FLOPs of a slim block for one sequence of `tokens`: matrices, and the two products of each head as run."""
    matrices = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    attention = block.self_attn
    products = attention.heads * sum(attention.attended(tokens)) if attention is not None else 0
    return 2 * tokens * (matrices + tokens * products)


class PlannedFlops:
    """FLOPs that a slim model would take with blocks of other shapes; `now` is what it takes."""

    def __init__(self, model: Any) -> None:
        self.now = forward_flops(model)
        self._slim: dict[str, Any] = model.config.slim
        self._like = find_blocks(model, anatomy_of(model))[0]  # shapes do not depend on the block that is reshaped
        self._known: dict[str, int] = {}

    def total(self, dims: Sequence[dict[str, Any] | None]) -> int:
        """After the blocks were given the shapes of their entries (as `dims_of` has them); None: the block is gone."""
        return self.now.outside + sum(self._block(entry) for entry in dims if entry is not None)

    def _block(self, dims: dict[str, Any]) -> int:
        key = json.dumps(dims, sort_keys=True)
        if key not in self._known:
            self._known[key] = block_flops(shaped(self._like, self._slim, dims), self.now.tokens)
        return self._known[key]


def _inputs(config: Any, name: str | None, tokens: int) -> Tensor:
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.zeros(1, config.num_channels, height, width)
    limit = getattr(config, "max_position_embeddings", None)
    return torch.zeros(1, min(tokens, limit) if limit else tokens, dtype=torch.long)
