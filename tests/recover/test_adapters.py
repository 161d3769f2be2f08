"""Adapters: the same function at the start, the trained function after the merge, and never a zero less."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook import BillhookError
from billhook.anatomy import anatomy_of, sites_of
from billhook.recover import KINDS, Adapter, Kind, attach
from billhook.sparsity.patterns import NM
from tiny import batches_for, build

MERGEABLE: tuple[Kind, ...] = ("mask_lora", "scale_lora", "scale_lora_full", "lora_prune")
EXACT: tuple[Kind, ...] = ("mask_lora", "scale_lora", "scale_lora_full")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse_layer(
    rows: int = 6, columns: int = 8, *, conv: bool = False, seed: int = 0, sparsity: float = 0.5
) -> tuple[nn.Linear | Conv1D, Tensor]:
    """A pruned layer with a bias, and its mask [out, in]."""
    generator = seeded(seed)
    layer = Conv1D(rows, columns) if conv else nn.Linear(columns, rows)
    keep = torch.rand(rows, columns, generator=generator) >= sparsity
    weight = torch.randn(rows, columns, generator=generator).masked_fill(~keep, 0.0)
    with torch.no_grad():
        layer.weight.copy_(weight.T if conv else weight)
        layer.bias.normal_(generator=generator)
    return layer, keep


def randomise(adapter: Adapter, scale: float = 0.3, seed: int = 3) -> None:
    """Give A and B values far from their start."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + 0.2)


def by_formula(kind: Kind, weight: Tensor, keep: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The effective weight, entry by entry in float64."""
    rows, columns = weight.shape
    rank = len(a)
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            product = sum(float(b[i, k]) * float(a[k, j]) for k in range(rank))
            w = float(weight[i, j])
            if kind == "scale_lora":
                result[i, j] = w * product
            elif kind == "scale_lora_full":
                result[i, j] = w * (1 + product)
            elif kind == "mask_lora":
                result[i, j] = w + (alpha / rank * product if keep[i, j] else 0.0)
            else:
                result[i, j] = w + alpha / rank * product
    return result


def pruned_model(family: str, pattern: NM | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model with all its sites pruned at random to one half, and the masks."""
    model = build(family)
    generator = seeded(5)
    masks = {}
    for block in sites_of(model, anatomy_of(model)):
        for site in block:
            scores = torch.rand(site.shape, generator=generator)
            masks[site.name] = pattern.keep(scores, 0.5) if pattern else scores > 0.5
            site.mask(masks[site.name])
    return model, masks


def attach_everywhere(
    model: nn.Module, masks: dict[str, Tensor], kind: Kind, rank: int = 4, alpha: float = 8.0
) -> dict[str, Adapter]:
    generator = seeded(1)
    return {name: attach(model.get_submodule(name), kind, keep, rank, alpha, generator) for name, keep in masks.items()}


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(batches_for(family, count=1)[0]).logits
    return result


# -- what an adapter computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_formula(kind: Kind, conv: bool) -> None:
    layer, keep = sparse_layer(conv=conv)
    weight = (layer.weight.T if conv else layer.weight).detach().clone()
    adapter = attach(layer, kind, keep, 3, 5.0, seeded())
    randomise(adapter)
    a, b = (p.detach() for p in adapter.parameters())
    expected = by_formula(kind, weight, keep, a, b, 5.0)
    torch.testing.assert_close(adapter.effective().double(), expected, rtol=1e-6, atol=1e-6)
    x = torch.randn(2, 5, 8, generator=seeded(9))
    y = x.double() @ expected.T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_starts_as_the_sparse_model(family: str, kind: Kind) -> None:
    model, masks = pruned_model(family)
    before = logits(model, family)
    attach_everywhere(model, masks, kind)
    assert float((logits(model, family) - before).abs().max()) <= 1e-6


@given(st.integers(1, 40), st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_every_rank_starts_at_the_sparse_weight(rank: int, kind: Kind) -> None:
    layer, keep = sparse_layer(40, 40)
    weight = layer.weight.detach().clone()
    adapter = attach(layer, kind, keep, rank, 2.0 * rank, seeded())
    assert [p.shape for p in adapter.parameters()] == [(rank, 40), (40, rank)]
    torch.testing.assert_close(adapter.effective(), weight, rtol=1e-6, atol=0)


def test_scale_lora_starts_symmetric_and_lora_kaiming_uniform() -> None:
    layer, keep = sparse_layer(32, 64)
    for parameter in attach(layer, "scale_lora", keep, 5, 1.0, seeded()).parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 5**-0.5), rtol=1e-6, atol=0)
    for kind in ("mask_lora", "scale_lora_full", "lora", "lora_prune"):
        layer, keep = sparse_layer(32, 64)
        a, b = (p.detach() for p in attach(layer, kind, keep, 16, 1.0, seeded()).parameters())
        assert not b.any()
        assert 0.95 / 8 < float(a.abs().max()) <= 1 / 8  # 1/√64
        assert float(a.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)  # of a uniform distribution


