"""Passes that halt at every stage, beside passes that are made anew for every stage."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import Site
from billhook.calibrate.halting import Halting, Rehearsal
from billhook.calibrate.statistics import ColumnNorm
from billhook.calibrate.walk import Block, Walk
from tiny import FAMILIES, batches_for, build, weights_of


def by_halves(block: Block, **options: Any) -> list[list[str]]:
    """Zero the half of each site's columns that its inputs matter least to; returns what came together."""
    seen = []
    for sites, norms in block.in_turn(ColumnNorm, **options):
        seen.append([site.projection for site in sites])
        for site in sites:
            keep = norms[site] > norms[site].median()
            site.mask(keep[None, :].expand(site.shape))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_halted_passes_are_passes_made_anew(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {}
    runs = []
    run = Halting._run
    monkeypatch.setattr(Halting, "_run", lambda self, batch: runs.append(batch) or run(self, batch))
    for halts in (True, False):
        models[halts] = build(family)
        with monkeypatch.context() as patch:
            if not halts:
                patch.setattr(Walk, "has_room", lambda self, width: False)
            walk = bh.walk(models[halts], batches_for(family))
            for block in walk:
                assert by_halves(block) == [[s.projection for s in stage] for stage in block.stages]
        errors = [record.error for record in walk.block_records]
        assert all(error is None or error >= 0 for error in errors)
        models[halts] = weights_of(models[halts]), errors, [r.error for r in walk.site_records]
    assert runs  # passes of this family do halt
    for name, weight in models[True][0].items():
        assert torch.equal(weight, models[False][0][name]), name
    assert models[True][1:] == models[False][1:]


def test_every_batch_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    batches = batches_for("llama", count=4)
    calls: list[int] = []
    walk = bh.walk(model, batches)
    counted = walk.blocks[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: calls.append(1))
    blocks = iter(walk)
    by_halves(next(blocks))
    next(blocks)
    counted.remove()
    assert len(calls) == len(batches) + 1  # and the first one as it was, for the report


@pytest.mark.parametrize("limit", [None, 1 << 20, 1 << 40])
def test_passes_halt_where_there_is_room(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.calibrate.walk.resident_memory", lambda: 1 << 20)
    walk = bh.walk(build("llama"), batches_for("llama"))
    blocks = iter(walk)
    next(blocks)
    walk.max_memory = limit
    assert walk.has_room(64) == (limit != 1 << 20)
    assert not walk.has_room(1 << 50)


def test_together_is_one_collection() -> None:
    blocks = iter(bh.walk(build("llama"), batches_for("llama")))
    block = next(blocks)
    ((sites, norms),) = block.in_turn(ColumnNorm, together=True)
    assert sites == block.sites
    collected = block.collect(ColumnNorm)
    assert all(torch.equal(norms[site], collected[site]) for site in sites)


class Twice(nn.Module):
    """A block that calls its first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(self.one(x).relu()).relu())


class Backwards(Twice):
    """A block that calls its layers in another order than it declares them."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(self.two(x).relu())


class Switching(Twice):
    """A block that changes a mode of PyTorch around a layer."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.one(x)
        return x + self.two(y.float().relu())


class Moody(Twice):
    """A block that calls its layers in another order where the first input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.one, self.two) if x[0, 0, 0] > 0 else (self.two, self.one)
        return x + second(first(x).relu())


class Net(nn.Module):
    def __init__(self, block: type[Twice]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


ANATOMY = bh.Anatomy("net", blocks="layers", input=None)


@pytest.mark.parametrize("block", [Twice, Backwards, Switching])
def test_blocks_that_cannot_halt_are_passed_anew(block: type[Twice], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    results = []
    for room in (True, False):
        model = Net(block)
        with monkeypatch.context() as patch:
            patch.setattr(Walk, "has_room", lambda self, width, room=room: room)
            patch.setattr(Halting, "arrive", None)
            for one in bh.walk(model, batches, anatomy=ANATOMY, precision="highest"):
                by_halves(one)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any((weight == 0).any() for weight in results[0].values())


def test_another_order_for_some_batches_is_said() -> None:
    torch.manual_seed(1)
    blocks = iter(bh.walk(Net(Moody), [torch.rand(2, 5, 8), -torch.rand(2, 5, 8)], anatomy=ANATOMY))
    by_halves(next(blocks))
    with pytest.raises(bh.BillhookError, match=r"layers\.0\.one is called in another order for some batches"):
        next(blocks)


class Skipping(Twice):
    """A block that calls no layer where the first input is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu()) if x[0, 0, 0] > 0 else x


def test_batches_that_pass_by_a_site_count_for_nothing() -> None:
    torch.manual_seed(1)
    batches = [torch.rand(2, 5, 8), -torch.rand(2, 5, 8), torch.rand(2, 5, 8)]
    pruned = []
    for given in (batches, [batches[0], batches[2]]):
        model = Net(Skipping)
        for block in bh.walk(model, given, anatomy=ANATOMY):
            by_halves(block)
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[0])


def test_what_a_halted_pass_holds_is_freed() -> None:
    held: list[weakref.ref[Tensor]] = []
    layer = nn.Linear(3, 3)
    site = Site("layer", 0, "layer", layer)

    def forward(batch: int) -> Tensor:
        x = torch.ones(2, 3)
        held.append(weakref.ref(x))
        y: Tensor = layer(x)
        return y

    before = len(layer._forward_pre_hooks)
    passes = Halting(forward, 2, [[site]])
    assert passes.arrive(0, 0) is not None
    assert passes.arrive(0, 1) is not None
    assert torch.equal(passes.finish(0), layer(torch.ones(2, 3)))
    passes.close()
    gc.collect()
    assert all(one() is None for one in held)
    assert len(layer._forward_pre_hooks) == before


def test_an_error_inside_a_pass_comes_out_of_it() -> None:
    layer = nn.Linear(3, 3)

    def forward(batch: int) -> Tensor:
        layer(torch.ones(2, 3))
        raise ValueError("inside")

    passes = Halting(forward, 1, [[Site("layer", 0, "layer", layer)]])
    assert passes.arrive(0, 0) is not None
    with pytest.raises(ValueError, match="inside"):
        passes.finish(0)
    passes.close()


def test_a_rehearsal_hears_every_order() -> None:
    x = torch.ones(1, 2, 8)
    for block, orderly in ((Twice, False), (Backwards, False), (Switching, False), (Skipping, True), (Moody, True)):
        net = block()
        sites = [Site(name, 0, name, net.get_submodule(name)) for name in ("one", "two")]
        rehearsal = Rehearsal([[site] for site in sites])
        net(x)
        assert rehearsal.end() == (orderly, block is Twice), block
        assert not net.one._forward_pre_hooks
    both = Skipping()
    rehearsal = Rehearsal([[Site(name, 0, name, both.get_submodule(name)) for name in ("one", "two")]])
    both(x)
    assert rehearsal.end() == (False, False)  # they do not read one tensor


def test_a_block_whose_passes_have_halted_is_not_passed_beside_them() -> None:
    for block in bh.walk(build("llama"), batches_for("llama")):
        for _ in block.in_turn(ColumnNorm):
            with pytest.raises(bh.BillhookError, match="halted in its middle"):
                block.collect(ColumnNorm)
        break
