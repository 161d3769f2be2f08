"""Slim blocks in the place of stock ones: the same outputs, and the way back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from billhook.anatomy import anatomy_of, find_blocks, sites_of
from billhook.errors import BillhookError
from billhook.surgery import shrink
from billhook.surgery.slim import class_named, is_slim, refresh, settle_, slim_
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_slim_model_computes_the_same_and_settles_to_the_same(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):  # Transformers refuses the setting
        pytest.skip("capped scores need eager attention")
    model = build(family)
    model.set_attn_implementation(attention)  # type: ignore[operator]
    whole, inputs = copy.deepcopy(model), batches_for(family)[0]
    with torch.no_grad():
        want = whole(inputs, output_hidden_states=True)
        slim_(model)
        assert is_slim(model)
        got = model(inputs, output_hidden_states=True)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        assert len(got.hidden_states) == len(want.hidden_states)
        if family in TEXT_FAMILIES:
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert torch.equal(model.generate(inputs[:, :5], **options), whole.generate(inputs[:, :5], **options))  # type: ignore[operator]
        settle_(model)
        assert type(model) is type(whole)
        assert torch.equal(model(inputs).logits, want.logits)
    for (name, one), (other_name, other) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    written = ("architectures", "n_inner")  # None where a default was meant
    before, after = ({k: v for k, v in m.config.to_dict().items() if k not in written} for m in (whole, model))
    assert before == after


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_hidden_states_are_given_by_a_model_that_gave_them_before(family: str) -> None:
    model: Any = build(family)
    inputs = batches_for(family)[0]
    with torch.no_grad():
        want = model(inputs, output_hidden_states=True).hidden_states
        slim_(model)
        for _ in range(2):
            got = model(inputs, output_hidden_states=True).hidden_states
            assert len(got) == len(want)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            settle_(model)


def test_padding_and_a_mask_reach_the_slim_attention() -> None:
    model = build("llama")
    whole = copy.deepcopy(model)
    slim_(model)
    ids = batches_for("llama")[0]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        got, want = (m(ids, attention_mask=mask).logits for m in (model, whole))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("narrow", ["values", "pairs"])
def test_unequal_widths_of_a_head_use_the_fused_kernel_too(narrow: str) -> None:
    """Fused kernels want one width for queries, keys and values; the result is that of attention written out."""
    model = build("llama")
    slim_(model)
    for block in find_blocks(model, anatomy_of(model)):
        heads = block.self_attn.kv_heads
        if narrow == "values":
            shrink.keep_values_(block, torch.arange(block.self_attn.v - 3).repeat(heads, 1))
        else:
            shrink.keep_pairs_(block, torch.arange(block.self_attn.qk // 2 - 1).repeat(heads, 1))
        assert block.self_attn.qk != block.self_attn.v
    refresh(model)
    ids = batches_for("llama")[0]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        want = model(ids).logits
        model.set_attn_implementation("sdpa")
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # or an error: there is no other
            got = model(ids).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        cached = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=cached.past_key_values)
        torch.testing.assert_close(step.logits[:, -1], want[:, -1], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_slim_weight() -> None:
    model = build("llama")
    slim_(model)
    ids = batches_for("llama")[0]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_a_slim_model_have_one_set_of_names(family: str) -> None:
    model = build(family)
    slim_(model)
    anatomy = anatomy_of(model)
    names = [site.projection for site in sites_of(model, anatomy)[0]]
    gate = ["mlp.gate_proj"] if anatomy.mlp is not None and anatomy.mlp.gated else []
    assert names == [*(f"self_attn.{p}_proj" for p in "qkvo"), *gate, "mlp.up_proj", "mlp.down_proj"]


def test_slim_classes_have_names_and_are_found_by_them() -> None:
    model = build("opt")
    slim_(model)
    assert type(model).__name__ == "SlimOPTForCausalLM"
    assert class_named("SlimOPTForCausalLM") is type(model)
    assert class_named("OPTForCausalLM") is None
    assert class_named("SlimNothing") is None
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(type(model))  # weights are saved as tensors, never so


def test_a_plain_module_has_no_slim_form() -> None:
    import billhook as bh

    bh.declare(bh.Anatomy(family="bare", model_types=("bare",), blocks="layers"))

    class Bare(torch.nn.Module):
        config = type("Config", (), {"model_type": "bare"})()

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    with pytest.raises(BillhookError, match="names no attention and MLP"):
        slim_(Bare())
