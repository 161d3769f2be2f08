"""FASP: which channels leave, what the rest is fitted to, and how many parameters that is."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.gram import Gram
from billhook.calibrate.influence import block_influence
from billhook.calibrate.walk import Block, Walk
from billhook.run import reshape
from billhook.sparsity.refit import refit
from billhook.sparsity.saliency import wanda
from billhook.sparsity.structure import column_scores
from billhook.surgery.shrink import drop_attention_, drop_mlp_, fold_value_bias_, owners
from billhook.surgery.slim import is_slim, slim_
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, weights_of

BIASED = ["opt", "gpt2", "gpt_neox", "phi", "vit"]


def slim_model(family: str, double: bool = False) -> Any:
    model = build(family)
    slim_(model)
    return model.double() if double else model


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def inside(model: nn.Module) -> int:
    return sum(p.numel() for block in blocks_of(model) for p in block.parameters())


def run(model: Any, family: str, **options: Any) -> Any:
    """Prune without turning stock again, so that blocks have one set of names."""
    batches = batches_for(family, count=4)
    method: Any = bh.method("fasp", **options)
    walk = Walk(model, batches, precision="highest")
    method.check(walk)
    method.prune(walk)
    return model


def inputs_of(model: Any, linear: nn.Linear, family: str) -> Tensor:
    """What enters a linear layer on the calibration data, [tokens, in], float64."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches_for(family, count=4):
            model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


# -- nothing asked, nothing done -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"round": 32, "damping": 1.0}, {"uniform": True}, {"target_size": 1.0}])
def test_no_sparsity_leaves_every_bit(family: str, options: dict[str, Any]) -> None:
    model = build(family)
    before, kind, config = weights_of(model), type(model), copy.deepcopy(model.config)
    options = options if "target_size" in options else {**options, "sparsity": 0.0}
    bh.prune(model, bh.method("fasp", **options), batches_for(family))
    assert type(model) is kind
    assert {n for n, _ in model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    written = ("architectures", "n_inner")  # None where a default was meant
    a, b = ({k: v for k, v in c.to_dict().items() if k not in written} for c in (config, model.config))
    assert a == b


# -- choice and refit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "phi"])
def test_neurons_are_chosen_and_refitted_as_the_sheet_says(family: str) -> None:
    """The first block, in float64 from plain hooks: columns by ‖B_j‖₁·‖X_j‖₂, then lstsq on those that stay."""
    model = slim_model(family, double=True)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.25, attention="skip", damping=0.0)
    down, old = blocks_of(model)[0].mlp, blocks_of(whole)[0].mlp
    x = inputs_of(whole, old.down_proj, family)
    weight = old.down_proj.weight
    scores = (weight.abs() * x.norm(dim=0)).sum(0)
    count = down.down_proj.in_features
    keep = scores.argsort(descending=True)[:count].sort().values
    for name in ("gate_proj", "up_proj"):
        if hasattr(old, name):
            assert torch.equal(getattr(down, name).weight, getattr(old, name).weight[keep])
            if getattr(old, name).bias is not None:
                assert torch.equal(getattr(down, name).bias, getattr(old, name).bias[keep])
    target = x @ weight.T
    fitted = torch.linalg.lstsq(x[:, keep], target).solution
    scale = float(target.square().sum())
    assert float((x[:, keep] @ (down.down_proj.weight.T - fitted)).square().sum()) < 1e-8 * scale
    assert float((x[:, keep] @ down.down_proj.weight.T - target).square().sum()) < float(
        (x[:, keep] @ weight[:, keep].T - target).square().sum()
    )
    if old.down_proj.bias is not None:
        assert torch.equal(down.down_proj.bias, old.down_proj.bias)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "phi3"])
def test_value_channels_leave_with_all_columns_that_read_them(family: str) -> None:
    model = slim_model(family)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.3, restore=False)
    for block, old in zip(blocks_of(model), blocks_of(whole), strict=True):
        attention, before = block.self_attn, old.self_attn
        assert attention.v < before.v
        assert attention.v_proj.out_features == before.kv_heads * attention.v
        assert attention.o_proj.in_features == before.heads * attention.v
        for name in ("q_proj", "k_proj"):
            assert torch.equal(getattr(attention, name).weight, getattr(before, name).weight)
        # each kept row of a head, and the columns of the heads that read it, are where they were in each head
        for t in range(before.kv_heads):
            rows = before.v_proj.weight[t * before.v : (t + 1) * before.v]
            mine = attention.v_proj.weight[t * attention.v : (t + 1) * attention.v]
            kept = [int((rows == row).all(1).nonzero()[0, 0]) for row in mine]
            assert kept == sorted(set(kept))
            for h, owner in enumerate(owners(before)):
                if owner == t:
                    columns = before.o_proj.weight[:, h * before.v : (h + 1) * before.v][:, kept]
                    assert torch.equal(attention.o_proj.weight[:, h * attention.v : (h + 1) * attention.v], columns)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi"])
