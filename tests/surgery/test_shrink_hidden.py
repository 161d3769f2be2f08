"""Removing hidden dimensions: the narrower model computes what the whole one does with those channels at zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.errors import BillhookError
from billhook.surgery import shrink
from billhook.surgery.modeling_slim import NarrowNorm
from billhook.surgery.slim import is_slim, slim_
from tiny import FAMILIES, OTHERS, TEXT_FAMILIES, batches_for, build, tiny_tokenizer, weights_of

HIDDEN = 32
# by the names of the parameters, not by what the library knows of them
_TABLES = ("embed", "wte", "wpe", "cls_token", "distillation_token")


def slim_model(family: str) -> Any:
    model = build(family)
    for module in model.modules():
        for name in ("attention_dropout", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    slim_(model)
    for block in find_blocks(model, anatomy_of(model)):
        block.dropout_p = 0.0
    return model


def zero_channels(model: nn.Module, gone: Tensor, plus_one: bool) -> None:
    """What writes the channels is zero, in norms too; norms stay stock ones, which divide by the whole width."""
    touched = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if ".o_proj." in name or ".down_proj." in name or ".transform.dense." in name or "projection" in name:
                p[gone] = 0
            elif "norm" in name.lower() and "q_norm" not in name and "k_norm" not in name and "q_layer" not in name:
                p[gone] = -1 if plus_one and leaf == "weight" else 0
            elif name.startswith("transformer.ln_f"):
                p[gone] = 0
            elif any(word in name for word in _TABLES):
                p[..., gone] = 0
            else:
                continue
            touched += 1
    assert touched >= 3 * 4


def outputs(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        batch = batches_for(family)[0]
        dtype = next(model.parameters()).dtype
        result: Tensor = model(batch.to(dtype) if batch.is_floating_point() else batch)[0]
    return result


def same(family: str, whole: Any, small: Any, keep: Tensor) -> None:
    for mode in (True, False):
        want, got = outputs(whole.train(mode), family), outputs(small.train(mode), family)
        if want.shape != got.shape:  # a base model, whose output is the stream
            assert family.endswith("-base")
            want = want[..., keep]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    if family in TEXT_FAMILIES:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        ids = batches_for(family)[0][:, :7]
        assert torch.equal(whole.generate(ids, **options), small.generate(ids, **options))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_a_removed_hidden_dimension_is_one_at_zero(family: str, data: st.DataObject) -> None:
    whole = slim_model(family).double()  # stock RMSNorms round to float32 nevertheless
    small = copy.deepcopy(whole)
    count = data.draw(st.integers(8, HIDDEN), "kept")
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed")))
    keep, gone = order[:count].sort().values, order[count:]
    zero_channels(whole, gone, anatomy_of(whole).norm_plus_one)
    shrink.keep_hidden_(small, keep)
    same(family, whole, small, keep)
    assert all(block.stream == (count,) * 3 for block in find_blocks(small, anatomy_of(small)))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_nothing_of_the_removed_width_is_left(family: str) -> None:
    """7 channels: no other width of the model is that."""
    small = slim_model(family)
    before = sum(p.numel() for p in small.parameters())
    shrink.keep_hidden_(small, torch.arange(7))
    after = dict(small.named_parameters())
    assert sum(p.numel() for p in after.values()) < 0.5 * before
    for name, p in after.items():
        if p.ndim == 2 and "pooler" not in name and "classifier" not in name:
            assert 7 in p.shape, name
        if p.ndim == 1 and "norm" in name.lower() and "q_norm" not in name and "k_norm" not in name:
            assert p.shape == (7,), name
    assert any(isinstance(module, NarrowNorm) for module in small.modules())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma", "gemma2", "bert", "vit", "bert-base"])
def test_hidden_dimensions_are_removed_one_set_after_the_other(family: str) -> None:
    once, twice = slim_model(family), slim_model(family)
    first, second = torch.tensor([1, 2, 3, 5, 8, 13, 21, 30]), torch.tensor([0, 3, 4, 7])
    shrink.keep_hidden_(once, first[second])
    shrink.keep_hidden_(twice, first)
    shrink.keep_hidden_(twice, second)
    assert once.config.slim == twice.config.slim
    assert torch.equal(outputs(once, family), outputs(twice, family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "phi", "bert", "vit", "bert-base", "llama-base"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_narrower_model_is_saved_and_pruned_on(family: str, stream: bool, tmp_path: Path) -> None:
    model = slim_model(family)
    tied = bool((model.all_tied_weights_keys or {}) and model.config.tie_word_embeddings)
    shrink.keep_hidden_(model, torch.arange(0, HIDDEN, 3))
    text = family in TEXT_FAMILIES
    bh.save(model, tiny_tokenizer() if text else None, tmp_path / "narrow")
    again, _ = bh.load(tmp_path / "narrow")
    assert is_slim(again)
    assert torch.equal(outputs(again, family), outputs(model.eval(), family))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    if tied and family not in ("bert-base", "llama-base"):
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight  # type: ignore[operator]
    method = bh.method("fasp", sparsity=0.2)
    bh.prune(model, method, batches_for(family), precision="highest")
    if stream:
        opened, _ = bh.load(tmp_path / "narrow", stream=True)
        bh.prune(opened, method, batches_for(family), out=tmp_path / "out", precision="highest")
        again, _ = bh.load(tmp_path / "out")
    else:
        bh.prune(again, method, batches_for(family), precision="highest")
    want = weights_of(model)
    assert all(torch.equal(p, want[name]) for name, p in again.named_parameters())


def test_what_cannot_be_narrowed_is_said() -> None:
    keep = torch.arange(8)
    with pytest.raises(BillhookError, match="make it slim first"):
        shrink.keep_hidden_(build("llama"), keep)
    model = slim_model("llama")
    with pytest.raises(BillhookError, match="hidden dimensions must be distinct and within 0 to 31"):
        shrink.keep_hidden_(model, torch.tensor([32]))
    shrink.keep_reads_(find_blocks(model, anatomy_of(model))[0], "mlp", keep)
    with pytest.raises(BillhookError, match="read or write only a part"):
        shrink.keep_hidden_(model, keep)
    sliced: Any = build("llama")
    bh.prune(sliced, bh.method("slicegpt", sparsity=0.25), batches_for("llama"))
    with pytest.raises(BillhookError, match="was rotated"):
        shrink.keep_hidden_(sliced, keep)
    narrow = slim_model("llama")
    shrink.keep_hidden_(narrow, torch.arange(16))
    with pytest.raises(BillhookError, match="were removed, so it cannot be rotated"):
        bh.prune(narrow, bh.method("slicegpt", sparsity=0.25), batches_for("llama"))


def test_a_stream_between_projections_is_refused_and_left_as_it_was() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from tiny import FAMILIES as known

    model: Any = OPTForCausalLM(OPTConfig(**{**known["opt"][2], "word_embed_proj_dim": 16}))
    slim_(model)
    before = weights_of(model)
    with pytest.raises(BillhookError, match=r"embed_tokens\.weight has the shape \[96, 16\]"):
        shrink.keep_hidden_(model, torch.arange(8))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_head_that_is_not_declared_is_refused() -> None:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    model: Any = ViTForMaskedImageModeling(ViTConfig(**{**FAMILIES["vit"][2], "encoder_stride": 8}))
    slim_(model)
    with pytest.raises(BillhookError, match="What reads the last hidden state of SlimViTForMaskedImageModeling"):
        shrink.keep_hidden_(model, torch.arange(8))
