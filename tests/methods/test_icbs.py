"""iCBS: what its search keeps, and that it lowers the loss it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import billhook as bh
from billhook.anatomy import Site, anatomy_of, sites_of
from billhook.calibrate.fisher import LayerGradients, SampleGradients, next_token_losses
from billhook.calibrate.walk import Walk
from billhook.methods.icbs import Search, _parse_budget
from tiny import batches_for, build, site_weights, weights_of

SMALL = {"variables": 64, "tokens": 16, "sequences": 2, "blocks_per_step": 2, "keep": "last"}


def pruned(**options: Any) -> tuple[torch.nn.Module, bh.Report]:
    model = build("llama")
    report = bh.prune(model, bh.ICBS(**SMALL | options), batches_for("llama", count=4), precision="highest")
    return model, report


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("solver", ["swap", "anneal", "local"])
def test_counts_stay_and_kept_weights_are_the_dense_ones(pattern: str, solver: str) -> None:
    start, _ = pruned(budget="0 steps", pattern=pattern)
    model, _ = pruned(budget="3 steps", pattern=pattern, solver=solver)
    dense = site_weights(build("llama"))
    before, after = site_weights(start), site_weights(model)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, weight in after.items():
        kept = weight != 0
        assert int(kept.sum()) == int((before[name] != 0).sum()), name
        assert torch.equal(weight[kept], dense[name][kept]), name
        if pattern == "2:4":
            assert (kept.reshape(len(kept), -1, 4).sum(dim=2) == 2).all(), name


@pytest.mark.parametrize("start", ["wanda", "magnitude", "ria"])
def test_no_steps_are_the_starting_mask(start: str) -> None:
    model, report = pruned(budget="0 steps", start=start)
    reference = build("llama")
    bh.prune(reference, bh.method(start, scope="row"), batches_for("llama", count=4), precision="highest")
    a, b = site_weights(model), site_weights(reference)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "too small for one step" in report.steps[0].notes[0]


def test_the_loss_falls_with_the_budget() -> None:
    """On the batches that the search sees, summed over them: what it optimises."""
    values = []
    batches = batches_for("llama", count=4)
    for steps in (0, 60):
        model, _ = pruned(budget=f"{steps} steps", density=0.3, variables=256, tokens=32)
        with torch.no_grad():
            values.append(float(torch.cat([next_token_losses(model, b) for b in batches]).mean()))
    assert values[1] < values[0]


def test_frozen_weights_never_change_and_tabu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    searches: list[Search] = []
    real = Search._solve

    def watched(self: Search, layer: Any, gradients: Any, number: int) -> float:
        result = real(self, layer, gradients, number)
        searches.append(self)
        if layer.waiting:
            seen.setdefault(layer.site.name, []).append(layer.waiting[-1].clone())
        return result

    monkeypatch.setattr(Search, "_solve", watched)
    start, _ = pruned(budget="0 steps")
    model, _ = pruned(budget="12 steps", variables=16)
    before, after = site_weights(start), site_weights(model)
    for name, layer in searches[-1].layers.items():
        changed = ((before[name] != 0) != (after[name] != 0)).flatten()
        assert not bool((changed & ~layer.free).any())
        capacity = round(0.4 * int(layer.free.sum()))
        blocks = seen.get(name, [])
        for earlier, later in pairwise(blocks):
            if len(earlier) + len(later) <= capacity:
                assert not set(earlier.tolist()) & set(later.tolist())


def searched(steps: int, **options: Any) -> Iterator[tuple[Search, float, torch.Tensor, torch.Tensor]]:
    """A search on one matrix with made-up gradients: (it, predicted change, G [samples, out * in], mask before)."""
    generator = torch.Generator().manual_seed(4)
    method = bh.ICBS(**{"start": "magnitude", "variables": 32} | options)
    layer = torch.nn.Linear(40, 24, bias=False)
    layer.weight.data = torch.randn(24, 40, generator=generator)
    site, dense = Site("layer", 0, "layer", layer), layer.weight.data.clone()
    site.mask(method.density_pattern.keep(dense.abs(), method.overall))
    search = Search(method, [site], {"layer": dense})
    search.begin({"layer": method._free(dense.abs().flatten(), (site.weight == 0).flatten())}, 1.0)
    for _ in range(steps):
        # small gradients, so that the linear term asks for moves
        d, x = (scale * torch.randn(6, 5, n, generator=generator) for scale, n in ((0.02, 24), (1.0, 40)))
        before = search.layers["layer"].pruned.clone()
        captured = SampleGradients(torch.zeros(6), {"layer": LayerGradients("layer", [(x, d)])})
        predicted = search.step(search.sites(), captured)
        yield search, predicted, torch.einsum("sto,sti->soi", d.double(), x.double()).flatten(1), before


def test_what_a_step_predicts_is_the_second_order_model_of_what_it_did() -> None:
    """From the weights before and after alone, with the gradients of the whole matrix: signs, indices, multipliers."""
    moves = 0
    for search, predicted, gradients, before in searched(10, gradient=0.6, ridge=0.3):
        layer = search.layers["layer"]
        old, new = (torch.where(pruned, 0.0, layer.dense.flatten()).double() for pruned in (before, layer.pruned))
        assert torch.equal(layer.site.weight.flatten().double(), new)
        step = new - old
        price = 0.3 * gradients[:, layer.waiting[-1]].square().mean()  # per weight that changes
        model = 0.6 * gradients.mean(0) @ step + (gradients @ step).square().mean() / 2 + price * step.square().sum()
        assert predicted == pytest.approx(float(model), rel=1e-4, abs=1e-12)
        assert predicted <= 0
        moves += bool(step.any())
    assert moves >= 8


def test_every_step_keeps_counts_values_and_frozen_weights_and_lets_blocks_wait() -> None:
    blocks: list[set[int]] = []
    for search, _, _, before in searched(20):
        layer = search.layers["layer"]
        assert int(layer.pruned.sum()) == int(before.sum()) == 480
        assert torch.equal(layer.site.weight, layer.dense.masked_fill(layer.pruned.view(24, 40), 0.0))
        changed = layer.pruned != before
        assert not (changed & ~layer.free).any()
        blocks.append(set(layer.waiting[-1].tolist()))
        assert set(changed.nonzero()[:, 0].tolist()) <= blocks[-1]
    # lowest 42% of the pruned and highest 35% of the kept are frozen; 40% of the rest wait
    size = layer.dense.abs().flatten()
    for side, share, largest in ((size < size.median(), 0.42, False), (size >= size.median(), 0.35, True)):
        extreme = size.masked_fill(~side, -1.0 if largest else 9.0).topk(int(share * 480), largest=largest).indices
        assert not layer.free[extreme].any()
    free = 960 - int(0.42 * 480) - int(0.35 * 480)
    assert int(layer.free.sum()) == free
    window = round(0.4 * free) // 32
    assert window == 7
    for t, block in enumerate(blocks):
        assert len(block) == 32
        assert not block & set().union(*blocks[max(0, t - window) : t])
    assert any(block & blocks[t] for t, block in enumerate(blocks[window + 1 :]))  # and then may come back


def test_density_one_keeps_every_bit_and_density_zero_is_refused() -> None:
    before = weights_of(build("llama"))
    after = weights_of(pruned(density=1.0, budget="2 steps")[0])
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(bh.BillhookError, match=r"density=0.0 is not possible"):
        bh.ICBS(density=0.0)


def test_interrupted_keeps_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Search.sites

    def stopping(self: Search) -> list[Site]:
        if self.number == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Search, "sites", stopping)
    _, report = pruned(budget="50 steps", keep="best")
    assert "Interrupted after 4 steps" in report.steps[0].notes[0]
    assert report.steps[0].sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("selection", ["gradient", "random"])
def test_a_killed_search_goes_on_with_the_same_bits(
    selection: str, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = make_folder(), batches_for("llama", count=4)
    method = bh.ICBS(**SMALL | {"budget": "12 steps", "selection": selection})
    whole, _ = bh.load(folder, stream=True)
    bh.prune(whole, method, batches, out=tmp_path / "whole", precision="highest")

    monkeypatch.setattr(Walk.keep_state, "__kwdefaults__", {"every": 0.0})
    real = Search.sites

    def killed(self: Search) -> list[Site]:
        if self.number == 7:
            raise RuntimeError("killed")
        return real(self)

    monkeypatch.setattr(Search, "sites", killed)
    model, _ = bh.load(folder, stream=True)
    with pytest.raises(RuntimeError, match="killed"):
        bh.prune(model, method, batches, out=tmp_path / "out", precision="highest")
    seen: list[int] = []
    monkeypatch.setattr(Search, "sites", lambda self: (seen.append(self.number), real(self))[1])
    model, _ = bh.load(folder, stream=True)
    bh.prune(model, method, batches, out=tmp_path / "out", precision="highest")
    assert seen[0] == 7
    a, _ = bh.load(tmp_path / "whole")
    b, _ = bh.load(tmp_path / "out")
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_works_on_a_classifier_with_labels() -> None:
    model = build("vit")
    generator = torch.Generator().manual_seed(0)
    pixels = [b if isinstance(b, torch.Tensor) else b["pixel_values"] for b in batches_for("vit", count=3)]
    count = model(pixels[0]).logits.shape[1]
    batches = [{"pixel_values": p, "labels": torch.randint(count, (len(p),), generator=generator)} for p in pixels]
    report = bh.prune(model, bh.ICBS(**SMALL | {"budget": "3 steps"}), batches)
    assert report.steps[0].sparsity == pytest.approx(0.5, abs=1e-3)


def test_memory_of_the_search_is_bounded_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that outlives a step, and what is captured in one; 30 steps hold no more than the formula says."""
    captured: list[int] = []
    held: list[list[int]] = []
    inner = Search.step

    def step(self: Any, sites: Any, gradients: Any) -> float:
        value = inner(self, sites, gradients)
        tensors = {id(x): x for layer in gradients.layers.values() for call in layer.calls for x in call}
        captured.append(sum(x.numel() * x.element_size() for x in tensors.values()))
        layers = self.layers.values()
        held.append(
            [
                sum(t.numel() * t.element_size() for t in self.dense.values()),
                sum(layer.pruned.numel() + layer.free.numel() for layer in layers)
                + sum(m.numel() * m.element_size() for m in self.best.values())
                + sum(w.numel() * w.element_size() for layer in layers for w in layer.waiting),
            ]
        )
        return value

    monkeypatch.setattr(Search, "step", step)
    model = build("llama")
    options = bh.ICBS(sparsity=0.5, budget="30 steps", variables=64, blocks_per_step=4, sequences=2, tokens=16)
    bh.prune(model, options, batches_for("llama"))
    sites = [site for block in sites_of(model, anatomy_of(model)) for site in block]
    prunable, widest = sum(site.numel for site in sites), max(sum(site.shape) for site in sites)
    assert max(captured) <= 4 * 4 * 2 * 16 * widest
    assert max(dense for dense, _ in held) == 4 * prunable
    assert max(rest for _, rest in held) <= (4 + 8 * options.tabu) * prunable


def test_same_seed_same_mask() -> None:
    a, b = site_weights(pruned(budget="3 steps")[0]), site_weights(pruned(budget="3 steps")[0])
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", (90.0, None)),
        ("10m", (600.0, None)),
        ("1h", (3600.0, None)),
        ("300 steps", (None, 300)),
        ("1 step", (None, 1)),
    ],
)
def test_budgets(text: str, expected: tuple[float | None, int | None]) -> None:
    assert _parse_budget(text) == expected


def test_bad_budget_gets_a_sentence() -> None:
    with pytest.raises(bh.BillhookError, match="a time such as 90s"):
        bh.ICBS(budget="ten minutes")