def test_without_a_refit_it_is_the_model_with_those_columns_at_zero(family: str) -> None:
    """Columns of the second matrix of each pair are zeroed; that rows of the first leave too costs nothing."""
    model = slim_model(family)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.3, restore=False)
    for block, old in zip(blocks_of(model), blocks_of(whole), strict=True):
        attention, before = block.self_attn, old.self_attn
        fold_value_bias_(before)  # exact, and before the cut
        rows = before.v_proj.weight.view(before.kv_heads, before.v, -1)
        cut = attention.v_proj.weight.view(before.kv_heads, attention.v, -1)
        values = (rows[:, :, None] == cut[:, None]).all(-1).any(-1)[torch.tensor(owners(before))]
        assert values.sum(1).tolist() == [attention.v] * before.heads
        before.o_proj.weight.data[:, ~values.flatten()] = 0
        neurons = (old.mlp.up_proj.weight[:, None] == block.mlp.up_proj.weight).all(-1).any(-1)
        assert int(neurons.sum()) == block.mlp.down_proj.in_features < len(neurons)
        old.mlp.down_proj.weight.data[:, ~neurons] = 0
    ids = batches_for(family)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_score_is_the_sum_of_what_wanda_ranks() -> None:
    """Without the sum over a column it is Wanda's score, whose smallest of each row would go."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 10, generator=generator), torch.randn(50, 10, generator=generator)
    energy = x.square().sum(0)
    torch.testing.assert_close(column_scores(weight, energy), wanda(weight, x.norm(dim=0)).sum(0), rtol=1e-6, atol=0)
    for row in weight:
        assert torch.equal(column_scores(row[None], energy).argsort(), wanda(row[None], x.norm(dim=0))[0].argsort())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_group_score_is_the_sum_over_the_columns_that_read_it(family: str) -> None:
    model = slim_model(family, double=True)
    for block in blocks_of(model):  # it would be folded before the inputs are looked at
        if block.self_attn.v_proj.bias is not None:
            nn.init.zeros_(block.self_attn.v_proj.bias)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.3, restore=False)
    attention, before = blocks_of(model)[0].self_attn, blocks_of(whole)[0].self_attn
    x = inputs_of(whole, before.o_proj, family)
    scores = (before.o_proj.weight.abs().sum(0) * x.norm(dim=0)).view(before.kv_heads, -1, before.v).sum(1)
    for t in range(before.kv_heads):
        keep = scores[t].argsort(descending=True)[: attention.v].sort().values
        rows = before.v_proj.weight[t * before.v : (t + 1) * before.v][keep]
        assert torch.equal(attention.v_proj.weight[t * attention.v : (t + 1) * attention.v], rows)


@pytest.mark.parametrize("family", [*BIASED, "qwen2"])
def test_a_value_bias_is_folded_exactly_and_before_the_fit(family: str) -> None:
    """With channels whose weights are zero, only their bias is lost: folding it makes the removal exact."""
    model = slim_model(family, double=True)
    with torch.no_grad():
        for block in blocks_of(model):
            for t in range(block.self_attn.kv_heads):
                block.self_attn.v_proj.weight[t * 8 : t * 8 + 3] = 0
            block.self_attn.v_proj.bias.normal_(0, 1.0)
    whole = copy.deepcopy(model)
    method: Any = bh.method("fasp", sparsity=0.1, damping=1e-9)
    batches = batches_for(family, count=4)
    for block in Walk(model, batches, precision="highest"):
        output = method.site(block, "self_attn.o_proj")
        assert output is not None
        fold_value_bias_(block.module.self_attn)
        method._cut_values(block, method._gram(block, output), 5)
        assert block.module.self_attn.v == 5
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]).logits, whole(batches[0]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in TEXT_FAMILIES if f not in ("gemma2", "gemma3_text")])
def test_the_refit_is_the_best_there_is_for_the_output_projection(family: str) -> None:
    """Whatever was folded: on the calibration data no other weights on the kept inputs do better."""
    model = slim_model(family, double=True)
    if blocks_of(model)[0].self_attn.v_proj.bias is not None:
        for block in blocks_of(model):
            nn.init.normal_(block.self_attn.v_proj.bias, 0, 1.0)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.3, damping=0.0)
    new, old = blocks_of(model)[0].self_attn.o_proj, blocks_of(whole)[0].self_attn.o_proj
    before, after = inputs_of(whole, old, family), inputs_of(model, new, family)
    target = before @ old.weight.T
    if new.bias is not None:
        target = target + (0 if old.bias is None else old.bias) - new.bias
    best = torch.linalg.lstsq(after, target).solution
    least = float((after @ best - target).square().sum())
    assert float((after @ new.weight.T - target).square().sum()) <= least * (1 + 1e-4) + 1e-9


def test_an_output_projection_without_bias_gets_one_for_the_values() -> None:
    """Qwen2's has none: the constant that its value biases add needs a place when channels leave."""
    model = slim_model("qwen2")
    run(model, "qwen2", sparsity=0.3)
    for block in blocks_of(model):
        assert block.self_attn.o_proj.bias is not None
        assert not block.self_attn.v_proj.bias.any()


