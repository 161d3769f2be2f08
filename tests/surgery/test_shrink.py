"""Removing parts: the smaller model computes what the whole one does with those parts at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from billhook.anatomy import anatomy_of, find_blocks
from billhook.errors import BillhookError
from billhook.surgery import shrink
from billhook.surgery.slim import dims_of, refresh, resize_, settle_, slim_
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build

_BUILT: dict[str, nn.Module] = {}


def slim_model(family: str) -> Any:
    if family not in _BUILT:
        model = build(family)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            for module in model.modules():
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        slim_(model)
        _BUILT[family] = model
    return copy.deepcopy(_BUILT[family])


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def zero(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    with torch.no_grad():
        if rows is not None:
            linear.weight[rows] = 0
            if linear.bias is not None:
                linear.bias[rows] = 0
        if columns is not None:
            linear.weight[:, columns] = 0


def spread(index: Tensor, width: int) -> Tensor:
    return (index[:, None] * width + torch.arange(width)).flatten()


def random_keep(size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(size, generator=generator)
    return order[:count].sort().values, order[count:]


def cut_neurons(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    width = whole.mlp.down_proj.in_features
    keep, gone = random_keep(width, draw(width), generator)
    zero(whole.mlp.down_proj, columns=gone)
    shrink.keep_neurons_(small, keep)


def cut_heads(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    attention = whole.self_attn
    keep, gone = random_keep(attention.heads, draw(attention.heads), generator)
    zero(attention.o_proj, columns=spread(gone, attention.v))
    shrink.keep_heads_(small, keep)


def cut_kv_heads(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    attention = whole.self_attn
    keep, gone = random_keep(attention.kv_heads, draw(attention.kv_heads), generator)
    readers = torch.tensor([h for h, t in enumerate(shrink.owners(attention)) if t in gone.tolist()], dtype=torch.long)
    zero(attention.o_proj, columns=spread(readers, attention.v))
    shrink.keep_kv_heads_(small, keep)


def cut_values(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    attention = whole.self_attn
    count = draw(attention.v)
    split = [random_keep(attention.v, count, generator) for _ in range(attention.kv_heads)]
    for head, (_, gone) in enumerate(split):
        zero(attention.v_proj, rows=head * attention.v + gone)
    shrink.keep_values_(small, torch.stack([keep for keep, _ in split]))


def cut_query_key(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    attention = whole.self_attn
    if hasattr(attention, "q_norm"):  # refused, so there is nothing to compare
        with pytest.raises(BillhookError, match="normalised over the head"):
            shrink.keep_pairs_(small, torch.zeros(attention.kv_heads, 1, dtype=torch.long))
        return
    half = attention.rotary_dim // 2
    size = half or attention.qk
    count = draw(size)
    split = [random_keep(size, count, generator) for _ in range(attention.kv_heads)]
    for head, (_, gone) in enumerate(split):
        rows = torch.cat([gone, gone + half]) if half else gone
        zero(attention.k_proj, rows=head * attention.qk + rows)
    keep = torch.stack([keep for keep, _ in split])
    (shrink.keep_pairs_ if half else shrink.keep_channels_)(small, keep)


def cut_attention(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    zero(whole.self_attn.o_proj, rows=torch.arange(whole.self_attn.o_proj.out_features))
    shrink.drop_attention_(small)


def cut_mlp(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    zero(whole.mlp.down_proj, rows=torch.arange(whole.mlp.down_proj.out_features))
    shrink.drop_mlp_(small)


def cut_reads(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    for part, owner in (("attention", whole.self_attn), ("mlp", whole.mlp)):
        matrices = [m for m in owner.children() if isinstance(m, nn.Linear)][:-1]
        keep, gone = random_keep(matrices[0].in_features, draw(matrices[0].in_features), generator)
        for linear in matrices:
            zero(linear, columns=gone)
        shrink.keep_reads_(small, part, keep)  # type: ignore[arg-type]


def cut_writes(whole: Any, small: Any, draw: Callable[[int], int], generator: torch.Generator) -> None:
    for part, linear in (("attention", whole.self_attn.o_proj), ("mlp", whole.mlp.down_proj)):
        keep, gone = random_keep(linear.out_features, draw(linear.out_features), generator)
        zero(linear, rows=gone)
        shrink.keep_writes_(small, part, keep)  # type: ignore[arg-type]


CUTS = [cut_neurons, cut_heads, cut_kv_heads, cut_values, cut_query_key, cut_attention, cut_mlp, cut_reads, cut_writes]


def same(family: str, whole: Any, small: Any) -> None:
    """Equal outputs in training and evaluation mode, and equal greedy text with a cache."""
    refresh(small)
    inputs = batches_for(family)[0]
    with torch.no_grad():
        for mode in (True, False):
            want, got = whole.train(mode)(inputs).logits, small.train(mode)(inputs).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        if family in TEXT_FAMILIES:
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert torch.equal(whole.generate(inputs[:, :7], **options), small.generate(inputs[:, :7], **options))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_removed_part_is_a_part_at_zero(family: str, cut: Any, data: st.DataObject) -> None:
    whole, small = slim_model(family), slim_model(family)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    for one, other in zip(blocks_of(whole), blocks_of(small), strict=True):
        if data.draw(st.booleans(), "this block"):
            cut(one, other, lambda size: data.draw(st.integers(1, size), "kept"), generator)
    same(family, whole, small)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_removed_one_after_the_other(family: str) -> None:
    whole, small = slim_model(family), slim_model(family)
    generator = torch.Generator().manual_seed(3)
    cuts = [cut_values, cut_neurons, cut_kv_heads]
    for one, other in zip(blocks_of(whole), blocks_of(small), strict=True):
        for cut in cuts:
            if cut is cut_kv_heads:
                # the widths of `one` are still whole: remove by the same indices
                keep = torch.tensor([0])
                gone = torch.tensor([h for h, t in enumerate(shrink.owners(one.self_attn)) if t > 0])
                zero(one.self_attn.o_proj, columns=spread(gone, one.self_attn.v))
                shrink.keep_kv_heads_(other, keep)
            else:
                cut(one, other, lambda size: max(1, size // 2), generator)
    same(family, whole, small)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "bert")])  # BERT’s blocks end in a norm
def test_removed_blocks_are_blocks_that_add_nothing(family: str) -> None:
    whole, small = slim_model(family), slim_model(family)
    middle = blocks_of(whole)[1]
    cut_attention(middle, copy.deepcopy(middle), lambda n: n, torch.Generator())
    cut_mlp(middle, copy.deepcopy(middle), lambda n: n, torch.Generator())
    shrink.keep_blocks_(small, [0, 2])
    assert small.config.num_hidden_layers == 2
    same(family, whole, small)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_width_in_every_layer_is_a_stock_model(family: str) -> None:
    model = slim_model(family)
    for block in blocks_of(model):
        shrink.keep_neurons_(block, torch.arange(0, 48, 3))
    inputs = batches_for(family)[0]
    with torch.no_grad():
        want = model(inputs).logits
        settle_(model)
        assert type(model).__name__ == FAMILIES[family][0]
        assert not hasattr(model.config, "slim")
        torch.testing.assert_close(model(inputs).logits, want, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build(family).parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_whole_kv_groups_leave_a_stock_model(family: str) -> None:
    model = slim_model(family)
    for block in blocks_of(model):
        shrink.keep_kv_heads_(block, torch.tensor([1]))
    inputs = batches_for(family)[0]
    with torch.no_grad():
        want = model(inputs).logits
        settle_(model)
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
        assert type(model).__name__ == FAMILIES[family][0]
        torch.testing.assert_close(model(inputs).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen3"])
def test_a_block_takes_the_shapes_of_its_description(family: str) -> None:
    """What resuming does: a fresh block gets the shapes that an earlier process left, then its weights."""
    model, fresh = slim_model(family), slim_model(family)
    block, other = blocks_of(model)[0], blocks_of(fresh)[0]
    generator = torch.Generator().manual_seed(0)
    for cut in (cut_values, cut_neurons, cut_reads, cut_writes):
        cut(copy.deepcopy(block), block, lambda size: max(1, size // 2), generator)
    if family != "qwen3":
        cut_query_key(copy.deepcopy(block), block, lambda size: max(1, size // 2), generator)
    resize_(other, fresh.config.slim, dims_of(block))
    assert dims_of(other) == dims_of(block)
    other.load_state_dict(block.state_dict())
    same(family, model, fresh)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt"])
def test_stream_channels_are_removed_one_set_after_the_other(family: str) -> None:
    """Indices are into what is left; what a block then says of itself is into the stream."""
    once, twice = slim_model(family), slim_model(family)
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(blocks_of(once), blocks_of(twice), strict=True):
        for keep_ in (shrink.keep_reads_, shrink.keep_writes_):
            for part in ("attention", "mlp"):
                first = random_keep(32, 20, generator)[0]
                second = random_keep(20, 9, generator)[0]
                keep_(one, part, first[second])  # type: ignore[arg-type]
                keep_(other, part, first)  # type: ignore[arg-type]
                keep_(other, part, second)  # type: ignore[arg-type]
        assert dims_of(one) == dims_of(other)
    same(family, once, twice)


def test_all_stream_channels_are_a_stock_model_and_some_are_none() -> None:
    model, some = slim_model("llama"), slim_model("llama")
    for block, other in zip(blocks_of(model), blocks_of(some), strict=True):
        shrink.keep_reads_(block, "mlp", torch.arange(32))
        shrink.keep_writes_(block, "attention", torch.arange(32))
        shrink.keep_reads_(other, "mlp", torch.arange(31))
    settle_(model)
    settle_(some)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(some).__name__ == "SlimLlamaForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_writes_nothing_is_removed(family: str) -> None:
    whole, small = slim_model(family), slim_model(family)
    for index, (one, other) in enumerate(zip(blocks_of(whole), blocks_of(small), strict=True)):
        part = ("attention", "mlp")[index % 2]
        (cut_attention, cut_mlp)[index % 2](one, copy.deepcopy(one), lambda n: n, torch.Generator())
        shrink.keep_writes_(other, part, torch.tensor([], dtype=torch.long))  # type: ignore[arg-type]
        assert (other.self_attn, other.mlp)[index % 2] is None
    same(family, whole, small)


def test_a_channel_that_no_block_writes_is_the_embedding() -> None:
    model = slim_model("llama")
    generator = torch.Generator().manual_seed(2)
    for block in blocks_of(model):
        shrink.keep_writes_(block, "attention", 2 * random_keep(16, 9, generator)[0])
        shrink.keep_writes_(block, "mlp", 2 * random_keep(16, 12, generator)[0])
    seen: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids = batches_for("llama")[0]
    with torch.no_grad():
        model(ids)
        embedded = model.model.embed_tokens(ids)
    assert torch.equal(seen[0][..., 1::2], embedded[..., 1::2])
    assert not torch.equal(seen[0][..., ::2], embedded[..., ::2])


def test_gradients_reach_what_reads_and_writes_some_channels() -> None:
    """Also after a pass without any: what such a pass leaves behind must be of use to the next."""
    model = slim_model("llama")
    for block in blocks_of(model):
        cut_reads(copy.deepcopy(block), block, lambda size: size // 2, torch.Generator().manual_seed(0))
        cut_writes(copy.deepcopy(block), block, lambda size: size // 2, torch.Generator().manual_seed(1))
    ids = batches_for("llama")[0]
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_or_too_much_to_keep_is_said() -> None:
    block = blocks_of(slim_model("llama"))[0]
    with pytest.raises(BillhookError, match="Nothing would be left of the 48 neurons"):
        shrink.keep_neurons_(block, torch.tensor([], dtype=torch.long))
    with pytest.raises(BillhookError, match="distinct and within 0 to 3"):
        shrink.keep_heads_(block, torch.tensor([4]))
    with pytest.raises(BillhookError, match="normalised over the head"):
        shrink.keep_pairs_(blocks_of(slim_model("qwen3"))[0], torch.tensor([[0], [0]]))
    with pytest.raises(BillhookError, match="Nothing would be left of the 32 channels read"):
        shrink.keep_reads_(block, "mlp", torch.tensor([], dtype=torch.long))
    with pytest.raises(BillhookError, match="channels written must be distinct and within 0 to 31"):
        shrink.keep_writes_(block, "mlp", torch.tensor([3, 3]))
    shrink.drop_mlp_(block)
    with pytest.raises(BillhookError, match="MLP of this block was removed"):
        shrink.keep_reads_(block, "mlp", torch.tensor([0]))
    with pytest.raises(BillhookError, match="make the model slim first"):
        shrink.keep_neurons_(build("llama").get_submodule("model.layers.0"), torch.tensor([0]))