def test_the_generator_decides_the_start() -> None:
    starts = []
    for seed in (0, 0, 1):
        layer, keep = sparse_layer()
        starts.append(attach(layer, "mask_lora", keep, 4, 8.0, seeded(seed)).parameters()[0].detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
def test_gradients_of_mask_lora_are_the_formula(conv: bool) -> None:
    layer, keep = sparse_layer(conv=conv)
    adapter = attach(layer.double(), "mask_lora", keep, 3, 6.0, seeded())
    adapter.factors.double()
    randomise(adapter)
    x = torch.randn(20, 8, dtype=torch.float64, generator=seeded(1))
    target = torch.randn(20, 6, dtype=torch.float64, generator=seeded(2))
    layer(x).sub(target).square().sum().backward()
    a, b = adapter.parameters()
    with torch.no_grad():
        error = 2 * (x @ adapter.effective().T + layer.bias - target)
        whole = error.T @ x  # ∂W_eff
        torch.testing.assert_close(b.grad, 2.0 * (keep * whole) @ a.T, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.grad, 2.0 * b.T @ (keep * whole), rtol=1e-10, atol=1e-10)
    assert layer.parametrizations.weight.original.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_agrees_with_finite_differences(kind: Kind) -> None:
    layer, keep = sparse_layer(3, 4)
    adapter = attach(layer.double(), kind, keep, 2, 3.0, seeded())
    randomise(adapter)
    adapter.factors.double()
    x = torch.randn(5, 4, dtype=torch.float64, generator=seeded(1))
    a, b = adapter.parameters()

    def function(a: Tensor, b: Tensor) -> Tensor:
        names = ["parametrizations.weight.0.a", "parametrizations.weight.0.b"]
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, (a, b), strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (a.detach().requires_grad_(), b.detach().requires_grad_()))


def test_an_empty_mask_leaves_no_gradient_and_no_effect() -> None:
    layer, _ = sparse_layer(sparsity=2.0)
    assert not layer.weight.any()
    adapter = attach(layer, "mask_lora", torch.zeros(6, 8, dtype=torch.bool), 3, 6.0, seeded())
    randomise(adapter)
    x = torch.randn(20, 8, generator=seeded(1))
    assert torch.equal(layer(x), layer.bias.expand(20, 6))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())
    adapter.merge()
    assert not layer.weight.any()


def test_with_nothing_masked_mask_lora_is_lora_step_by_step() -> None:
    x, target = torch.randn(32, 8, generator=seeded(1)), torch.randn(32, 6, generator=seeded(2))
    losses: dict[str, list[float]] = {}
    for kind in ("lora", "mask_lora"):
        layer, _ = sparse_layer(sparsity=0.0)
        adapter = attach(layer, kind, torch.ones(6, 8, dtype=torch.bool), 3, 6.0, seeded())
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
        losses[kind] = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[kind].append(float(loss.detach()))
    assert losses["lora"][-1] < 0.95 * losses["lora"][0]
    assert losses["mask_lora"] == pytest.approx(losses["lora"], abs=1e-6)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_merged_model_is_the_trained_model(family: str, kind: Kind) -> None:
    model, masks = pruned_model(family)
    sparse = logits(model, family)
    adapters = attach_everywhere(model, masks, kind)
    for index, adapter in enumerate(adapters.values()):
        randomise(adapter, scale=0.1, seed=index)
    trained = logits(model, family)
    assert float((trained - sparse).abs().max()) > 1e-2  # there is something to get wrong
    for adapter in adapters.values():
        adapter.merge()
    assert float((logits(model, family) - trained).abs().max()) <= 1e-5
    for name, keep in masks.items():
        layer = model.get_submodule(name)
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        assert torch.equal(weight != 0, keep)


