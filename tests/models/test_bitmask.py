"""Bitmask storage gives back every bit, and takes the room that it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.models.bitmask import pack, packed_bytes, unpack

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.5, 5e-324, 6e-8]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats()), max_size=70),
    dtype=st.sampled_from(list(INTEGERS)),
)
def test_round_trip_is_bit_exact(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    mask, stored = pack(tensor)
    assert mask.dtype == torch.uint8
    assert stored.dtype == dtype
    back = unpack(mask, stored, tuple(tensor.shape))
    assert torch.equal(bits(back), bits(tensor))
    assert mask.numel() + stored.numel() * dtype.itemsize == packed_bytes(len(values), len(stored), dtype.itemsize)


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=4), dtype=st.sampled_from(list(INTEGERS)), seed=st.integers(0, 99))
def test_any_shape_and_any_bit_pattern(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    tensor = (raw.view(dtype) if len(raw) else torch.empty(0, dtype=dtype)).reshape(shape)
    tensor = torch.where(torch.rand(shape, generator=generator) < 0.5, torch.zeros((), dtype=dtype), tensor)
    back = unpack(*pack(tensor), tuple(shape))
    assert back.shape == tensor.shape
    assert torch.equal(bits(back.reshape(-1)), bits(tensor.reshape(-1)))


def test_only_positive_zeros_are_left_out() -> None:
    mask, stored = pack(torch.tensor([0.0, -0.0, math.nan, 0.0, 2.0]))
    assert len(stored) == 3
    assert mask.tolist() == [0b10110]


def test_bit_order_is_least_significant_first() -> None:
    tensor = torch.zeros(17)
    tensor[0] = tensor[9] = tensor[16] = 1
    assert pack(tensor)[0].tolist() == [1, 2, 1]


def test_a_view_is_packed_by_value() -> None:
    base = torch.arange(6.0).view(2, 3)
    assert torch.equal(unpack(*pack(base.T), (3, 2)), base.T)


@pytest.mark.parametrize(("numel", "nonzero", "itemsize", "expected"), [(0, 0, 4, 0), (1, 0, 4, 1), (9, 3, 2, 8)])
def test_size(numel: int, nonzero: int, itemsize: int, expected: int) -> None:
    assert packed_bytes(numel, nonzero, itemsize) == expected


def test_half_sparse_bfloat16_takes_at_most_58_percent() -> None:
    tensor = torch.randn(64, 48).to(torch.bfloat16)
    tensor.view(-1)[::2] = 0
    mask, stored = pack(tensor)
    assert mask.numel() + stored.numel() * 2 <= 0.58 * tensor.numel() * 2