def test_later_blocks_see_what_earlier_ones_became() -> None:
    """Sequential statistics: the second block is fitted on the output of the pruned first one."""
    model = slim_model("llama")
    whole = copy.deepcopy(model)
    run(model, "llama", sparsity=0.3, attention="skip", damping=1e-3)
    mixed = copy.deepcopy(whole)
    anatomy = anatomy_of(mixed)
    mixed.get_submodule(anatomy.blocks)[0] = copy.deepcopy(blocks_of(model)[0])
    down = blocks_of(mixed)[1].mlp.down_proj
    x = inputs_of(mixed, down, "llama").float()
    mine = blocks_of(model)[1].mlp
    rows = blocks_of(mixed)[1].mlp.up_proj.weight
    keep = torch.tensor([int((rows == row).all(1).nonzero()[0, 0]) for row in mine.up_proj.weight])
    want = refit(down.weight.data, x.T @ x, keep, 1e-3)
    torch.testing.assert_close(mine.down_proj.weight.data, want.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_restoring_is_better_and_random_is_worse(family: str) -> None:
    whole = build(family)
    batches = batches_for(family, count=8)
    errors = {}
    for name in ("fasp", "wanda-widths", "random-widths", "magnitude-widths"):
        model = copy.deepcopy(whole)
        bh.prune(model, bh.method(name, sparsity=0.2), batches)
        with torch.no_grad():
            errors[name] = sum(float((model(b).logits - whole(b).logits).square().sum()) for b in batches)
    assert errors["fasp"] < errors["wanda-widths"] < errors["random-widths"]


def test_random_channels_are_drawn_and_drawn_again() -> None:
    models = []
    for draw in (0, 0, 1):
        model = build("llama")
        bh.prune(model, bh.method("random-widths", sparsity=0.3, draw=draw))  # needs no data
        models.append(weights_of(model))
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    assert any(not torch.equal(models[0][k], models[2][k]) for k in models[0])


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_what_needs_no_data_takes_none(score: str) -> None:
    model = build("llama")
    bh.prune(model, bh.method("fasp", score=score, restore=False))
    assert is_slim(model)
    assert bh.method("fasp", score=score).requires == "calibration"
    assert bh.method("fasp", score=score, restore=False, sharing="influence").requires == "calibration"
    assert bh.method("magnitude-widths").requires == "nothing"


# -- how much --------------------------------------------------------------------------------------------------


def one_channel(block: Any) -> int:
    """The parameters of one more value channel per head, or of one neuron: what rounding may miss by."""
    attention, hidden = block.self_attn, block.self_attn.q_proj.in_features
    return max(hidden * (attention.heads + attention.kv_heads), 3 * hidden) + 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4])
def test_every_block_loses_its_share(family: str, sparsity: float) -> None:
    model = slim_model(family)
    before = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    kept = {n: p.clone() for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n}
    run(model, family, sparsity=sparsity)
    for block, size in zip(blocks_of(model), before, strict=True):
        left = sum(p.numel() for p in block.parameters())
        assert abs(size - left - sparsity * size) <= one_channel(block)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in kept.items())


def test_what_stays_whole_makes_the_rest_lose_more() -> None:
    """s' = 1.2 s in a block of OPT's shape, 4d² in the attention and 8d² in the MLP."""
    config = transformers.OPTConfig(
        hidden_size=128, ffn_dim=512, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=128, vocab_size=96
    )
    model: Any = transformers.OPTForCausalLM(config).eval()
    slim_(model)
    run(model, "opt", sparsity=0.25)
    block = blocks_of(model)[0]
    assert 1 - block.self_attn.v / 64 == pytest.approx(0.3, abs=0.01)
    assert 1 - block.mlp.down_proj.in_features / 512 == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.9, 0.8])
