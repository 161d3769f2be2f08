"""DISP-LLM: gates and what is cut by them, the count of parameters, training with a frozen model, its optimum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.journal import Journal
from billhook.calibrate.walk import Walk
from billhook.measure.latency import cache_name
from billhook.methods.disp_llm import FreeLogits, Gates, HyperNet, cut_
from billhook.recover.train import Loop
from billhook.sparsity.gates import kept_probability, within_budget
from billhook.surgery.points import gated, points
from billhook.surgery.slim import dims_of, refresh, slim_
from tiny import TEXT_FAMILIES, batches_for, build, tiny_tokenizer, weights_of

FEW = {"training_steps": 4, "sparsity": 0.3}
KINDS = ["llama", "qwen2", "opt", "gpt2", "gpt_neox", "phi", "gemma2"]  # MHA and GQA, with and without biases


def slim_model(family: str) -> Any:
    model = build(family)
    slim_(model)
    return model


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def drawn(gates: Gates, seed: int, share: float = 0.6) -> Tensor:
    return torch.rand(sum(gates.sizes), generator=torch.Generator().manual_seed(seed)) < share


def pruned(family: str = "llama", **options: Any) -> Any:
    model = build(family)
    bh.prune(model, bh.DispLLM(**FEW | options), batches_for(family, count=4), precision="highest")
    return model


def text(model: Any, ids: Tensor) -> Tensor:
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    result: Tensor = model.generate(ids[:, :7], **options)
    return result


# -- gates are what is cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_open_gates_change_nothing(family: str) -> None:
    model = slim_model(family)
    whole, ids = build(family), batches_for(family)[0]
    gates = Gates(blocks_of(model), tied=False)
    masks = gates.spread(torch.ones(sum(gates.sizes)))
    with torch.no_grad():
        want = whole(ids).logits
        with gated(blocks_of(model), lambda block, point: masks[block][point]):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
        for block, mask in zip(blocks_of(model), masks, strict=True):
            cut_(block, {point: values > 0 for point, values in mask.items()})
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_what_is_cut_computes_what_closed_gates_do(family: str, tied: bool) -> None:
    whole, small, ids = slim_model(family), slim_model(family), batches_for(family)[0]
    gates = Gates(blocks_of(whole), tied)
    masks = gates.closed(drawn(gates, 3))
    for block, mask in zip(blocks_of(small), masks, strict=True):
        cut_(block, mask)
    refresh(small)
    with torch.no_grad(), gated(blocks_of(whole), lambda block, point: masks[block][point].float()):
        torch.testing.assert_close(small(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
        assert torch.equal(text(small, ids), text(whole, ids))
        kept = small(ids[:, :9], use_cache=True).past_key_values
        step = small(ids[:, 9:10], **{cache_name(small): kept}).logits
        torch.testing.assert_close(step[:, -1], whole(ids[:, :10]).logits[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gemma2"])  # with biases; with a norm behind the sublayer too
def test_a_sublayer_with_one_empty_mask_leaves_as_a_whole(family: str) -> None:
    """The constant that biases would still write leaves too. As if its last layer had been zero, by hand."""
    ids, whole = batches_for(family)[0], slim_model(family)
    gates, some = Gates(blocks_of(whole), tied=False), points(blocks_of(whole)[1])
    for part, last in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        zeroed, small = slim_model(family), slim_model(family)
        for parameter in blocks_of(zeroed)[1].get_submodule(last).parameters():
            parameter.data.zero_()
        own = [point for point in some if point.startswith(part)]
        for point in own:
            keep = torch.ones(sum(gates.sizes), dtype=torch.bool)
            gates.spread(keep)[1][point].fill_(False)
            masks = gates.closed(keep)
            shut = [(index, p) for index, mask in enumerate(masks) for p in mask if not bool(mask[p].all())]
            assert shut == [(1, p) for p in some if p in own]
            assert not any(bool(masks[1][p].any()) for p in own)
        only_output = gates.spread(keep)  # the last point of a sublayer is what it writes
        for block, mask in zip(blocks_of(small), masks, strict=True):
            cut_(block, mask)
        refresh(small)
        left = [(block.self_attn is not None, block.mlp is not None) for block in blocks_of(small)]
        assert left == [(True, True), (part != "attention", part != "mlp"), (True, True)]
        with torch.no_grad():
            want = zeroed(ids).logits
            assert float((want - whole(ids).logits).abs().max()) > 0.01
            torch.testing.assert_close(small(ids).logits, want, rtol=0, atol=1e-5)
            for values in (masks, only_output):
                with gated(blocks_of(whole), lambda block, point, values=values: values[block][point].float()):
                    torch.testing.assert_close(whole(ids).logits, want, rtol=0, atol=1e-5)


def test_soft_gates_act_once() -> None:
    """In particular on the neurons, where the published code multiplies twice."""
    model = slim_model("llama")
    block = blocks_of(model)[1]
    x = torch.randn(2, 5, 32)
    value = {point: torch.full((size,), 0.5) for point, size in points(block).items()}
    with torch.no_grad():
        inner = block.mlp.act_fn(block.mlp.gate_proj(x * 0.5)) * block.mlp.up_proj(x * 0.5)
        want = block.mlp.down_proj(inner * 0.5) * 0.5
        with gated([block], lambda index, point: value[point]):
            torch.testing.assert_close(block.mlp(x), want)


# -- how much --------------------------------------------------------------------------------------------------


def elements(model: nn.Module) -> int:
    """Of all matrices in the blocks."""
    linear = [m for block in blocks_of(model) for m in block.modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() for m in linear)


@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("family", KINDS)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.02, 0.1, 0.5, 1.0]), tied=st.booleans())
def test_the_count_is_that_of_the_matrices_left(family: str, seed: int, share: float, tied: bool) -> None:
    model = slim_model(family)
    gates = Gates(blocks_of(model), tied)
    assert gates.total == elements(model)
    masks = gates.closed(drawn(gates, seed, share))
    for block, mask in zip(blocks_of(model), masks, strict=True):
        cut_(block, mask)
    assert int(gates.size(masks)) == elements(model)


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("family", ["llama", "opt"])
@given(seed=st.integers(0, 999), share=st.floats(0.05, 0.95), tied=st.booleans())
def test_repair_meets_the_budget_within_one_gate(family: str, seed: int, share: float, tied: bool) -> None:
    gates = Gates(blocks_of(slim_model(family)), tied)
    logits = torch.randn(sum(gates.sizes), generator=torch.Generator().manual_seed(seed))
    keep = within_budget(logits, lambda mask: float(gates.size(gates.closed(mask))), share * gates.total)
    left = float(gates.size(gates.closed(keep)))
    assert left <= share * gates.total
    costs = []
    for index in (~keep).nonzero()[:, 0].tolist():
        more = keep.clone()
        more[index] = True
        costs.append(float(gates.size(gates.closed(more))) - left)
    assert left + max(costs) > share * gates.total
    assert float(logits[keep].min()) > float(logits[~keep].max())


@pytest.mark.parametrize("tie", ["none", "same"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_the_blocks_lose_their_share(family: str, sparsity: float, tie: str) -> None:
    whole = slim_model(family)
    before = sum(p.numel() for block in blocks_of(whole) for p in block.parameters())
    model = pruned(family, sparsity=sparsity, tie=tie, training_steps=2)
    after = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    # the tied subset is read and written everywhere: one channel of it is a row or column of every matrix
    assert sparsity * before <= before - after <= sparsity * before + (0.03 if tie == "none" else 0.06) * before


def test_the_target_size_is_of_the_whole_model() -> None:
    whole = sum(p.numel() for p in build("llama").parameters())
    model = build("llama")
    bh.prune(model, bh.DispLLM(target_size=0.8, training_steps=2), batches_for("llama"), precision="highest")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.8 * whole, abs=0.01 * whole)


def test_without_repair_the_likely_gates_stay_and_their_share_is_told() -> None:
    model = build("llama")
    report = bh.prune(model, bh.DispLLM(**FEW, repair=False), batches_for("llama"), precision="highest")
    share = 1 - elements(model) / elements(slim_model("llama"))
    assert share < 0.2  # after four steps from nearly open gates
    assert f"remove {share:.1%} of the blocks' matrices" in report.steps[0].notes[0]


def test_nothing_asked_nothing_done() -> None:
    model, before = build("llama"), weights_of(build("llama"))
    bh.prune(model, bh.DispLLM(sparsity=0.0), batches_for("llama"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_records_say_what_left() -> None:
    model = build("llama")
    report = bh.prune(model, bh.DispLLM(**FEW), batches_for("llama"), precision="highest")
    sites = {site.site: site for site in report.steps[0].sites}
    for index, block in enumerate(blocks_of(model)):
        left = block.mlp.down_proj.weight.numel()
        record = sites[f"model.layers.{index}.mlp.down_proj"]
        assert record.shape == (32, 48)
        assert record.sparsity == pytest.approx(1 - left / (32 * 48))


# -- the hypernetwork ------------------------------------------------------------------------------------------


def test_the_hypernetwork_has_the_parameters_of_the_paper() -> None:
    sizes = [576, 576, 576, 1536, 576] * 30
    assert sum(p.numel() for p in HyperNet(sizes, 0).parameters()) == 128 * sum(sizes) + 37_632 + 256
    assert HyperNet([3, 5], 0)().shape == (8,)


def test_nearly_all_gates_are_open_at_first() -> None:
    logits = torch.cat([HyperNet([576, 576, 576, 1536, 576] * 6, seed)().detach() for seed in range(3)])
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.38, abs=0.02)
    assert float(kept_probability(logits + 3).mean()) == pytest.approx(0.950, abs=0.005)
    assert float(kept_probability(logits + 3, "gumbel").mean()) > 0.9999
    assert float(FreeLogits([4], 0)().detach().sum()) == 0


def test_a_seed_is_a_hypernetwork_and_leaves_other_draws_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = HyperNet([4, 6], 1), HyperNet([4, 6], 1), HyperNet([4, 6], 2)
    assert torch.equal(torch.rand(3), want)
    assert torch.equal(a(), b())
    assert not torch.equal(a(), c())


# -- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["reinmax", "st", "gumbel_soft"])
@pytest.mark.parametrize("hyper", [True, False])
def test_only_the_gates_learn(estimator: str, hyper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix that is left is a part of what it was; no parameter of the model was given a gradient."""
    started: dict[str, Any] = {}
    real = Loop.__init__

    def watch(self: Loop, module: nn.Module, groups: Any, *args: Any, **options: Any) -> None:
        real(self, module, groups, *args, **options)
        started["trained"] = {name: p.detach().clone() for name, p in groups["gates"].items()}
        started["now"], started["loop"] = groups["gates"], self

    monkeypatch.setattr(Loop, "__init__", watch)
    method = bh.DispLLM(**FEW, estimator=estimator, hyper=hyper, draw=3)  # type: ignore[arg-type]
    model = slim_model("llama")
    before, flags = weights_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    walk = Walk(model, batches_for("llama", count=4), precision="highest")
    method.prune(walk)
    assert all(not torch.equal(p, started["trained"][name]) for name, p in started["now"].items())
    assert len(started["loop"].losses) == 4
    for block, old in zip(blocks_of(model), blocks_of(slim_model("llama")), strict=True):
        own, whole = block.self_attn, old.self_attn
        reads, writes = own.reads or list(range(32)), own.writes or list(range(32))
        assert torch.equal(own.q_proj.weight, whole.q_proj.weight[:, reads])
        assert torch.equal(own.k_proj.weight, whole.k_proj.weight[:, reads])
        assert torch.equal(own.v_proj.weight, whole.v_proj.weight[:, reads])
        assert torch.equal(own.o_proj.weight, whole.o_proj.weight[writes])
        assert reads == sorted(set(reads))
        assert writes == sorted(set(writes))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
        if "norm" in name or "embed" in name:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_model_is_frozen_while_the_gates_learn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every backward pass no weight has a gradient, and before the cut each has the bits that it had."""
    model = slim_model(family)
    before, steps = weights_of(model), 0
    real = Loop._gradients

    def watch(self: Loop) -> float:
        nonlocal steps
        value, steps = real(self), steps + 1
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert all(t.master.grad is not None and bool(t.master.grad.any()) for t in self._trainables)
        return value

    monkeypatch.setattr(Loop, "_gradients", watch)
    monkeypatch.setattr("billhook.methods.disp_llm.cut_", lambda block, mask: None)
    bh.DispLLM(**FEW).prune(Walk(model, batches_for(family, count=4), precision="highest"))
    assert steps == 4
    assert weights_of(model).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in weights_of(model).items())


def test_the_input_of_the_hypernetwork_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    nets: list[HyperNet] = []
    real = HyperNet.__init__

    def watch(self: HyperNet, sizes: Any, seed: int) -> None:
        real(self, sizes, seed)
        nets.append(self)

    monkeypatch.setattr(HyperNet, "__init__", watch)
    pruned(draw=7)
    fresh = HyperNet([int(head.out_features) for head in nets[0].heads], 7)  # type: ignore[arg-type]
    assert torch.equal(nets[0].z, fresh.z)
    assert not torch.equal(nets[0](), fresh())
    assert not nets[0].z.requires_grad


def test_a_seed_is_a_result_and_a_folder_holds_it(tmp_path: Path) -> None:
    ids = batches_for("llama")[0]
    models = [pruned(), pruned(), pruned(draw=1)]
    dims = [[dims_of(block) for block in blocks_of(m)] for m in models]
    assert dims[0] == dims[1] != dims[2]
    for name in ("one", "two"):
        bh.save(models[0], tiny_tokenizer(), tmp_path / name)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    again: Any
    again, _ = bh.load(tmp_path / "one")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    with torch.no_grad():
        want = models[0](ids).logits
        assert torch.equal(again(ids).logits, want)
        assert torch.equal(plain(ids).logits, want)
        assert torch.equal(text(plain, ids), text(models[0], ids))


def test_streamed_and_resumed_runs_give_the_same(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches, method = make_folder("llama"), batches_for("llama", count=4), bh.DispLLM(**FEW)
    whole, _ = bh.load(str(folder), stream=True)
    bh.prune(whole, method, batches, out=tmp_path / "whole", precision="highest")

    monkeypatch.setattr(Walk.keep_state, "__kwdefaults__", {"every": 0.0})
    real, calls = Loop._take_step, 0

    def killed(self: Loop) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("killed")
        real(self)

    monkeypatch.setattr(Loop, "_take_step", killed)
    model, _ = bh.load(str(folder), stream=True)
    with pytest.raises(RuntimeError, match="killed"):
        bh.prune(model, method, batches, out=tmp_path / "out", precision="highest")
    calls = 100
    model, _ = bh.load(str(folder), stream=True)
    bh.prune(model, method, batches, out=tmp_path / "out", precision="highest")
    assert calls == 100 + 4 - 2
    a, _ = bh.load(str(tmp_path / "whole"))
    b, _ = bh.load(str(tmp_path / "out"))
    resident = pruned()
    assert [dims_of(x) for x in blocks_of(a)] == [dims_of(x) for x in blocks_of(b)]
    for other in (b, resident):
        for (name, x), y in zip(a.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


def test_a_run_killed_after_the_last_block_takes_the_shapes_from_its_journal(make_folder: Any, tmp_path: Path) -> None:
    folder, batches = make_folder("llama"), batches_for("llama", count=4)
    first = slim_model("llama")
    walk = Walk(first, batches, precision="highest", journal=Journal(tmp_path / "journal"))
    bh.DispLLM(**FEW).prune(walk)
    again: Any
    again, _ = bh.load(str(folder))
    slim_(again)
    assert Walk(again, batches, precision="highest", journal=Journal(tmp_path / "journal")).replayed()
    ids = batches_for("llama")[0]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, first(ids).logits)


@pytest.mark.parametrize("family", ["vit"])
def test_a_classifier_learns_from_labels(family: str) -> None:
    model = build(family)
    batches = [
        {"pixel_values": x, "labels": torch.tensor([i % 5, (i + 1) % 5])} for i, x in enumerate(batches_for(family))
    ]
    bh.prune(model, bh.DispLLM(**FEW), batches, precision="highest")
    with torch.no_grad():
        assert model(batches_for(family)[0]).logits.shape == (2, 5)
    with pytest.raises(bh.BillhookError, match="needs a loss"):
        bh.prune(build(family), bh.DispLLM(**FEW), batches_for(family))


def test_after_it_other_methods_go_on() -> None:
    model = build("llama")
    steps = [bh.DispLLM(**FEW), bh.FASP(sparsity=0.2), bh.DispLLM(**FEW)]
    bh.prune(model, steps, batches_for("llama", count=4), precision="highest")
    before = sum(p.numel() for block in blocks_of(slim_model("llama")) for p in block.parameters())
    left = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    assert left == pytest.approx(0.7 * 0.8 * 0.7 * before, rel=0.03)
    with torch.no_grad():
        assert torch.isfinite(model(batches_for("llama")[0]).logits).all()  # type: ignore[operator]
    with pytest.raises(bh.BillhookError, match="read or write only some channels"):
        bh.prune(model, bh.SliceGPT(sparsity=0.2), batches_for("llama", count=4))
    with pytest.raises(bh.BillhookError, match="cannot share one subset"):
        bh.prune(model, bh.DispLLM(**FEW, tie="same"), batches_for("llama", count=4))


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(bh.BillhookError, match="leaves nothing: lower the sparsity"):
        bh.prune(build("opt"), bh.DispLLM(sparsity=0.995), batches_for("opt"))
    with pytest.raises(bh.BillhookError, match="cannot be reached"):
        bh.prune(build("llama"), bh.DispLLM(target_size=0.01), batches_for("llama"))
    with pytest.raises(bh.BillhookError, match="estimator='reimax'"):
        bh.DispLLM(estimator="reimax")  # type: ignore[arg-type]


# -- the optimum -----------------------------------------------------------------------------------------------


def test_channels_that_are_zero_are_the_ones_that_leave() -> None:
    """Half of what the second layer reads is zero, the text is the model's own, the budget is the rest."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # such that every gate matters, and no gate very much
                parameter.normal_(0, 1.0 if "embed" in name else 0.8 if "mlp" in name else 0.4)
        zero = torch.randperm(16)[:8]
        model.model.layers[1].input_layernorm.weight[zero] = 0
        model.model.layers[1].post_attention_layernorm.weight[zero] = 0
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 24, (2048, 1), generator=generator)
    with torch.no_grad():
        for _ in range(31):
            chances = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    slim_(model)
    blocks = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    share = (8 * 3 * 16 + 8 * 2 * 8) / blocks
    method = bh.DispLLM(sparsity=share, training_steps=200, lr=0.05, lam=0.1, batch=64, hyper=False)
    method.prune(Walk(model, list(ids.split(64)), precision="highest"))
    left = sorted(set(range(16)) - set(zero.tolist()))
    for index, block in enumerate(blocks_of(model)):
        dims = dims_of(block)
        for part in ("attention", "mlp"):
            assert dims[part]["reads"] == (left if index else None)
            assert dims[part]["writes"] is None
        assert dims["mlp"]["width"] == 8


def test_a_temperature_that_turns_gradients_round_is_refused() -> None:
    with pytest.raises(bh.BillhookError, match=r"tau=0\.4 turns"):
        bh.method("disp-llm", tau=0.4)
    bh.method("disp-llm", tau=0.4, estimator="gumbel_soft")
    with pytest.raises(bh.BillhookError, match="estimator=st has no temperature"):
        bh.method("disp-llm", tau=1.0, estimator="st")