@pytest.mark.parametrize("conv", [False, True])
def test_lora_prune_merges_under_the_mask_and_loses_the_rest(conv: bool) -> None:
    layer, keep = sparse_layer(conv=conv)
    weight = (layer.weight.T if conv else layer.weight).detach().clone()
    adapter = attach(layer, "lora_prune", keep, 3, 6.0, seeded())
    randomise(adapter)
    a, b = (p.detach().clone() for p in adapter.parameters())
    x = torch.randn(10, 8, generator=seeded(1))
    trained = layer(x).detach()
    adapter.merge()
    expected = by_formula("mask_lora", weight, keep, a, b, 6.0)
    merged = layer.weight.T if conv else layer.weight
    torch.testing.assert_close(merged.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert float((layer(x).detach() - trained).abs().max()) > 0.1


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.sampled_from(MERGEABLE), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_merge_never_fills_a_zero(
    rows: int, columns: int, sparsity: float, kind: Kind, conv: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layer, keep = sparse_layer(rows, columns, conv=conv, sparsity=sparsity)
    layer.to(dtype)
    adapter = attach(layer, kind, keep, rank, 2.0, seeded())
    randomise(adapter, scale=-0.7)  # signs change: 0 · negative must not leave a -0
    adapter.merge()
    weight = layer.weight.T if conv else layer.weight
    assert weight.dtype == dtype
    assert torch.equal(weight[~keep].view(torch.uint8), torch.zeros_like(weight[~keep]).view(torch.uint8))
    assert int(torch.count_nonzero(weight)) <= int(keep.sum())


@pytest.mark.parametrize("kind", MERGEABLE)
def test_two_of_four_stays_two_of_four(kind: Kind) -> None:
    model, masks = pruned_model("llama", NM(2, 4))
    adapters = attach_everywhere(model, masks, kind)
    for index, adapter in enumerate(adapters.values()):
        randomise(adapter, seed=index)
        adapter.merge()
    for name in masks:
        weight = model.get_submodule(name).weight
        assert (weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1) == 2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merging_what_was_not_trained_changes_no_bit(kind: Kind, rank: int, dtype: torch.dtype) -> None:
    layer, keep = sparse_layer()
    layer.to(dtype)
    before = layer.weight.detach().clone()
    attach(layer, kind, keep, rank, 8.0, seeded()).merge()
    assert torch.equal(layer.weight, before)


def test_a_kept_weight_that_is_zero_is_free_to_move() -> None:
    layer, keep = sparse_layer(sparsity=0.0)
    with torch.no_grad():
        layer.weight[0, :4] = 0.0
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    randomise(adapter)
    adapter.merge()
    assert (layer.weight[0, :4] != 0).all()


def test_lora_refuses_to_fill_zeros_and_merges_where_nothing_is_masked() -> None:
    layer, keep = sparse_layer()
    for mask, advice in ((keep, "train mask_lora instead\\."), (None, "say with keep= what may be filled")):
        adapter = attach(layer, "lora", mask, 3, 6.0, seeded())
        randomise(adapter)
        trained = adapter.effective()
        zeros = int((~keep).sum())
        with pytest.raises(BillhookError, match=rf"would fill {zeros} of the zeros of a Linear of \[6, 8\].*{advice}"):
            adapter.merge()
        assert torch.equal(adapter.effective(), trained)  # still attached and usable
        adapter.remove()
    for mask in (None, torch.ones(6, 8, dtype=torch.bool)):
        layer, _ = sparse_layer(sparsity=0.0)
        adapter = attach(layer, "lora", mask, 3, 6.0, seeded())
        randomise(adapter)
        trained = adapter.effective().detach()
        adapter.merge()
        assert torch.equal(layer.weight, trained)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(value: float, dtype: torch.dtype) -> None:
    layer, keep = sparse_layer()
    layer.to(dtype)
    before = layer.weight.detach().clone()
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(value)
    with pytest.raises(BillhookError, match=r"merged weight of a Linear of \[6, 8\] has NaN or infinite values"):
        adapter.merge()
    adapter.remove()
    assert torch.equal(layer.weight, before)


# -- the layer afterwards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("ending", ["merge", "remove"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_layer_is_plain_again(conv: bool, ending: str, trained: bool) -> None:
    layer, keep = sparse_layer(conv=conv)
    layer.weight.requires_grad_(trained)
    kind, parameter = type(layer), layer.weight
    keys, names = list(layer.state_dict()), [name for name, _ in layer.named_parameters()]
    members = set(vars(layer))
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    assert type(layer) is not kind
    randomise(adapter)
    getattr(adapter, ending)()
    assert type(layer) is kind
    assert layer.weight is parameter
    assert layer.weight.requires_grad is trained
    assert list(layer.state_dict()) == keys
    assert [name for name, _ in layer.named_parameters()] == names
    assert set(vars(layer)) == members
    for again in (adapter.merge, adapter.remove):
        with pytest.raises(BillhookError, match="merged or removed already"):
            again()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_remove_is_bit_equal(kind: Kind, dtype: torch.dtype) -> None:
    layer, keep = sparse_layer()
    layer.to(dtype)
    with torch.no_grad():
        layer.weight[keep] *= -1
        layer.weight.mul_(keep)  # leaves -0 at some masked places
    bits = layer.weight.detach().clone().view(torch.uint8)
    adapter = attach(layer, kind, keep, 3, 6.0, seeded())
    randomise(adapter)
    x = torch.randn(4, 8).to(dtype)
    layer(x).float().sum().backward()
    adapter.remove()
    assert torch.equal(layer.weight.detach().view(torch.uint8), bits)


# -- storage in 16 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_run_and_train_with_float32_factors(family: str, kind: Kind, dtype: torch.dtype) -> None:
    model, masks = pruned_model(family)
    model.to(dtype)
    before = logits(model, family)
    adapters = attach_everywhere(model, masks, kind)
    assert torch.equal(logits(model, family), before)
    output = model(batches_for(family, count=1)[0]).logits
    assert output.dtype == dtype
    output.float().square().mean().backward()
    for adapter in adapters.values():
        _, b = adapter.parameters()
        assert b.dtype == torch.float32
        assert b.grad is not None
        assert b.grad.dtype == torch.float32
        assert bool(b.grad.any())
        original = adapter.module.parametrizations.weight.original
        assert original.dtype == dtype
        assert original.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_merge_is_the_function_that_was_trained(dtype: torch.dtype) -> None:
    layer, keep = sparse_layer()
    layer.to(dtype)
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    randomise(adapter)
    x = torch.randn(4, 8, generator=seeded(1)).to(dtype)
    exact = adapter.effective().detach()
    trained = layer(x).detach()
    adapter.merge()
    assert torch.equal(layer.weight, exact.to(dtype))
    assert torch.equal(layer(x), trained)


def test_autocast_does_not_round_the_product() -> None:
    layer, keep = sparse_layer()
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    randomise(adapter)
    expected = layer.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)
        assert layer(torch.randn(4, 8)).dtype == torch.bfloat16


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [-1, 0, 7])
def test_ranks_that_do_not_fit(rank: int) -> None:
    layer, keep = sparse_layer()
    with pytest.raises(BillhookError, match=rf"Rank {rank} does not fit a Linear of \[6, 8\]: use a rank from 1 to 6"):
        attach(layer, "mask_lora", keep, rank, 6.0, seeded())
    assert type(layer) is nn.Linear


