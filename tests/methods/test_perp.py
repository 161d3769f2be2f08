"""PERP as a step after pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import billhook as bh
from billhook.anatomy import anatomy_of
from billhook.calibrate.sensitivity import task_loss
from billhook.calibrate.walk import Walk
from billhook.recover.reconstruct import reconstruct
from billhook.recover.train import Loop
from tiny import batches_for, build, site_weights

FAMILIES = ["llama", "opt", "gpt2"]
FEW = {"training_steps": 12, "rank": 4, "lr": 5e-3, "adapter_lr": 5e-3}


def run(family: str = "llama", method: bh.Method | None = None, **options: Any) -> tuple[torch.nn.Module, bh.Report]:
    model = build(family)
    steps = [method or bh.Magnitude(), bh.PERP(**FEW | options)]
    return model, bh.prune(model, steps, batches_for(family, count=4), precision="highest")


def loss_of(model: torch.nn.Module, family: str = "llama") -> float:
    with torch.no_grad():
        return float(sum(task_loss(model(b), b) for b in batches_for(family, count=4)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["block", "global"])
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "scale_lora_full", "lora_prune"])
def test_zeros_stay_and_the_rest_moves(family: str, objective: str, adapter: str) -> None:
    before = build(family)
    bh.prune(before, bh.Magnitude(), batches_for(family, count=4))
    model, report = run(family, objective=objective, adapter=adapter)
    old, new = site_weights(before), site_weights(model)
    for name in old:
        assert torch.equal(old[name] == 0, new[name] == 0), name
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert report.steps[1].sparsity == report.steps[0].sparsity
    assert list(model.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("objective", ["block", "global"])
def test_n_of_m_stays(objective: str) -> None:
    model, _ = run(method=bh.Wanda(pattern="2:4"), objective=objective)
    for name, weight in site_weights(model).items():
        assert ((weight != 0).reshape(len(weight), -1, 4).sum(dim=2) == 2).all(), name


def test_no_steps_change_nothing() -> None:
    before = build("llama")
    bh.prune(before, bh.Magnitude(), batches_for("llama", count=4))
    for options in ({"training_steps": 0}, {"lr": 0.0, "adapter_lr": 0.0}):
        for objective in ("block", "global"):
            model, _ = run(objective=objective, **options)
            for (name, a), b in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
                assert torch.equal(a, b), name


Reconstructions = list[tuple[list[Tensor], float]]


@pytest.fixture
def reconstructions(monkeypatch: pytest.MonkeyPatch) -> Reconstructions:
    """The targets of each block that was reconstructed, and its error before."""
    seen: Reconstructions = []

    def watch(forward: Any, module: Any, groups: Any, targets: list[Tensor], *args: Any, **options: Any) -> Any:
        errors = reconstruct(forward, module, groups, targets, *args, **options)
        seen.append((targets, errors[0]))
        return errors

    monkeypatch.setattr("billhook.methods.perp.reconstruct", watch)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_nothing_pruned_every_block_is_at_its_target(family: str, reconstructions: Reconstructions) -> None:
    run(family, bh.Magnitude(sparsity=0.0), training_steps=0)
    assert len(reconstructions) == 3
    assert all(error <= 1e-10 for _, error in reconstructions)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_targets_are_what_the_dense_block_makes_of_what_reaches_the_sparse_one(
    family: str, reconstructions: Reconstructions
) -> None:
    """The blocks before it are pruned and reconstructed, in the targets as well."""
    model, _ = run(family, bh.Magnitude(sparsity=0.6), training_steps=2)
    blocks: Any = model.get_submodule(anatomy_of(model).blocks)
    dense: Any = build(family).get_submodule(anatomy_of(model).blocks)
    batches = batches_for(family, count=4)
    assert len(reconstructions) == 3
    for index, (targets, error) in enumerate(reconstructions):
        assert error > 1e-4
        outputs: list[Any] = []
        own, blocks[index] = blocks[index], dense[index]
        handle = dense[index].register_forward_hook(lambda module, args, output, o=outputs: o.append(output))
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        handle.remove()
        blocks[index] = own
        for target, output in zip(targets, outputs, strict=True):
            want = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(target, want.flatten(0, -2), rtol=1e-5, atol=1e-5)


def test_blocks_come_nearer_to_the_dense_ones() -> None:
    pruned, dense = build("llama"), build("llama")
    bh.prune(pruned, bh.Magnitude(sparsity=0.6), batches_for("llama", count=4))
    model, _ = run(method=bh.Magnitude(sparsity=0.6), training_steps=60)
    ids = batches_for("llama", count=4)[0]

    def hidden(m: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return m(ids, output_hidden_states=True).hidden_states[-1]

    assert (hidden(model) - hidden(dense)).norm() < 0.9 * (hidden(pruned) - hidden(dense)).norm()


def test_next_token_training_lowers_the_loss() -> None:
    pruned = build("llama")
    bh.prune(pruned, bh.Magnitude(sparsity=0.6), batches_for("llama", count=4))
    model, _ = run(method=bh.Magnitude(sparsity=0.6), objective="global", training_steps=40)
    assert loss_of(model) < loss_of(pruned)


def test_a_streamed_model_gives_the_same(make_folder: Any, tmp_path: Path) -> None:
    for objective in ("block", "global"):
        steps = [bh.Magnitude(), bh.PERP(**FEW, objective=objective)]
        model, _ = bh.load(str(make_folder("llama", name=f"m-{objective}")), stream=True)
        out = tmp_path / objective
        bh.prune(model, steps, batches_for("llama", count=4), out=out, precision="highest")
        streamed, _ = bh.load(str(out))
        resident, _ = run(objective=objective)
        for (name, a), b in zip(resident.state_dict().items(), streamed.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_killed_training_goes_on_with_the_same_bits(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = make_folder("llama"), batches_for("llama", count=4)
    steps = [bh.Magnitude(), bh.PERP(**FEW, objective="global")]
    whole, _ = bh.load(str(folder), stream=True)
    bh.prune(whole, steps, batches, out=tmp_path / "whole", precision="highest")

    monkeypatch.setattr(Walk.keep_state, "__kwdefaults__", {"every": 0.0})
    real, calls = Loop._take_step, 0

    def killed(self: Loop) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("killed")
        real(self)

    monkeypatch.setattr(Loop, "_take_step", killed)
    model, _ = bh.load(str(folder), stream=True)
    with pytest.raises(RuntimeError, match="killed"):
        bh.prune(model, steps, batches, out=tmp_path / "out", precision="highest")
    calls = 100
    model, _ = bh.load(str(folder), stream=True)
    bh.prune(model, steps, batches, out=tmp_path / "out", precision="highest")
    assert calls == 100 + 12 - 5
    a, _ = bh.load(str(tmp_path / "whole"))
    b, _ = bh.load(str(tmp_path / "out"))
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_groups_are_what_was_asked_for() -> None:
    before = build("llama")
    bh.prune(before, bh.Magnitude(), batches_for("llama", count=4))
    model, _ = run(groups="norm", objective="global")
    for (name, a), b in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b) != ("norm" in name), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": "nrom"}, r"there is no group 'nrom' \(did you mean 'norm'\?\)"),
        ({"rank": 0}, "rank=0 is not possible"),
        ({"adapter": "lora"}, "adapter='lora' is not possible"),
        ({"adapter": "scale_lora", "alpha": 8}, "adapter=scale_lora multiplies the weights and has no alpha"),
    ],
)
def test_bad_options_get_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bh.BillhookError, match=words):
        bh.PERP(**options)


def test_a_group_that_the_model_lacks_is_named() -> None:
    with pytest.raises(bh.BillhookError, match="no parameters in the group 'bias'"):
        run(groups="bias")
    with pytest.raises(bh.BillhookError, match="belongs to no block"):
        run(groups="head")


def test_a_tied_head_is_refused_and_a_free_one_trained(make_folder: Any, tmp_path: Path) -> None:
    model, _ = bh.load(str(make_folder("llama")), stream=True)
    with pytest.raises(bh.BillhookError, match="tied to its embedding"):
        bh.prune(model, bh.PERP(**FEW, groups="head", objective="global"), batches_for("llama"), out=tmp_path / "out")
    before = build("mistral")
    bh.prune(before, bh.Magnitude(), batches_for("mistral", count=4))
    trained, _ = run("mistral", groups="head", objective="global")
    for (name, a), b in zip(before.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(a, b) != (name == "lm_head.weight"), name


def test_without_pruning_before_it_block_targets_are_unknown() -> None:
    with pytest.raises(bh.BillhookError, match="put this step after the pruning, in the same run"):
        bh.prune(build("llama"), bh.PERP(**FEW), batches_for("llama"))
