"""Reconstruction of a block: towards the least-squares optimum, in a fixed order, with errors that are true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from billhook import BillhookError
from billhook.anatomy import anatomy_of, find_blocks, sites_of
from billhook.recover import Kind, attach, mean_squared_error, parameters_of, reconstruct
from tiny import batches_for, build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_of(
    family: str, prune: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Callable[[int], Tensor], list[Tensor], dict[str, Tensor]]:
    """The first block of a tiny model, its forward on three batches, the dense outputs, and the masks by name."""
    model = build(family).to(dtype)
    block = find_blocks(model, anatomy_of(model))[0]
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches_for(family):
            model(batch, use_cache=False)
    handle.remove()

    def forward(index: int) -> Tensor:
        args, kwargs = calls[index]
        output = block(*args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    with torch.no_grad():
        targets = [forward(index) for index in range(3)]
    masks = {}
    if prune:
        for site in sites_of(model, anatomy_of(model))[0]:
            threshold = site.weight.abs().median()
            masks[site.projection] = site.weight.abs() > threshold
            site.mask(masks[site.projection])
    return block, forward, targets, masks


def masked_optimum(x: Tensor, y: Tensor, keep: Tensor) -> float:
    """The least mean squared error of x Wᵀ against y over W that are zero outside the mask, in float64."""
    total = 0.0
    for row in range(len(keep)):
        inputs = x[:, keep[row]].double()
        target = y[:, row].double()
        weight = torch.linalg.solve(inputs.T @ inputs, inputs.T @ target)
        total += float((inputs @ weight - target).square().sum())
    return total / y.numel()


@pytest.mark.parametrize("rows", [6, 10])
def test_one_layer_reaches_the_masked_least_squares_optimum_and_not_more(rows: int) -> None:
    generator = seeded(rows)
    columns = 8
    dense = torch.randn(rows, columns, generator=generator)
    x = torch.randn(96, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    y = x @ dense.T
    keep = torch.rand(rows, columns, generator=generator) > 0.5
    keep[:, 0] = True
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(dense * keep)
    adapter = attach(layer, "mask_lora", keep, min(rows, columns), 16.0, generator)
    groups = parameters_of(layer, {"adapters"})
    before, after = reconstruct(lambda i: layer(x), layer, groups, [y], 2000, 2e-2)
    optimum = masked_optimum(x, y, keep)
    assert before == pytest.approx(float((x @ (dense * keep).T - y).double().square().mean()), rel=1e-5)
    assert before > 1.2 * optimum > 0.1  # there is something to gain, and something that cannot be
    assert optimum * (1 - 1e-6) <= after <= 1.01 * optimum
    adapter.merge()
    assert mean_squared_error(lambda i: layer(x), [y]) == pytest.approx(after, rel=1e-5)
    assert torch.equal(layer.weight != 0, keep)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_block_with_nothing_pruned_has_no_error(family: str) -> None:
    block, forward, targets, _ = block_of(family, prune=False)
    before, after = reconstruct(forward, block, parameters_of(block, {"norm"}), targets, 0, 1e-3)
    assert before == after
    assert before <= 1e-10


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora_full"])
def test_a_pruned_block_comes_closer_and_keeps_its_zeros(family: str, kind: Kind) -> None:
    block, forward, targets, masks = block_of(family, prune=True)
    pruned = mean_squared_error(forward, targets)
    generator = seeded(1)
    adapters = [attach(block.get_submodule(name), kind, keep, 8, 16.0, generator) for name, keep in masks.items()]
    with torch.no_grad():  # as inside a walk
        groups = parameters_of(block, {"norm", "adapters"})
        rates = {"norm": 1e-2, "adapters": 5e-3}
        before, after = reconstruct(forward, block, groups, targets, 45, rates)
    assert before == pytest.approx(pruned, rel=1e-5)
    assert after < 0.8 * before
    for adapter in adapters:
        adapter.merge()
    assert mean_squared_error(forward, targets) == pytest.approx(after, rel=1e-4)
    for name, keep in masks.items():
        layer = block.get_submodule(name)
        weight = layer.weight.T if family == "gpt2" else layer.weight
        assert torch.equal(weight != 0, keep)


def test_batches_are_cycled_in_order() -> None:
    layer = nn.Linear(4, 2)
    x = [torch.randn(5, 4, generator=seeded(i)) for i in range(3)]
    seen: list[tuple[int, bool]] = []

    def forward(index: int) -> Tensor:
        seen.append((index, torch.is_grad_enabled()))
        result: Tensor = layer(x[index])
        return result

    reconstruct(forward, layer, parameters_of(layer, {"bias"}), [torch.zeros(5, 2)] * 3, 4, 1e-2, accumulate=2)
    errors = [(index, False) for index in range(3)]
    assert seen == [*errors, *[(index % 3, True) for index in range(8)], *errors]


def test_errors_are_means_over_all_entries() -> None:
    outputs = [torch.randn(n, 3, generator=seeded(n)) for n in (2, 7)]
    targets = [torch.randn(n, 3, generator=seeded(9 + n)) for n in (2, 7)]
    expected = float((torch.cat(outputs) - torch.cat(targets)).double().square().mean())
    assert mean_squared_error(lambda i: outputs[i], targets) == pytest.approx(expected, rel=1e-6)
    low = [t.bfloat16() for t in targets]
    expected = float((torch.cat(outputs) - torch.cat(low).float()).double().square().mean())
    assert mean_squared_error(lambda i: outputs[i], low) == pytest.approx(expected, rel=1e-6)
    both = [o.bfloat16() for o in outputs]
    expected = float((torch.cat(both).double() - torch.cat(low).double()).square().mean())
    assert mean_squared_error(lambda i: both[i], low) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_blocks_are_reconstructed_in_their_storage() -> None:
    block, forward, targets, masks = block_of("opt", prune=True, dtype=torch.bfloat16)
    assert targets[0].dtype == torch.bfloat16
    adapters = [attach(block.get_submodule(n), "mask_lora", k, 8, 16.0, seeded()) for n, k in masks.items()]
    groups = parameters_of(block, {"norm", "adapters"})
    before, after = reconstruct(forward, block, groups, targets, 45, {"norm": 1e-2, "adapters": 5e-3})
    assert after < 0.8 * before
    for adapter in adapters:
        adapter.merge()
    assert all(p.dtype == torch.bfloat16 for p in block.parameters())


def test_autocast_covers_the_forward_but_not_the_error() -> None:
    layer = nn.Linear(4, 2)
    x, dtypes = torch.randn(5, 4, generator=seeded()), []

    def forward(index: int) -> Tensor:
        result: Tensor = layer(x)
        dtypes.append(result.dtype)
        return result

    target = torch.full((5, 2), 1000.125)  # bfloat16 would round it
    options = (forward, layer, parameters_of(layer, {"bias"}), [target], 1, 0.0)
    before, after = reconstruct(*options, autocast=True)
    assert set(dtypes) == {torch.bfloat16}
    assert before == after
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert before == pytest.approx(float((output.double() - 1000.125).square().mean()), rel=1e-6)


def test_mistakes_are_named() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(5, 4)
    groups = parameters_of(layer, {"bias"})
    with pytest.raises(BillhookError, match="no targets are given"):
        reconstruct(lambda i: layer(x), layer, groups, [], 3, 1e-2)
    with pytest.raises(BillhookError, match=r"Batch 0 of the block's output is \[5, 2\] but its target is \[2\]"):
        reconstruct(lambda i: layer(x), layer, groups, [torch.zeros(2)], 3, 1e-2)
