"""FLOPs that are foreseen from shapes are those that the counter finds in the finished model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.measure.flops import block_flops, forward_flops
from billhook.measure.latency import count_flops
from billhook.surgery import shrink
from billhook.surgery.slim import slim_
from tiny import FAMILIES, OTHERS, VOCABULARY, batches_for, build

LENGTH = 64  # positions of the tiny models


def counted(model: Any, family: str) -> int:
    if family.startswith(("vit", "deit")):
        return count_flops(model, batches_for(family, count=1, size=1)[0])
    return count_flops(model, torch.zeros(1, LENGTH, dtype=torch.long))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_count_of_a_model_that_was_not_run(family: str) -> None:
    model = build(family)
    want = counted(model, family)
    slim_(model)
    found = forward_flops(model)
    assert found.total == want == counted(model, family)
    assert found.tokens == {"vit": 17, "deit": 18, "vit-base": 17}.get(family, LENGTH)
    assert len(found.blocks) == 3
    assert len(set(found.blocks)) == 1
    # by hand, for one block
    block: Any = find_blocks(model, anatomy_of(model))[0]
    n, heads, qk, v = found.tokens, block.self_attn.heads, block.self_attn.qk, block.self_attn.v
    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert found.blocks[0] == 2 * n * matrices + 2 * n * n * heads * (qk + v)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_count_of_blocks_with_parts_removed(family: str) -> None:
    model: Any = build(family)
    slim_(model)
    first, second, third = (block for block in find_blocks(model, anatomy_of(model)))
    shrink.keep_neurons_(first, torch.arange(5))
    shrink.keep_values_(first, torch.arange(3).expand(first.self_attn.kv_heads, -1))  # type: ignore[union-attr]
    shrink.keep_kv_heads_(second, torch.tensor([0]))
    shrink.keep_reads_(second, "mlp", torch.arange(6))
    shrink.drop_mlp_(third)
    assert forward_flops(model).total == counted(model, family)
    shrink.drop_attention_(third)
    found = forward_flops(model)
    assert found.total == counted(model, family)
    assert found.blocks[2] == 0


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit"])
def test_the_count_of_a_narrower_stream(family: str) -> None:
    model: Any = build(family)
    slim_(model)
    shrink.keep_hidden_(model, torch.arange(9))
    assert forward_flops(model).total == counted(model, family)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_the_count_of_a_sliced_model(family: str) -> None:
    model: Any = build(family)
    bh.prune(model, bh.SliceGPT(sparsity=0.25), batches_for(family))
    found = forward_flops(model)
    assert found.total == counted(model, family)
    assert found.blocks == [block_flops(b, LENGTH) for b in find_blocks(model, anatomy_of(model))]


def test_nothing_is_read_or_changed() -> None:
    model: Any = build("llama")
    slim_(model)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    forward_flops(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not find_blocks(model, anatomy_of(model))[0]._forward_pre_hooks
    assert int(model.config.vocab_size) == VOCABULARY
