"""SliceGPT and its relatives: exact where nothing is cut, the sizes that were planned, files that load."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate import walk as walk_module
from billhook.calibrate.walk import Walk
from billhook.export.folder import assemble
from billhook.run import reshape
from tiny import TEXT_FAMILIES, batches_for, build, tiny_tokenizer

SLICED = [f for f in TEXT_FAMILIES if f not in ("gemma2", "gemma3_text")]


def pruned(family: str, double: bool = False, **options: Any) -> tuple[Any, Any]:
    model = build(family)
    model = model.double() if double else model
    whole = copy.deepcopy(model)
    bh.prune(model, bh.method("slicegpt", **options), batches_for(family, count=4), precision="highest")
    return model, whole


@pytest.mark.parametrize("family", SLICED)
def test_a_full_rotation_changes_nothing(family: str) -> None:
    """Norms fused, LayerNorms centred, a basis of its own at every place: the same function (SliceGPT, theorem 1)."""
    model, whole = pruned(family, double=True, sparsity=0.0)
    ids = batches_for(family)[0]
    with torch.no_grad():
        got, want = model(ids).logits, whole(ids).logits
    # Transformers' RMSNorm computes in float32 whatever the model's dtype
    exact = 1e-10 if anatomy_of(whole).norm == "layer" else 3e-6
    assert float((got - want).abs().max()) < exact
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert all(not list(m.parameters()) for m in norms if "q_norm" not in str(m) and type(m).__name__ == "SlimNorm")


@pytest.mark.parametrize("family", SLICED)
def test_a_sliced_model_has_the_planned_size_and_loads(family: str, tmp_path: Path) -> None:
    model = build(family)
    present = copy.deepcopy(model)
    reshape(present)
    batches = batches_for(family)
    planned = bh.method("slicegpt", sparsity=0.25).planned(Walk(present, batches), 0.25)  # type: ignore[attr-defined]
    bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches)
    assert sum(p.numel() for p in model.parameters()) == planned
    streams = [layer["stream"] for layer in model.config.slim["layers"]]  # type: ignore[union-attr, index]
    assert streams[-1][-1] == 32
    assert streams[1][0] == 24
    assert streams[0][0] == (32 if family == "gpt2" else 24)  # GPT-2 reshapes its output to the width of its input
    assert all(one[-1] == other[0] for one, other in pairwise(streams))
    assemble(model, tiny_tokenizer(), tmp_path / "out")
    again, _ = bh.load(str(tmp_path / "out"))
    with torch.no_grad():
        want, got = model(batches[0]).logits, again(batches[0]).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        whole = again(batches[0], use_cache=False).logits[:, -1].argmax(-1)
        step = again.generate(batches[0], max_new_tokens=1, do_sample=False, pad_token_id=0)[:, -1]  # type: ignore[operator]
    assert torch.equal(step, whole)


def test_the_basis_is_the_best_projection() -> None:
    """‖X − X Q Qᵀ‖² is the sum of the eigenvalues that were dropped, and no random basis does better."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    basis = bh.SliceGPT().basis(x.T @ x, 5)  # type: ignore[attr-defined]
    lost = float((x - x @ basis @ basis.T).square().sum())
    assert lost == pytest.approx(float(torch.linalg.eigvalsh(x.T @ x)[:7].sum()), rel=1e-9)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
        assert float((x - x @ other @ other.T).square().sum()) >= lost


def test_a_stream_of_low_rank_is_cut_without_loss() -> None:
    """Where embeddings and writers span 16 of 32 dimensions, half of the width goes for free."""
    model = build("opt").double()
    anatomy = anatomy_of(model)
    # a centred subspace: LayerNorm takes the mean out
    basis = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = torch.linalg.qr(basis - basis.mean(0)).Q
    inside = basis @ basis.T
    with torch.no_grad():
        for path in anatomy.embeddings:
            table: Any = model.get_submodule(path)
            table.weight.copy_(table.weight @ inside)
        for block in find_blocks(model, anatomy):
            for name in ("self_attn.out_proj", "fc2"):
                linear: Any = block.get_submodule(name)
                linear.weight.copy_(inside @ linear.weight)
                linear.bias.copy_(inside @ linear.bias)
    whole, ids = copy.deepcopy(model), batches_for("opt", count=4)
    bh.prune(model, bh.method("slicegpt", sparsity=0.5), ids, precision="highest")
    with torch.no_grad():
        torch.testing.assert_close(model(ids[0]).logits, whole(ids[0]).logits, rtol=1e-6, atol=1e-6)