def test_mistakes_are_named() -> None:
    layer, keep = sparse_layer(conv=True)

    def refuses(match: str, module: nn.Module = layer, **change: object) -> None:
        options = {"kind": "mask_lora", "keep": keep, "rank": 2, "alpha": 4.0, "generator": seeded(), **change}
        with pytest.raises(BillhookError, match=match):
            attach(module, **options)  # type: ignore[arg-type]

    refuses(r"'masklora' is not known \(did you mean 'mask_lora'\?\)", kind="masklora")
    refuses("needs an nn.Linear or a Conv1D, not a Embedding", module=nn.Embedding(8, 6))
    refuses(r"mask of a Conv1D of \[6, 8\] is torch.float32 \[6, 8\]", keep=keep.float())
    refuses(r"mask of a Conv1D of \[6, 8\] is torch.bool \[8, 6\]", keep=keep.T)
    refuses("nonzero weights outside its mask: prune it before", keep=keep & (torch.arange(8) > 3))
    refuses(r"mask_lora needs the mask of a Conv1D of \[6, 8\]", keep=None)
    refuses(r"lora_prune needs the mask", keep=None, kind="lora_prune")
    refuses("alpha is 0", alpha=0.0)
    refuses("alpha is nan", alpha=float("nan"))
    attach(layer, "mask_lora", keep, 2, 4.0, seeded())
    refuses(r"weight of a Conv1D of \[6, 8\] is parametrised already")


def test_a_weight_written_outside_the_mask_meanwhile_is_noticed() -> None:
    layer, keep = sparse_layer()
    adapter = attach(layer, "mask_lora", keep, 3, 6.0, seeded())
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(~keep)
    with pytest.raises(BillhookError, match=f"would fill {int((~keep).sum())} of the zeros .* mask it again"):
        adapter.merge()