@pytest.mark.parametrize("sharing", ["uniform", "influence", "redundancy"])
def test_the_target_size_is_of_the_whole_model(family: str, share: float, sharing: str) -> None:
    model = build(family)
    whole = sum(p.numel() for p in model.parameters())
    bh.prune(model, bh.method("fasp", target_size=share, sharing=sharing), batches_for(family))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(share * whole, abs=0.01 * whole)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("sharing", ["influence", "redundancy"])
def test_blocks_that_do_more_keep_more(family: str, sharing: str) -> None:
    model = slim_model(family)
    influence = block_influence(Walk(model, batches_for(family, count=4), precision="highest"))
    run(model, family, sparsity=0.3, sharing=sharing)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    order = sorted(range(len(sizes)), key=influence.__getitem__)
    assert [sizes[i] for i in order] == sorted(sizes)
    assert len({*sizes}) > 1


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_widths_are_multiples(family: str, multiple: int) -> None:
    model = slim_model(family)
    full = blocks_of(model)[0].mlp.down_proj.in_features
    run(model, family, sparsity=0.3, round=multiple)
    for block in blocks_of(model):
        width = block.mlp.down_proj.in_features
        assert width % multiple == 0 or width == full
        assert block.self_attn.v % min(multiple, 8) == 0


# -- what a stock configuration can say ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.2, 0.35])
def test_uniform_gives_a_stock_model(family: str, sparsity: float) -> None:
    model = build(family)
    kind, before = type(model), inside(model)
    bh.prune(model, bh.method("fasp", sparsity=sparsity, uniform=True), batches_for(family))
    assert type(model) is kind
    assert not hasattr(model.config, "slim")
    again: Any = kind(model.config)  # the configuration alone gives all shapes
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(batches_for(family)[0]).logits, model(batches_for(family)[0]).logits)
    assert 1 - inside(model) / before == pytest.approx(sparsity, abs=0.03)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2"])
def test_uniform_removes_whole_groups_where_a_configuration_has_room_for_it(family: str) -> None:
    model = build(family)
    config: Any = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    bh.prune(model, bh.method("fasp", sparsity=0.4, uniform=True, attention="groups"), batches_for(family))
    config = model.config
    assert config.num_key_value_heads < groups
    assert config.num_attention_heads * groups == heads * config.num_key_value_heads


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox"])
def test_uniform_leaves_heads_where_their_number_says_their_width(family: str) -> None:
    model = build(family)
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    bh.prune(model, bh.method("fasp", sparsity=0.3, uniform=True, attention="groups"), batches_for(family))
    assert model.config.num_attention_heads == heads  # type: ignore[union-attr]


