"""How much a structured method removes: one goal, and FLOPs that are hit or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.measure.flops import forward_flops
from billhook.measure.latency import count_flops
from billhook.surgery.shrink import keep_neurons_
from billhook.surgery.slim import slim_
from tiny import batches_for, build, weights_of

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fasp", {}),
    ("fasp", {"sharing": "influence"}),
    ("fasp", {"uniform": True}),
    ("magnitude-widths", {}),
    ("modegpt", {}),
    ("modegpt", {"sharing": "uniform", "modules": "mlp+vo"}),
]


def flops(model: nn.Module, family: str) -> int:
    if family in ("vit", "deit"):
        return count_flops(model, batches_for(family, count=1, size=1)[0])
    return count_flops(model, torch.zeros(1, 64, dtype=torch.long))


def label(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


@pytest.mark.parametrize("case", METHODS, ids=label)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_flops_are_hit(family: str, case: tuple[str, dict[str, Any]]) -> None:
    dense = flops(build(family), family)
    for target in (0.93, 0.83):
        model, method = build(family), bh.method(case[0], target_flops=target, **case[1])
        report = bh.prune(model, method, batches_for(family))
        share = flops(model, family) / dense
        assert share == pytest.approx(target, rel=0.01)
        assert any(f"{share:.1%} of the FLOPs" in note for note in report.steps[0].notes)


@pytest.mark.parametrize("name", ["slicegpt", "dotresize", "dynamic-slicing"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_slicing_hits_the_flops_or_says_what_it_can(name: str, family: str) -> None:
    """One step of 32 channels may be more than 1%: then the refusal names the nearest, which is hit."""
    dense, hit = flops(build(family), family), 0
    for target in (0.97, 0.9, 0.8, 0.7):
        model, method = build(family), bh.method(name, target_flops=target, round=1)
        try:
            bh.prune(model, method, batches_for(family))
        except BillhookError as error:
            nearest = float(str(error).split("comes to is ")[1].split("%")[0]) / 100
            assert abs(nearest - target) > 0.009 * target
            continue
        hit += 1
        assert flops(model, family) == pytest.approx(target * dense, rel=0.01)
    assert hit


@pytest.mark.parametrize("family", ["llama", "bert", "gpt_neox"])
def test_blocks_that_leave_whole_reach_few_fractions(family: str) -> None:
    model: Any = build(family)
    slim_(model)
    now = forward_flops(model)
    reachable = (now.total - now.blocks[0]) / now.total
    model = build(family)
    bh.prune(model, bh.method("shortgpt", target_flops=reachable * 1.005), batches_for(family))
    assert flops(model, family) / now.total == pytest.approx(reachable, abs=1e-9)
    model = build(family)
    before = weights_of(model)
    with pytest.raises(BillhookError, match=rf"target_flops=0.8 cannot.*ShortGPT comes to is {reachable:.2%}"):
        bh.prune(model, bh.method("shortgpt", target_flops=0.8), batches_for(family))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in before.values())


def test_blocks_of_different_size_are_counted_as_they_leave() -> None:
    """Which blocks leave is known only from their influence, and so is what is left."""
    model: Any = build("llama")
    slim_(model)
    for block, width in zip(find_blocks(model, anatomy_of(model)), (48, 8, 24), strict=True):
        keep_neurons_(block, torch.arange(width))
    trial = copy.deepcopy(model)
    bh.prune(trial, bh.method("shortgpt", sparsity=0.34), batches_for("llama"))
    target = flops(trial, "llama") / flops(model, "llama")
    bh.prune(model, bh.method("shortgpt", target_flops=target), batches_for("llama"))
    assert flops(model, "llama") == flops(trial, "llama")


def test_everything_may_stay() -> None:
    for name in ("fasp", "modegpt", "shortgpt"):
        model = build("llama")
        before = weights_of(model)
        bh.prune(model, bh.method(name, target_flops=1.0), batches_for("llama"))
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(BillhookError, match="cannot be reached"):  # residual matrices come on top of the whole
        bh.prune(build("llama"), bh.method("slicegpt", target_flops=1.0), batches_for("llama"))


def test_what_cannot_be_reached_is_refused_before_any_work() -> None:
    for name, target in (("fasp", 0.02), ("modegpt", 0.02), ("shortgpt", 0.02), ("slicegpt", 0.02)):
        model: Any = build("llama")
        slim_(model)
        method = bh.method(name, target_flops=target, **({} if name == "shortgpt" else {"sharing": "uniform"}))
        walk = Walk(model, batches_for("llama"))
        with pytest.raises(BillhookError, match=r"target_flops=0.02 cannot be reached: the nearest that .* comes to"):
            method.check(walk)
    with pytest.raises(
        BillhookError, match=r"left by DISP-LLM is not known before it ran: give sparsity or target_size"
    ):
        bh.prune(build("llama"), bh.method("disp-llm", target_flops=0.8), batches_for("llama"))


def test_steps_of_a_width_are_named_where_they_are_too_large() -> None:
    with pytest.raises(BillhookError, match="ask for that, or for a smaller round"):
        bh.prune(build("llama"), bh.method("slicegpt", target_flops=0.9, round=16), batches_for("llama"))


@pytest.mark.parametrize("name", ["fasp", "modegpt", "slicegpt", "dotresize", "shortgpt", "random-widths", "prunenet"])
def test_only_one_goal_may_be_given(name: str) -> None:
    for one, other in (("sparsity", "target_size"), ("sparsity", "target_flops"), ("target_size", "target_flops")):
        with pytest.raises(BillhookError, match=f"{name}: {one} and {other} both say how much to remove"):
            bh.method(name, **{one: 0.3, other: 0.8})
        default = type(bh.method(name)).model_fields["sparsity"].default
        with pytest.raises(BillhookError, match="leave one of them out"):  # also where it is what it is anyway
            bh.method(name, sparsity=default, target_flops=0.8)
    assert bh.method(name, target_size=0.8).options()["target_size"] == 0.8
    assert bh.method(name, sparsity=0.3, target_size=None, target_flops=None).options()["sparsity"] == 0.3


@pytest.mark.parametrize("goal", ["target_size", "target_flops", "sparsity"])
def test_what_a_run_records_is_the_same_method_again(goal: str) -> None:
    """A sparsity that nothing follows is not recorded: it would be a second goal."""
    method = bh.method("fasp", **{goal: 0.8})
    assert ("sparsity" in method.options()) == (goal == "sparsity")
    assert bh.method("fasp", **method.options()).options() == method.options()
    report = bh.prune(build("llama"), bh.method("fasp", **{goal: 0.7}), batches_for("llama"))
    again = dict(report.recipe[0])
    assert bh.method(again.pop("method"), **again).options() == again