def test_more_width_is_never_worse_on_the_stream() -> None:
    ids = batches_for("opt", count=4)
    errors = []
    for sparsity in (0.75, 0.5, 0.25, 0.0):
        model, whole = pruned("opt", sparsity=sparsity)
        with torch.no_grad():
            errors.append(float((model(ids[0]).logits - whole(ids[0]).logits).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_target_size_is_met_from_below() -> None:
    model = build("opt")
    present = sum(p.numel() for p in model.parameters())
    bh.prune(model, bh.method("slicegpt", target_size=0.9, round=1), batches_for("opt"))
    assert 0.85 * present < sum(p.numel() for p in model.parameters()) <= 0.9 * present
    with pytest.raises(bh.BillhookError, match="cannot be reached by slicing"):
        bh.prune(build("opt"), bh.method("slicegpt", target_size=0.01), batches_for("opt"))


def test_a_model_that_would_grow_is_said_before_the_work(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="billhook"):
        bh.prune(build("llama"), bh.method("slicegpt", sparsity=0.05, round=1), batches_for("llama"))
    assert "makes this model larger" in caplog.text


@pytest.mark.parametrize("family", ["gemma2", "vit"])
def test_what_cannot_be_rotated_is_refused(family: str) -> None:
    with pytest.raises(bh.BillhookError, match="cannot be rotated"):
        bh.prune(build(family), bh.method("slicegpt"), batches_for(family))


def test_slicing_twice_is_refused() -> None:
    model, _ = pruned("llama", sparsity=0.25)
    with pytest.raises(bh.BillhookError, match="rotated already"):
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for("llama"))


def test_constant_dynamic_slicing_is_slicegpt() -> None:
    one, _ = pruned("llama", sparsity=0.25)
    other = build("llama")
    method = bh.method("dynamic-slicing", sparsity=0.25, base=0.25)
    bh.prune(other, method, batches_for("llama", count=4), precision="highest")
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_dynamic_slicing_keeps_the_mean_and_the_order() -> None:
    model = build("llama")
    method = bh.method("dynamic-slicing", sparsity=0.5, base=0.2, round=1)
    bh.prune(model, method, batches_for("llama"))
    widths = [layer["stream"][0] for layer in model.config.slim["layers"]]  # type: ignore[union-attr, index]
    assert sum(widths) == pytest.approx(3 * 16, abs=3)
    influence = [1.0, 0.2, 0.6]
    shares = method.shared([1 - s for s in (0.2, 0.6, 1.0)], 0.3)  # type: ignore[attr-defined]
    assert influence  # hand case of base 0.2: LR = [0, 0.5, 1]
    assert shares == pytest.approx([0.2, 0.3, 0.4])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_what_is_held_from_pass_to_pass_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is computed once per batch and the rest once, instead of twice and two times; in float64."""
    dense, runs = build(family).double(), []
    for held in (walk_module._HELD, 0):
        monkeypatch.setattr(walk_module, "_HELD", held)
        model, calls = copy.deepcopy(dense), 0
        forward = Walk.forward

        def counted(self: Walk, *arguments: Any, forward: Any = forward) -> Any:
            nonlocal calls
            calls += 1
            return forward(self, *arguments)

        monkeypatch.setattr(Walk, "forward", counted)
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for(family, count=2), precision="highest")
        monkeypatch.setattr(Walk, "forward", forward)
        with torch.no_grad():
            runs.append((calls, model(batches_for(family, count=1)[0]).logits))
    (few, one), (many, other) = runs
    assert few < many
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_killed_run_gives_the_same_bits(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Any:
        folder = tmp_path / "model"
        if not folder.exists():
            assemble(build("llama"), tiny_tokenizer(), folder)
        return bh.load(str(folder), stream=True)[0]

    batches, method = batches_for("llama", count=4), bh.method("slicegpt", sparsity=0.25)
    bh.prune(fresh(), method, batches, out=tmp_path / "whole", precision="highest")

    from billhook.calibrate.journal import Journal

    commit = Journal.commit

    def dying(self: Journal, block: int, *args: Any) -> Any:
        if block == stop:
            raise KeyboardInterrupt
        return commit(self, block, *args)

    monkeypatch.setattr(Journal, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        bh.prune(fresh(), method, batches, out=tmp_path / "killed", precision="highest")
    monkeypatch.undo()
    report = bh.prune(fresh(), method, batches, out=tmp_path / "killed", precision="highest")
    assert report.resumed == (stop > 0)
    one, other = (bh.load(str(tmp_path / name))[0] for name in ("whole", "killed"))
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
