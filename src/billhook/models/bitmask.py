"""Bitmask storage: a sparse tensor as one bit per weight plus the values that are not zero.

In a safetensors file a tensor NAME of shape S becomes
- `NAME.bitmask`: uint8 [ceil(numel / 8)]; bit i mod 8 (least significant first) of byte i // 8 tells whether
  element i of the tensor, flattened in row-major order, is stored;
- `NAME.values`: the stored elements in that order, in the tensor's dtype;
and the file's metadata holds `"NAME.shape": "[...]"` and `"billhook_storage": "bitmask-1"`. Elements whose bits
are all zero (+0.0) are left out, so unpacking is bit-exact, negative zeros and NaN payloads included.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARK = "bitmask-1"
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(bitmask, values) of a tensor of any shape."""
    flat = tensor.detach().contiguous().reshape(-1)
    stored = flat.view(_INTEGER[flat.element_size()]) != 0
    padded = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.uint8)
    padded[: len(flat)] = stored
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    bitmask = (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)
    return bitmask, flat[stored]


def unpack(bitmask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `pack` was given."""
    shifts = torch.arange(8, dtype=torch.uint8)
    stored = ((bitmask[:, None] >> shifts) & 1).bool().reshape(-1)
    numel = 1
    for n in shape:
        numel *= n
    flat = torch.zeros(numel, dtype=values.dtype)
    flat[stored[:numel]] = values
    return flat.view(shape)


def packed_bytes(numel: int, nonzero: int, itemsize: int) -> int:
    """Bytes that a tensor takes in this storage."""
    return -(-numel // 8) + nonzero * itemsize
