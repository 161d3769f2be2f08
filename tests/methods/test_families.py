"""Every method on a tiny model of every family."""

from __future__ import annotations

import pytest
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, sites_of
from billhook.sparsity.select import budget
from tiny import FAMILIES, batches_for, build, weights_of

METHODS = [
    bh.Magnitude(sparsity=0.5),
    bh.Magnitude(sparsity=0.5, scope="row"),
    bh.Magnitude(sparsity=0.5, scope="global"),
    bh.Magnitude(pattern="2:4"),
    bh.Wanda(sparsity=0.5),
    bh.Wanda(sparsity=0.3, scope="layer"),
    bh.Wanda(pattern="2:4"),
    bh.Wanda(pattern="4:8"),
    bh.RIA(sparsity=0.5),
    bh.RIA(sparsity=0.5, scope="row"),
    bh.RIA(pattern="2:4"),
    bh.SparseGPT(sparsity=0.5),
    bh.SparseGPT(sparsity=0.5, scope="row"),
    bh.SparseGPT(pattern="2:4"),
    bh.SparseGPT(pattern="4:8"),
    bh.SparseGPT(sparsity=0.5, true_sequential=False),
]


def label(method: bh.Method) -> str:
    given = {k: v for k, v in method.options().items() if v != type(method).model_fields[k].default}
    return method.name + "".join(f"-{v}" for v in given.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_budget_and_what_must_not_change(method: bh.Method, family: str) -> None:
    model = build(family)
    before = weights_of(model)
    report = bh.prune(model, method, batches_for(family), precision="highest")

    sites = [site for block in sites_of(model, anatomy_of(model)) for site in block]
    assert [r.site for r in report.steps[0].sites] == [s.name for s in sites]
    pruned = {f"{site.name}.weight" for site in sites}
    for name, old in before.items():
        if name not in pruned:
            assert torch.equal(old, dict(model.named_parameters())[name]), f"{name} is no site but changed"
    scope, pattern = method.scope, method.nm  # type: ignore[attr-defined]
    sparsity = method.overall  # type: ignore[attr-defined]
    zeros = {site.name: site.weight == 0 for site in sites}
    if pattern is not None:
        for z in zeros.values():
            assert (z.reshape(-1, pattern.m).sum(1) == pattern.m - pattern.n).all()
    elif scope == "global":
        total = sum(s.numel for s in sites)
        assert sum(int(z.sum()) for z in zeros.values()) == budget(total, sparsity)
    elif scope == "row":
        assert all((zeros[s.name].sum(1) == budget(s.shape[1], sparsity)).all() for s in sites)
    else:
        assert all(int(zeros[s.name].sum()) == budget(s.numel, sparsity) for s in sites)
    if method.name != "sparsegpt":  # kept weights are untouched
        for site in sites:
            old = before[f"{site.name}.weight"]
            old = old if old.shape == site.shape and type(site.module).__name__ != "Conv1D" else old.T
            assert torch.equal(site.weight, old.masked_fill(zeros[site.name], 0.0))
    for record in report.steps[0].sites:
        assert record.sparsity == pytest.approx(float(zeros[record.site].double().mean()), abs=1e-9)
        assert record.error is not None
        assert 0 < record.error < 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_sparsity_zero_leaves_every_bit(name: str, family: str) -> None:
    model = build(family)
    before = weights_of(model)
    bh.prune(model, bh.method(name, sparsity=0.0), batches_for(family))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_feeds_what_the_model_itself_computes(family: str) -> None:
    """Inputs of every site and the final output equal those of plain forward passes of the pruned model."""
    model = build(family)
    batches = batches_for(family)
    bh.prune(model, bh.Wanda(sparsity=0.4), batches, precision="highest")
    walk = bh.walk(model, batches, precision="highest", needs="forward")
    norms: dict[str, torch.Tensor] = {}
    for block in walk:
        norms.update({site.name: norm for site, norm in block.collect(bh.ColumnNorm).items()})
    with walk.outputs() as outputs:
        ours = [getattr(o, "logits", o) for o in outputs]

    plain: dict[str, torch.Tensor] = {}
    handles = []
    for site in [s for block in walk.sites for s in block]:

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = site.name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            plain[name] = plain.get(name, 0) + x.square().sum(0)

        handles.append(site.module.register_forward_pre_hook(hook))
    with torch.no_grad():
        theirs = [model(b).logits for b in batches]
    for handle in handles:
        handle.remove()
    assert norms.keys() == plain.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(norm, plain[name].sqrt().float(), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