def test_uniform_and_shares_that_differ_exclude_each_other() -> None:
    with pytest.raises(bh.BillhookError, match="same widths in every layer"):
        bh.method("fasp", uniform=True, sharing="influence")


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_groups_leave_whole_and_the_weakest_first(family: str) -> None:
    model = slim_model(family, double=True)
    whole = copy.deepcopy(model)
    run(model, family, sparsity=0.4, attention="groups", restore=False)
    attention, before = blocks_of(model)[0].self_attn, blocks_of(whole)[0].self_attn
    assert attention.kv_heads < before.kv_heads
    assert attention.heads * before.kv_heads == before.heads * attention.kv_heads
    x = inputs_of(whole, before.o_proj, family)
    scores = (before.o_proj.weight.abs().sum(0) * x.norm(dim=0)).view(before.kv_heads, -1).sum(1)
    keep = scores.argsort(descending=True)[: attention.kv_heads].sort().values
    rows = before.k_proj.weight.view(before.kv_heads, -1, before.k_proj.in_features)[keep].flatten(0, 1)
    assert torch.equal(attention.k_proj.weight, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_skip_leaves_the_attention_alone(family: str) -> None:
    model = slim_model(family)
    before = {n: p.clone() for n, p in model.named_parameters() if "self_attn" in n}
    run(model, family, sparsity=0.2, attention="skip")
    after = {n: p for n, p in model.named_parameters() if "self_attn" in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


# -- what cannot be done ---------------------------------------------------------------------------------------


class Worked(Exception):
    """Calibration data were looked at, or a block was edited."""


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, no block may be computed."""

    def worked(*args: Any, **kwargs: Any) -> Any:
        raise Worked

    monkeypatch.setattr(Walk, "forward", worked)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 0.9}, "cannot be removed when only"),
        ({"sparsity": 0.65, "attention": "skip"}, "cannot be removed when only"),
        ({"sparsity": 0.99, "attention": "groups"}, "would leave no neurons|cannot be removed"),
        ({"sparsity": 0.7, "uniform": True, "attention": "skip"}, "cannot be removed when only"),
        ({"target_size": 0.05}, "cannot be reached"),
        ({"target_size": 0.2, "sharing": "influence"}, "cannot be"),
    ],
)
def test_what_is_too_much_is_said_before_any_work(options: dict[str, Any], match: str) -> None:
    model = build("llama")
    before = weights_of(model)
    with pytest.raises(bh.BillhookError, match=match):
        bh.prune(model, bh.method("fasp", **options), batches_for("llama"))
    for p in model.parameters():
        assert any(torch.equal(p, other) for other in before.values() if other.shape == p.shape)


@pytest.mark.parametrize(("sharing", "sparsity"), [("influence", 0.45), ("redundancy", 0.7)])
def test_shares_stay_within_what_may_leave_of_a_block(
    sharing: str, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniformly this much can go, so it can go by influence too."""
    monkeypatch.setattr("billhook.methods.structured.block_influence", lambda walk: [0.9, 0.5, 0.01])
    bh.prune(build("llama"), bh.method("fasp", sparsity=sparsity, sharing=sharing), batches_for("llama"))


def test_weights_that_data_make_infinite_are_refused() -> None:
    model = build("llama")
    for block in blocks_of(model):
        nn.init.constant_(block.mlp.up_proj.weight, 1e30)
    with pytest.raises(bh.BillhookError, match="not finite"):
        bh.prune(model, bh.method("fasp"), batches_for("llama"))


def test_blocks_that_were_emptied_are_passed_over() -> None:
    model = slim_model("llama")
    blocks = blocks_of(model)
    drop_attention_(blocks[0])
    drop_mlp_(blocks[0])
    drop_mlp_(blocks[1])
    reshape(model)
    run(model, "llama", sparsity=0.2)
    assert blocks[1].self_attn.v < 8
    assert blocks[2].mlp.down_proj.in_features < 48


def test_gram_matrices_are_of_the_kept_attention() -> None:
    """The MLP is fitted after the attention was cut: its Gram matrix is collected anew."""
    model = slim_model("llama")
    order: list[tuple[str, int]] = []
    collect = Block.collect
    batches = batches_for("llama")
    method: Any = bh.method("fasp", sparsity=0.3)
    walk = Walk(model, batches)

    def spy(self: Any, statistic: Any, sites: Any = None, **more: Any) -> Any:
        assert statistic is Gram
        order.append((sites[0].projection, self.module.self_attn.v))
        return collect(self, statistic, sites, **more)

    with mock.patch.object(Block, "collect", spy):
        method.prune(walk)
    assert [name for name, _ in order] == ["self_attn.o_proj", "mlp.down_proj"] * 3
    assert all(v == 8 for name, v in order if "o_proj" in name)
    assert all(v < 8 for name, v in order if "down" in name)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma2", "vit"])
@pytest.mark.parametrize("attention", ["values", "groups", "skip"])
def test_held_inputs_give_what_computing_them_again_gives(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = weights_of(run(slim_model(family, double=True), family, sparsity=0.3, attention=attention))
    monkeypatch.setattr("billhook.calibrate.walk._HELD", 0)
    again = weights_of(run(slim_model(family, double=True), family, sparsity=0.3, attention=attention))
    assert held.keys() == again.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("attention", ["values", "skip"])
def test_no_layer_is_computed_twice_but_the_last_of_each_part(attention: str) -> None:
    model = slim_model("llama")
    block = blocks_of(model)[0]
    calls = dict.fromkeys(("self_attn.q_proj", "mlp.gate_proj"), 0)
    for name in calls:
        block.get_submodule(name).register_forward_hook(
            lambda m, a, o, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    run(model, "llama", sparsity=0.3, attention=attention)
    # the first batch passes the dense block as a whole, for the report
    assert calls == {"self_attn.q_proj": 4, "mlp.gate_proj": 4 + (attention == "values")}
    assert not any("forward" in vars(part) for part in (block.self_attn, block.mlp))


def test_inputs_are_not_held_where_memory_is_limited() -> None:
    model = slim_model("llama")
    walk = Walk(model, batches_for("llama"), max_memory=1 << 40)
    for block in walk:
        site = block.sites[0]
        block.collect(Gram, [site], hold=[site])
        assert not block._held
        break
