"""Attention in strips against float64 softmax over the whole square."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from billhook.calibrate import attention
from billhook.calibrate.attention import causal_attention, in_strips


def whole_square(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    query, key, value = query.double(), key.double(), value.double()
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores.masked_fill_(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ value


def parts(tokens: int, heads: int, groups: int, width: int, v: int, batch: int = 2) -> list[torch.Tensor]:
    """As projections leave them: [batch, tokens, heads, width], transposed."""
    generator = torch.Generator().manual_seed(tokens + heads)
    shapes = ((heads, width), (groups, width), (groups, v))
    return [torch.randn(batch, tokens, *shape, generator=generator).transpose(1, 2) for shape in shapes]


@given(
    st.integers(1, 200), st.sampled_from([(4, 4), (6, 2), (3, 1)]), st.integers(1, 20), st.integers(1, 20),
    st.sampled_from([None, 0.3]),
)  # fmt: skip
@settings(max_examples=60)
def test_strips_equal_the_whole_square(
    tokens: int, heads: tuple[int, int], width: int, v: int, scaling: float | None
) -> None:
    query, key, value = parts(tokens, *heads, width, v)
    found = causal_attention(query, key, value, scaling)
    assert found.shape == (2, heads[0], tokens, v)
    torch.testing.assert_close(found.double(), whole_square(query, key, value, scaling), rtol=0, atol=5e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_transformers_attends_in_strips(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    used: list[torch.dtype] = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    original = attention.causal_attention

    def spy(*args: Any) -> torch.Tensor:
        used.append(args[0].dtype)
        return original(*args)

    monkeypatch.setattr(attention, "causal_attention", spy)
    query, key, value = (x if autocast else x.bfloat16() for x in parts(150, 6, 2, 8, 8))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=3)
    with torch.no_grad(), in_strips(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, dropout=0.0, scaling=0.4)
    assert used == [torch.bfloat16] == [found.dtype]
    assert weights is None
    assert found.is_contiguous()
    expected = whole_square(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.4).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock


@pytest.mark.parametrize("case", ["mask", "gradient", "dropout", "encoder", "cache", "short", "float32", "tiles"])
def test_all_else_goes_to_the_stock_function(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("not a case for strips")

    monkeypatch.setattr(attention, "causal_attention", refuse)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: case == "tiles")
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    query, key, value = (x.to(dtype) for x in parts(40 if case == "short" else 150, 6, 2, 8, 8))
    mask = torch.ones(150, 150, dtype=torch.bool).tril() if case == "mask" else None
    if case == "cache":
        query = query[:, :, -130:]
    module = SimpleNamespace(is_causal=case != "encoder", num_key_value_groups=3)
    with torch.set_grad_enabled(case == "gradient"), in_strips():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, dropout=1e-9 if case == "dropout" else 0.0
        )
    assert found.shape == (2, query.shape[2], 6, 8)


def test_the_stock_function_comes_back_after_an_error() -> None:
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), in_strips():
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
