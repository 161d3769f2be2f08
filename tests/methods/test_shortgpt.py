"""ShortGPT: influence as plain hooks measure it, the right blocks leave, and what is left works on its own."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.influence import block_influence
from billhook.calibrate.walk import Walk
from billhook.run import reshape
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, weights_of


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def hooked_influence(model: nn.Module, batches: list[Tensor]) -> list[float]:
    """1 − mean cosine of what enters and leaves each block, one dense pass, all tokens."""
    cosines: list[list[Tensor]] = [[] for _ in blocks_of(model)]

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).double()
            y = (output[0] if isinstance(output, tuple) else output).double()
            cosines[index].append(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).flatten())

        return hook

    handles = [b.register_forward_hook(watch(i), with_kwargs=True) for i, b in enumerate(blocks_of(model))]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return [1 - float(torch.cat(c).mean()) for c in cosines]


def attentions(model: nn.Module) -> list[Any]:
    anatomy = anatomy_of(model)
    assert anatomy.attention is not None
    return [block.get_submodule(anatomy.attention.module) for block in blocks_of(model)]


def cached_as_plain(model: Any, ids: Tensor) -> None:
    """Token by token through the cache: the scores of one pass over all of it."""
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(ids, use_cache=True, output_scores=True, return_dict_in_generate=True, **options)
    assert made.sequences.shape[1] == ids.shape[1] + 14
    with torch.no_grad():
        scores = model(made.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(made.scores, 1), scores, rtol=1e-4, atol=1e-4)


def deep(family: str, layers: int = 5) -> Any:
    """A tiny model with more blocks, its layer kinds alternating where the family has kinds."""
    cls, config, options = FAMILIES[family]
    name = "n_layer" if "n_layer" in options else "num_hidden_layers"
    with mock.patch.dict(FAMILIES, {family: (cls, config, {**options, name: layers})}):
        return build(family)


def identity_(block: nn.Module, anatomy: Any) -> None:
    """Make a block pass what enters: nothing is added by attention or MLP."""
    for path in (anatomy.attention.output, anatomy.mlp.output):
        linear: Any = block.get_submodule(path)
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_what_hooks_measure(family: str) -> None:
    model = build(family)
    batches = batches_for(family, count=3)
    batches.append(batches_for(family, count=1, size=1, seed=5)[0])  # tokens count, not batches
    want = hooked_influence(model, batches)
    assert block_influence(Walk(model, batches, precision="highest")) == pytest.approx(want, abs=1e-5)
    reshape(model)
    assert block_influence(Walk(model, batches, precision="highest")) == pytest.approx(want, abs=1e-5)
    assert not any(m._forward_hooks for m in model.modules())
    split = [row[None] for batch in batches for row in batch]
    assert block_influence(Walk(model, split, precision="highest")) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_least_influential_blocks_leave(family: str) -> None:
    model = deep(family)
    whole, batches = copy.deepcopy(model), batches_for(family)
    influence = hooked_influence(whole, batches)
    report = bh.prune(model, bh.method("shortgpt", sparsity=0.4), batches)
    gone = {*sorted(range(5), key=influence.__getitem__)[:2]}
    kept = [i for i in range(5) if i not in gone]
    assert type(model) is type(whole)
    for block, old in zip(blocks_of(model), (blocks_of(whole)[i] for i in kept), strict=True):
        for (name, p), (other, q) in zip(block.named_parameters(), old.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(p, q)
    # the dense model with the other blocks passed over
    expected = copy.deepcopy(whole)
    for index in gone:
        block = blocks_of(expected)[index]
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    ids = batches[0]
    with torch.no_grad():
        if getattr(model.config, "layer_types", None) is None:  # else the masks of the kinds move
            torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    removed = {s.block for s in report.steps[0].sites if s.sparsity == 1.0}
    assert removed == gone
    assert {s.block for s in report.steps[0].sites} == {*range(5)}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_block_that_does_nothing_is_the_first_to_go(family: str, place: int) -> None:
    model = deep(family)
    anatomy = anatomy_of(model)
    identity_(blocks_of(model)[place], anatomy)
    whole, batches = copy.deepcopy(model), batches_for(family)
    assert hooked_influence(whole, batches)[place] == pytest.approx(0, abs=1e-6)
    bh.prune(model, bh.method("shortgpt", sparsity=0.2), batches)
    assert len(blocks_of(model)) == 4
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, whole(batches[0]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "qwen3", "mistral", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("gone", [(0,), (1, 3), (4,), (0, 1, 2)])
def test_configuration_of_what_is_left(family: str, gone: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(family)
    kinds = copy.copy(getattr(model.config, "layer_types", None))
    windows = [getattr(m, "sliding_window", None) for m in attentions(model)]
    influence = [0.0 if i in gone else 1.0 for i in range(5)]
    monkeypatch.setattr("billhook.methods.shortgpt.block_influence", lambda walk: influence)
    bh.prune(model, bh.method("shortgpt", sparsity=len(gone) / 5), batches_for(family))
    kept = [i for i in range(5) if i not in gone]
    assert model.config.num_hidden_layers == len(kept)
    modules = attentions(model)
    assert [m.layer_idx for m in modules] == list(range(len(kept)))
    assert [getattr(m, "sliding_window", None) for m in modules] == [windows[i] for i in kept]
    if kinds is not None:
        assert model.config.layer_types == [kinds[i] for i in kept]
    again: Any = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    ids = batches_for(family)[0]
    for one in (model, again):
        cached_as_plain(one, ids[:, :9])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_counts_and_what_is_too_much() -> None:
    batches = batches_for("llama")
    for sparsity, left in ((0.0, 5), (0.2, 4), (0.5, 3), (0.6, 2), (0.85, 1)):
        model = deep("llama")
        bh.prune(model, bh.method("shortgpt", sparsity=sparsity), batches)
        assert len(blocks_of(model)) == left, sparsity
    model = deep("llama")
    before = weights_of(model)
    with pytest.raises(bh.BillhookError, match="95% of 5 blocks would leave none"):
        bh.prune(model, bh.method("shortgpt", sparsity=0.95), batches)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    total = sum(p.numel() for p in model.parameters())
    outside = total - sum(p.numel() for b in blocks_of(model) for p in b.parameters())
    with pytest.raises(bh.BillhookError, match=r"9[0-9]% of 5 blocks would leave none"):
        bh.prune(deep("llama"), bh.method("shortgpt", target_size=1.2 * outside / total), batches)
    with pytest.raises(bh.BillhookError, match="cannot be reached"):
        bh.prune(deep("llama"), bh.method("shortgpt", target_size=0.5 * outside / total), batches)


def test_nothing_asked_leaves_every_bit() -> None:
    for family in ("llama", "gemma3_text", "gpt2"):
        model = build(family)
        before, kind = weights_of(model), type(model)
        bh.prune(model, bh.method("shortgpt", sparsity=0.0), batches_for(family))
        assert type(model) is kind
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_training_mode_and_gradients_are_left_as_they_were() -> None:
    model = deep("llama")
    model.train()
    bh.prune(model, bh.method("shortgpt", sparsity=0.4), batches_for("llama"))
    assert all(m.training for m in model.modules())
    ids = batches_for("llama")[0]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
