"""MoDeGPT against written-out algebra: each of its three modules, its allocation, its budget, and whole runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import billhook as bh
import billhook.methods.modegpt  # registers itself
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.ahead import with_dense
from billhook.calibrate.journal import Journal
from billhook.calibrate.statistics import TokenSum, Total
from billhook.calibrate.walk import Walk
from billhook.methods.modegpt import MoDeGPT, fold_value_bias_
from billhook.run import reshape
from billhook.sparsity.lowrank import balanced, fewer_channels
from billhook.sparsity.refit import refit, refit_error
from billhook.sparsity.structure import entropic, output_energy, ridge_leverage, strongest
from billhook.surgery.modeling_slim import _rotary
from billhook.surgery.shrink import keep_neurons_, keep_pairs_, owners, rotary_pairs
from billhook.surgery.slim import slim_
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, tiny_tokenizer, weights_of

FOUR = ["llama", "qwen3", "opt", "gpt2"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Tokens whose channels have unequal energies and depend on each other, [tokens, width]."""
    return rand(tokens, width, seed=seed) @ rand(width, width, seed=seed + 1) * torch.linspace(0.3, 2, width).double()


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def size_of_blocks(model: nn.Module) -> int:
    return sum(p.numel() for block in blocks_of(model) for p in block.parameters())


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(ids).logits
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def pruned(family: str, batches: int = 3, **options: Any) -> Any:
    model = build(family)
    bh.prune(model, MoDeGPT(**options), batches_for(family, count=batches), precision="highest")
    return model


def slim(family: str) -> Any:
    model = build(family)
    slim_(model)
    return model


def inputs_of(model: nn.Module, modules: list[nn.Module], batches: list[Tensor]) -> list[Tensor]:
    """What enters each module over all batches, float64 [tokens, in]."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = [
        m.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, 1).double()))  # type: ignore[misc]
        for m, into in zip(modules, seen, strict=True)
    ]
    for batch in batches:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


# -- 1: nothing is removed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize("family", FOUR)
def test_at_sparsity_zero_nothing_changes(family: str, statistics: str) -> None:
    model = build(family)
    before, ids = weights_of(model), batches_for(family)[0]
    want = logits(model, ids)
    bh.prune(model, MoDeGPT(sparsity=0.0, statistics=statistics), batches_for(family))
    assert torch.equal(logits(model, ids), want)
    after = weights_of(model)
    assert after.keys() == before.keys()  # a stock model again
    assert all(torch.equal(after[name], before[name]) for name in before)


# -- 2, 3, 4: the MLP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_refit_error_is_schur_complement_and_least_squares(seed: int) -> None:
    z, down = correlated(200, 12, seed), rand(7, 12, seed=seed + 5)
    gram, wanted = z.T @ z, z @ down.T
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    errors = []
    for count in range(1, 13):
        keep = order[:count].sort().values
        new = refit(down, gram, keep, damping=0.0)
        error = float((wanted - z[:, keep] @ new.T).square().sum())
        oracle = torch.linalg.lstsq(z[:, keep], wanted, driver="gelsd").solution
        least = float((wanted - z[:, keep] @ oracle).square().sum())
        scale = float(wanted.square().sum())
        assert error == pytest.approx(refit_error(down, gram, keep), rel=1e-6, abs=1e-12 * scale)
        assert error == pytest.approx(least, rel=1e-6, abs=1e-12 * scale)
        assert error <= float((wanted - z[:, keep] @ down[:, keep].T).square().sum()) * (1 + 1e-9)
        errors.append(error)
    assert all(later <= earlier * (1 + 1e-9) + 1e-9 for earlier, later in pairwise(errors))


def test_one_of_two_equal_neurons_costs_nothing() -> None:
    """Copy a neuron's gate and up rows and split its column of down: the narrower MLP computes the same."""
    model = slim("llama").double()
    block = blocks_of(model)[0]
    mlp = block.mlp
    with torch.no_grad():
        mlp.gate_proj.weight[5], mlp.up_proj.weight[5] = mlp.gate_proj.weight[2], mlp.up_proj.weight[2]
        mlp.down_proj.weight[:, 5] = 0.3 * mlp.down_proj.weight[:, 2]
        mlp.down_proj.weight[:, 2] *= 0.7
    x = rand(400, 32)
    with torch.no_grad():
        z = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        want = mlp(x)
        gram = z.T @ z
        keep = torch.tensor([i for i in range(48) if i != 5])
        new = refit(mlp.down_proj.weight, gram, keep, damping=0.0)
        keep_neurons_(block, keep)
        mlp.down_proj.weight.copy_(new)
        assert float((mlp(x) - want).square().sum(1).mean()) < 1e-8
    scores = ridge_leverage(gram, 1e-6)
    assert scores[2] == pytest.approx(0.5, abs=1e-3)  # each tells what the other does
    assert scores[5] == pytest.approx(0.5, abs=1e-3)


def test_leverage_limits_range_and_sum() -> None:
    x = correlated(500, 10)
    gram = x.T @ x
    gram = gram / gram.diagonal().mean()
    large, small = ridge_leverage(gram, 1e9), ridge_leverage(gram, 1e-9)
    assert torch.equal(large.argsort(), gram.diagonal().argsort())
    # s_i = 1 - λ [H⁻¹]_ii: with little λ the order of 1/[H⁻¹]_ii, the error of predicting i from all others
    assert torch.equal(small.argsort(), (1 / torch.linalg.inv(gram).diagonal()).argsort())
    for ridge in (1e-6, 1e-2, 1.0, 1e3):
        scores = ridge_leverage(gram, ridge)
        values = torch.linalg.eigvalsh(gram)
        assert ((scores >= 0) & (scores < 1)).all()
        assert float(scores.sum()) == pytest.approx(float((values / (values + ridge)).sum()), rel=1e-9)
        oracle = (gram @ torch.linalg.inv(gram + ridge * torch.eye(10))).diagonal()
        torch.testing.assert_close(scores, oracle, rtol=1e-8, atol=1e-12)


def test_leverage_of_dead_and_of_badly_rounded_channels() -> None:
    x = correlated(300, 8)
    x[:, 3] = 0
    scores = ridge_leverage(x.T @ x, 1e-2)
    assert scores[3] == pytest.approx(0, abs=1e-12)
    assert int(scores.argmin()) == 3
    assert torch.equal(ridge_leverage(torch.zeros(4, 4), 1e-2), torch.zeros(4).double())
    broken = x.T @ x - 5.0 * torch.eye(8) * (x.T @ x).diagonal().mean()  # not positive definite at all
    fallback = ridge_leverage(broken, 1e-2)
    assert ((fallback >= 0) & (fallback <= 1)).all()


# -- 5, 6: queries and keys -------------------------------------------------------------------------------------------


def test_pair_scores_do_not_see_the_rotation() -> None:
    head, tokens = 8, 60
    x = correlated(tokens, 2 * head)
    query, key = x[:, :head], x[:, head:]
    energy = query.T @ query
    torch.testing.assert_close(root(energy).norm(dim=0), energy.diagonal().sqrt(), rtol=1e-10, atol=1e-10)

    frequencies = 0.7 ** torch.arange(head // 2).double()
    angles = torch.arange(tokens).double()[:, None] * frequencies
    cos, sin = (torch.cat([f(angles), f(angles)], 1) for f in (torch.cos, torch.sin))

    def singles(q: Tensor, k: Tensor) -> Tensor:
        return (q.square().sum(0) * k.square().sum(0)).sqrt()

    def pairs(q: Tensor, k: Tensor) -> Tensor:
        q, k = (e.square().sum(0).view(2, -1).sum(0) for e in (q, k))
        return (q * k).sqrt()

    turned = _rotary(query, cos, sin), _rotary(key, cos, sin)
    torch.testing.assert_close(pairs(*turned), pairs(query, key), rtol=1e-10, atol=1e-10)
    assert relative(singles(*turned), singles(query, key)) > 1e-2


def test_error_of_dropped_channels_and_its_bound() -> None:
    head, tokens = 6, 40
    query, key = correlated(tokens, head, 3), correlated(tokens, head, 9)
    moments = query.T @ query / tokens, key.T @ key / tokens
    scores = (moments[0].diagonal() * moments[1].diagonal()).sqrt()
    for count in range(1, head + 1):
        keep = strongest(scores, count)
        gone = torch.tensor([i for i in range(head) if i not in keep.tolist()], dtype=torch.long)
        measured = float((query @ key.T - query[:, keep] @ key[:, keep].T).square().sum())
        formula = tokens**2 * float((moments[0][gone][:, gone] * moments[1][gone][:, gone]).sum())
        assert measured == pytest.approx(formula, rel=1e-10, abs=1e-10)
        bound = tokens**2 * float(scores[gone].sum()) ** 2
        outer = tokens**2 * ((head - count) / head) ** 2 * float(moments[0].trace() * moments[1].trace())
        assert measured <= bound * (1 + 1e-9) + 1e-12
        assert bound <= outer * (1 + 1e-9) + 1e-12


def test_all_pairs_kept_gives_the_same_logits() -> None:
    model, ids = slim("llama"), batches_for("llama")[0]
    want = logits(model, ids)
    for block in blocks_of(model):
        keep_pairs_(block, torch.arange(4).expand(2, -1))
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-5, atol=1e-5)


def test_output_energy_is_the_energy_of_the_outputs() -> None:
    x, weight, bias = correlated(70, 5), rand(9, 5), rand(9, seed=4)
    total = Total(x.sum(0), 70.0)
    torch.testing.assert_close(
        output_energy(weight, bias, x.T @ x, total), (x @ weight.T + bias).square().sum(0), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        output_energy(weight, None, x.T @ x, total), (x @ weight.T).square().sum(0), rtol=1e-9, atol=1e-9
    )


def test_token_sum() -> None:
    one = TokenSum(3, torch.device("cpu"))
    a, b = rand(4, 3), rand(6, 3, seed=1)
    for part in (a, b):
        one.update(part.float())
    assert one.result().tokens == 10
    torch.testing.assert_close(one.result().sum, torch.cat([a, b]).sum(0), rtol=1e-6, atol=1e-6)


def unit(energy: Tensor, half: int) -> Tensor:
    """The energies of a head's rotary pairs, or of its channels where there are none."""
    return energy[:half] + energy[half : 2 * half] if half else energy


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "opt", "gpt2"])
def test_pairs_that_stay_are_those_of_most_measured_energy(family: str) -> None:
    """From the projections' outputs themselves, biases and groups included, head by head."""
    batches = batches_for(family)
    whole, model = slim(family), build(family)
    bh.prune(model, MoDeGPT(sparsity=0.05, modules="qk", sharing="uniform"), batches, precision="highest")
    for before, after in zip(blocks_of(whole), blocks_of(model), strict=True):
        own, cut = before.self_attn, after.self_attn
        x = inputs_of(whole, [own.q_proj], batches)[0]
        query = (x @ own.q_proj.weight.double().T + (0 if own.q_proj.bias is None else own.q_proj.bias)).detach()
        key = (x @ own.k_proj.weight.double().T + (0 if own.k_proj.bias is None else own.k_proj.bias)).detach()
        half = rotary_pairs(own)
        kept_units = rotary_pairs(cut) if half else cut.qk
        rows = []
        for t in range(own.kv_heads):
            k = unit(key[:, t * own.qk : (t + 1) * own.qk].square().sum(0), half)
            q = torch.zeros_like(k)
            for head in (h for h, owner in enumerate(owners(own)) if owner == t):
                q += unit(query[:, head * own.qk : (head + 1) * own.qk].square().sum(0), half)
            best = sorted(sorted(range(len(k)), key=lambda i: -float(q[i] * k[i]))[:kept_units])
            if half:
                assert cut.pairs[t] == best
                rows += [t * own.qk + i for i in (*best, *(half + b for b in best), *range(2 * half, own.qk))]
            else:
                rows += [t * own.qk + i for i in best]
        assert cut.qk < own.qk
        assert torch.equal(cut.k_proj.weight, own.k_proj.weight[rows])
        assert torch.equal(cut.v_proj.weight, own.v_proj.weight)
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_normalised_queries_and_keys_stay_and_the_report_says_so() -> None:
    model, before = build("qwen3"), slim("qwen3")
    report = bh.prune(model, MoDeGPT(sparsity=0.3), batches_for("qwen3"))
    assert "normalised" in " ".join(report.steps[0].notes)
    for old, new in zip(blocks_of(before), blocks_of(model), strict=True):
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        assert torch.equal(old.self_attn.k_proj.weight, new.self_attn.k_proj.weight)
        assert new.self_attn.v < old.self_attn.v or new.mlp.down_proj.in_features <= 48
    assert size_of_blocks(model) / size_of_blocks(before) == pytest.approx(0.7, abs=0.01)
    enough = batches_for("llama", count=8)
    assert not bh.prune(build("llama"), MoDeGPT(sparsity=0.3), enough).steps[0].notes
    few = bh.prune(build("llama"), MoDeGPT(sparsity=0.3), enough[:7]).steps[0].notes
    assert len(few) == 1
    assert "336 calibration tokens are fewer than 8 for each of 48 neurons" in few[0]


# -- 7, 8: values and outputs -----------------------------------------------------------------------------------------


def heads_of(groups: int, hidden: int = 12, head: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x [tokens, hidden], a value head [head, hidden], its readers' output columns [groups·hidden, head]."""
    return correlated(80, hidden, seed), rand(head, hidden, seed=seed + 3), rand(groups * hidden, head, seed=seed + 7)


@pytest.mark.parametrize("groups", [1, 3])
def test_values_are_the_weighted_truncated_svd(groups: int) -> None:
    x, value, output = heads_of(groups)
    gram = x.T @ x
    product = output @ value  # [out, hidden]
    theta = torch.linalg.svdvals(product @ root(gram))
    left, singular, right = torch.linalg.svd(product @ root(gram), full_matrices=False)
    for count in range(1, 7):
        encode, decode = fewer_channels(value @ gram @ value.T, output, count)
        small = output @ decode @ encode @ value
        error = float((x @ (product - small).T).square().sum())
        scale = float(theta.square().sum())
        assert error == pytest.approx(float(theta[count:].square().sum()), rel=1e-10, abs=1e-10 * scale)
        best = left[:, :count] * singular[:count] @ right[:count] @ torch.linalg.inv(root(gram))
        torch.testing.assert_close(small, best, rtol=1e-8, atol=1e-8)
        writer, reader = balanced(encode @ value, output @ decode)
        torch.testing.assert_close(reader @ writer, small, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(writer.norm(dim=1), reader.norm(dim=0), rtol=1e-8, atol=1e-8)
        damped = fewer_channels(value @ gram @ value.T, output, count, damping=1e-6)
        torch.testing.assert_close(output @ damped[1] @ damped[0] @ value, small, rtol=1e-3, atol=1e-3)


def test_values_agree_with_the_papers_two_decompositions() -> None:
    x, value, output = heads_of(1)
    half = root(x.T @ x)
    u, s, v = torch.linalg.svd(half @ value.T, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(torch.diag(s) @ v @ output.T, full_matrices=False)
    for count in range(1, 7):
        first = torch.linalg.inv(half) @ u @ u2[:, :count]
        paper = first * s2[:count] @ v2[:count]  # [hidden, out]
        encode, decode = fewer_channels(value @ (x.T @ x) @ value.T, output, count)
        torch.testing.assert_close((output @ decode @ encode @ value).T, paper, rtol=1e-8, atol=1e-8)


def test_joint_is_never_worse_than_value_only() -> None:
    x, value, output = heads_of(3, seed=11)
    moment = value @ (x.T @ x) @ value.T
    for count in range(1, 7):
        errors = []
        for reader in (output, None):
            encode, decode = fewer_channels(moment, reader, count)
            errors.append(float((x @ (output @ value - output @ decode @ encode @ value).T).square().sum()))
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9
        encode, decode = fewer_channels(moment, None, count)
        assert relative(decode @ decode.T, decode @ encode) < 1e-10  # an orthogonal projection of the values
        lost = float((x @ value.T @ (torch.eye(6).double() - decode @ encode).T).square().sum())
        least = torch.linalg.eigvalsh(moment)[: 6 - count].sum()
        assert lost == pytest.approx(float(least), rel=1e-9, abs=1e-9)


def test_a_singular_moment_keeps_what_is_in_it() -> None:
    x, value, output = heads_of(1)
    x[:, :] = x[:, :1] @ rand(1, 12) + x[:, 1:2] @ rand(1, 12, seed=1)  # inputs of rank two
    gram = x.T @ x
    encode, decode = fewer_channels(value @ gram @ value.T, output, 4)
    assert encode.shape == (4, 6)
    assert torch.isfinite(encode).all()
    assert relative(x @ (output @ decode @ encode @ value).T, x @ (output @ value).T) < 1e-6
    writer, reader = balanced(encode @ value, output @ decode)
    assert torch.isfinite(writer).all()
    assert torch.isfinite(reader).all()
    encode, decode = fewer_channels(torch.zeros(3, 3), rand(5, 3), 2)
    assert torch.isfinite(encode @ decode).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_value_heads_of_a_model_have_the_least_error(family: str) -> None:
    """Of each key/value head: the sum of its readers' output errors is that of the truncated SVD of all of them."""
    batches = batches_for(family)
    whole = slim(family)
    model = pruned(family, modules="vo", sharing="uniform", sparsity=0.08, damping=0.0)
    for before, after in zip(blocks_of(whole), blocks_of(model), strict=True):
        old, new = before.self_attn, after.self_attn
        assert new.v < old.v
        x = inputs_of(whole, [old.v_proj], batches)[0]
        half = root(x.T @ x)
        v, w = (a.v_proj.weight.detach().double().view(a.kv_heads, a.v, -1) for a in (old, new))
        o, p = (a.o_proj.weight.detach().double().view(-1, a.heads, a.v) for a in (old, new))
        for t in range(old.kv_heads):
            readers = [h for h, owner in enumerate(owners(old)) if owner == t]
            stacked = torch.cat([o[:, h] @ v[t] for h in readers])
            small = torch.cat([p[:, h] @ w[t] for h in readers])
            error = float((x @ (stacked - small).T).square().sum())
            least = float(torch.linalg.svdvals(stacked @ half)[new.v :].square().sum())
            assert error == pytest.approx(least, rel=1e-3)
        assert new.v_proj.bias is None or not new.v_proj.bias.any()


def test_the_best_for_the_values_ignores_their_readers() -> None:
    """gqa_vo=value: each value head on the principal components of its values, U Uᵀ between value and output."""
    batches = batches_for("llama", count=1)
    options: dict[str, Any] = {"batches": 1, "modules": "vo", "sharing": "uniform", "sparsity": 0.08}
    whole, model, joint = slim("llama"), pruned("llama", gqa_vo="value", **options), pruned("llama", **options)
    for before, after, other in zip(*(blocks_of(m) for m in (whole, model, joint)), strict=True):
        old, new = before.self_attn, after.self_attn
        x = inputs_of(whole, [old.v_proj], batches)[0]
        v, w = (a.v_proj.weight.detach().double().view(a.kv_heads, a.v, -1) for a in (old, new))
        o, p = (a.o_proj.weight.detach().double().view(-1, a.heads, a.v) for a in (old, new))
        for head, t in enumerate(owners(old)):
            values = x @ v[t].T
            axes = torch.linalg.eigh(values.T @ values).eigenvectors[:, -new.v :]
            torch.testing.assert_close(p[:, head] @ w[t], o[:, head] @ axes @ axes.T @ v[t], rtol=1e-3, atol=1e-4)
        assert not torch.equal(new.v_proj.weight, other.self_attn.v_proj.weight)
    # where every query head has values of its own, there is one reader, and both are the same
    one, two = (weights_of(pruned("opt", gqa_vo=way, **options)) for way in ("joint", "value"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2", "gpt_neox"])
def test_a_value_bias_can_be_folded_away(family: str) -> None:
    model, ids = slim(family), batches_for(family)[0]
    want = logits(model, ids)
    for block in blocks_of(model):
        assert block.self_attn.v_proj.bias.any()
        fold_value_bias_(block.self_attn)
        assert not block.self_attn.v_proj.bias.any()
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-5, atol=1e-5)


# -- 9: the allocation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.4, 0.85])
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
def test_allocation_is_the_optimum(epsilon: float, cap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(8, generator=generator).double()
    ratios = torch.tensor(entropic(scores.tolist(), 0.3, epsilon, cap), dtype=torch.float64)
    assert float(ratios.mean()) == pytest.approx(0.3, abs=1e-9)
    assert float(ratios.max()) <= cap + 1e-12
    if epsilon < 0.05:
        assert float(ratios.max()) == pytest.approx(cap, abs=1e-12)  # so that the cap is at work
    by_score = ratios[scores.argsort()]
    assert (by_score[1:] <= by_score[:-1] + 1e-12).all()

    def objective(r: Tensor) -> float:
        return float((scores * (1 - r)).sum() - epsilon * (r * r.clamp_min(1e-300).log()).sum())

    # every feasible change is made of what one block hands to another
    best, tried = objective(ratios), 0
    for giver, taker in permutations(range(8), 2):
        most = min(float(ratios[giver]), cap - float(ratios[taker]))
        for part in (1.0, 0.3, 0.01) if most > 1e-6 else ():
            other = ratios.clone()
            other[giver] -= part * most
            other[taker] += part * most
            tried += 1
            assert objective(other) < best
    assert tried > 20
    for _ in range(30):  # and many at once: other feasible points, and the way to them
        drawn = torch.rand(8, generator=generator).tolist()
        other = torch.tensor(entropic(drawn, 0.3, 0.1, cap), dtype=torch.float64)
        assert all(objective(ratios + part * (other - ratios)) < best for part in (1.0, 0.1))


def test_allocation_with_much_entropy_is_uniform() -> None:
    scores = torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist()
    assert entropic(scores, 0.3, 1e6) == pytest.approx([0.3] * 12, abs=1e-4)


def test_blocks_of_little_influence_lose_more() -> None:
    batches = batches_for("llama")
    model = slim("llama")
    scores = [0.0] * 3
    for index, block in enumerate(blocks_of(model)):
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, into: list[Tensor] = seen) -> None:
            into.append(nn.functional.cosine_similarity(args[0].double(), output.double(), dim=-1).flatten())

        handle = block.register_forward_hook(hook, with_kwargs=True)
        for batch in batches:
            logits(model, batch)
        handle.remove()
        scores[index] = 1 - float(torch.cat(seen).mean())
    method = MoDeGPT(sparsity=0.3, epsilon=0.2)
    ratios = method.ratios(Walk(slim("llama"), batches, precision="highest"))
    assert ratios == pytest.approx(entropic(scores, 0.3, 0.2), abs=1e-5)
    assert sorted(range(3), key=lambda i: scores[i]) == sorted(range(3), key=lambda i: -ratios[i])


def test_the_cap_counts_within_what_may_leave() -> None:
    """Only values: they are a seventh of a block, so no block may lose more than that, whatever its influence."""
    model = slim("llama")
    walk = Walk(model, batches_for("llama"))
    method = MoDeGPT(sparsity=0.1, modules="vo", epsilon=1e-4, cap=0.9)
    removable = 3 * 32 * 16 / size_of_blocks(model) * 3  # v: 16 x 32, o: 32 x 32
    ratios = method.ratios(walk)
    assert max(ratios) == pytest.approx(0.9 * removable, rel=1e-9)
    assert sum(ratios) / 3 == pytest.approx(0.1, abs=1e-9)
    small = pruned("llama", sparsity=0.1, modules="vo", epsilon=1e-4, cap=0.9)
    assert torch.isfinite(logits(small, batches_for("llama")[0])).all()
    with pytest.raises(bh.BillhookError, match="cap"):
        bh.prune(build("llama"), MoDeGPT(sparsity=0.19, modules="vo"), batches_for("llama"))
    with pytest.raises(bh.BillhookError, match="narrow more modules"):
        bh.prune(build("llama"), MoDeGPT(sparsity=0.5, modules="vo", sharing="uniform"), batches_for("llama"))


# -- 10: what comes out -----------------------------------------------------------------------------------------------


def padded(small: Any, family: str) -> Any:
    """A slim model of full widths with the weights of `small` where they belong and zeros elsewhere."""
    whole = slim(family)
    for old, new in zip(blocks_of(whole), blocks_of(small), strict=True):
        own, cut = old.self_attn, new.self_attn
        half = rotary_pairs(own)
        rows = {}
        for t in range(own.kv_heads):
            pairs = cut.pairs[t] if cut.pairs else list(range(half))
            rows[t] = [*pairs, *(half + p for p in pairs), *range(2 * half, own.qk)] if half else range(cut.qk)
        queries = [h * own.qk + i for h, t in enumerate(owners(own)) for i in rows[t]]
        keys = [t * own.qk + i for t in range(own.kv_heads) for i in rows[t]]
        values = [t * own.v + i for t in range(own.kv_heads) for i in range(cut.v)]
        outputs = [h * own.v + i for h in range(own.heads) for i in range(cut.v)]
        neurons = range(new.mlp.down_proj.in_features)
        with torch.no_grad():
            for name, index in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
                _rows(getattr(own, name), getattr(cut, name), list(index))
            own.o_proj.weight.zero_()[:, outputs] = cut.o_proj.weight
            if cut.o_proj.bias is not None:
                own.o_proj.bias = nn.Parameter(cut.o_proj.bias.clone())
            for name in ("gate_proj", "up_proj"):
                if hasattr(old.mlp, name):
                    _rows(getattr(old.mlp, name), getattr(new.mlp, name), list(neurons))
            old.mlp.down_proj.weight.zero_()[:, list(neurons)] = new.mlp.down_proj.weight
    return whole


def _rows(into: nn.Linear, values: nn.Linear, index: list[int]) -> None:
    into.weight.zero_()[index] = values.weight
    if into.bias is not None:
        into.bias.zero_()[index] = values.bias


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi", "opt", "gpt2"])
def test_it_computes_what_the_padded_whole_does(family: str) -> None:
    """Prefill, and one token after the other with a cache whose keys and values are narrower and differ in width."""
    small = pruned(family, sparsity=0.3)
    whole = padded(small, family)
    ids = batches_for(family)[0]
    want = logits(whole, ids)
    torch.testing.assert_close(logits(small, ids), want, rtol=1e-5, atol=1e-5)
    cache, steps = None, []
    for token in range(ids.shape[1]):
        with torch.no_grad():
            out = small(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_size_is_as_asked_and_outputs_are_finite(family: str, sparsity: float) -> None:
    before, batches = slim(family), batches_for(family)
    model = pruned(family, sparsity=sparsity)
    neuron = max(p.numel() for p in blocks_of(before)[0].mlp.parameters()) / 48 * 3
    removed = size_of_blocks(before) - size_of_blocks(model)
    # half a neuron per block, and a bias that may come or go with the value's
    assert removed == pytest.approx(sparsity * size_of_blocks(before), abs=3 * (neuron / 2 + 48))
    assert torch.isfinite(logits(model, batches[0])).all()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_ratio_for_all_widths_of_a_block(family: str) -> None:
    model = pruned(family, sparsity=0.25, sharing="uniform")
    for block in blocks_of(model):
        assert block.self_attn.qk == 6
        assert block.self_attn.v == 6
        assert block.mlp.down_proj.in_features in (35, 36)  # norms stay whole, and the MLP makes up for them
    assert model.config.slim["layers"][0]["attention"]["v"] == 6


def test_widths_are_rounded() -> None:
    model = pruned("llama", sparsity=0.3, round=4)
    for block in blocks_of(model):
        assert block.self_attn.qk % 4 == 0
        assert block.self_attn.v % 4 == 0
        assert block.mlp.down_proj.in_features % 4 == 0
    odd = pruned("llama", sparsity=0.4, round=3)
    for block in blocks_of(odd):
        assert block.self_attn.qk in (6, 8)
        assert block.mlp.down_proj.in_features % 3 == 0


def test_target_size() -> None:
    before = build("llama")
    model = pruned("llama", target_size=0.8)
    got, all_ = (sum(p.numel() for p in m.parameters()) for m in (model, before))
    assert got / all_ == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("modules", ["mlp", "qk", "vo", "mlp,vo"])
def test_only_what_is_asked_is_narrowed(modules: str) -> None:
    model, whole = pruned("llama", sparsity=0.06, sharing="uniform", modules=modules), slim("llama")
    for old, new in zip(blocks_of(whole), blocks_of(model), strict=True):
        own, cut = old.self_attn, new.self_attn if hasattr(new, "self_attn") else None
        assert ("mlp" in modules) == (new.mlp.down_proj.in_features < 48)
        if hasattr(cut, "qk"):
            assert ("qk" in modules) == (cut.qk < own.qk)
            assert ("vo" in modules) == (cut.v < own.v)
        else:  # a stock model again: only neurons left
            assert modules == "mlp"


def test_options_are_declared() -> None:
    assert MoDeGPT(modules="vo, mlp").modules == "mlp+vo"
    with pytest.raises(bh.BillhookError, match="some of mlp, qk, vo"):
        MoDeGPT(modules="mlp,heads")
    with pytest.raises(bh.BillhookError, match="epsilon"):
        MoDeGPT(epsilon=0)
    method = bh.method("modegpt", modules="mlp,qk", epsilon=0.1)
    from billhook.methods.base import METHODS

    assert METHODS.parse(method.text()) == method
    assert MoDeGPT().sharing == "influence"


# -- 11: beside FASP --------------------------------------------------------------------------------------------------


def test_with_fasps_neurons_the_refit_is_fasps() -> None:
    batches = batches_for("llama")
    fasp, whole = build("llama"), slim("llama")
    bh.prune(fasp, bh.FASP(sparsity=0.2, damping=1e-6, attention="skip"), batches, precision="highest")
    old, new = blocks_of(whole)[0], blocks_of(fasp)[0]
    keep = torch.tensor(
        [next(i for i, row in enumerate(old.mlp.up_proj.weight) if torch.equal(row, r)) for r in new.mlp.up_proj.weight]
    )
    z = inputs_of(whole, [old.mlp.down_proj], batches)[0]
    ours = refit(old.mlp.down_proj.weight.detach(), z.T @ z, keep, 1e-6)
    torch.testing.assert_close(ours.float(), new.mlp.down_proj.weight.detach(), rtol=1e-3, atol=1e-4)


# -- whose statistics, and scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_statistics_are_of_the_model_that_is_named(statistics: str) -> None:
    """The last block's neurons: from the inputs of the untouched model, or from those after pruned predecessors."""
    batches = batches_for("llama", count=8)
    options: dict[str, Any] = {"sparsity": 0.3, "modules": "mlp", "sharing": "uniform", "damping": 1e-3}
    model, whole = build("llama"), build("llama")
    bh.prune(model, MoDeGPT(statistics=statistics, **options), batches, precision="highest")
    reference = whole
    if statistics == "sequential":
        reference = copy.deepcopy(whole)
        bh.prune(reference, MoDeGPT(statistics="sequential", **options), batches, precision="highest")
        assert type(reference) is type(whole)  # uniform neurons: a stock model again
        reference.model.layers[2] = whole.model.layers[2]  # type: ignore[union-attr, index, operator]
    old, new = blocks_of(whole)[2].mlp, blocks_of(model)[2].mlp
    z = inputs_of(reference, [old.down_proj], batches)[0]
    keep = strongest(ridge_leverage(z.T @ z, 1e-2), new.down_proj.in_features)
    assert torch.equal(new.up_proj.weight, old.up_proj.weight[keep])
    want = refit(old.down_proj.weight.detach(), z.T @ z, keep, 1e-3).float()
    torch.testing.assert_close(new.down_proj.weight.detach(), want, rtol=1e-3, atol=1e-4)


def test_the_look_ahead_is_dense_and_in_step() -> None:
    batches = batches_for("llama")
    whole, model = slim("llama"), slim("llama")
    wanted = inputs_of(whole, [b.mlp.down_proj for b in blocks_of(whole)], batches)
    walk = Walk(model, batches, precision="highest")
    seen = []

    def gather(block: Any) -> Tensor:
        site = next(s for s in block.sites if s.projection == "mlp.down_proj")
        return block.collect(bh.Gram, [site])[site].matrix  # type: ignore[no-any-return]

    for block, gram in with_dense(walk, gather):
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(gram, (wanted[block.index].T @ wanted[block.index]).float(), rtol=1e-4, atol=1e-4)
        block.module.mlp.down_proj.weight.zero_()
        block.module.self_attn.o_proj.weight.zero_()
        seen.append(block.index)
    assert seen == [0, 1, 2]
    assert torch.is_grad_enabled()
    assert len(walk.block_records) == 3
    assert all(record.error is not None for record in walk.block_records)
    for _ in with_dense(Walk(model, batches), lambda block: None):
        break  # leaving early leaves nothing switched off
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "opt"])
def test_streamed_equals_in_memory_and_the_folder_loads(
    family: str, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, batches, method = make_folder(family), batches_for(family), MoDeGPT(sparsity=0.3)
    resident, _ = bh.load(folder)
    bh.prune(resident, method, batches)
    streamed, _ = bh.load(folder, stream=True)
    bh.prune(streamed, method, batches, out=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = weights_of(resident)
    found = weights_of(again)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(again.eval(), batches[0]), logits(resident, batches[0]))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored) <= set(again.state_dict())


class Killed(BaseException):
    """Stands for a SIGKILL."""


@pytest.mark.parametrize("statistics", ["dense", "sequential"])
@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_run_goes_on_with_the_same_bits(
    stream: bool,
    stop_after: int,
    statistics: str,
    make_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, batches, method = make_folder(), batches_for("llama"), MoDeGPT(sparsity=0.3, statistics=statistics)

    def run(out: str) -> bh.Report:
        model, tokenizer = bh.load(folder, stream=stream)
        return bh.prune(model, method, batches, out=tmp_path / out, tokenizer=tokenizer or tiny_tokenizer())

    run("whole")
    commit, blocks = Journal.commit, 0

    def stopping(self: Journal, *args: Any, **kwargs: Any) -> None:
        nonlocal blocks
        if blocks == stop_after:
            raise Killed
        blocks += 1
        commit(self, *args, **kwargs)

    monkeypatch.setattr(Journal, "commit", stopping)
    with pytest.raises(Killed):
        run("out")
    monkeypatch.setattr(Journal, "commit", commit)
    assert run("out").resumed == (stop_after > 0)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_hidden_states_on_disk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    want = weights_of(pruned("llama", sparsity=0.3))
    monkeypatch.setattr(Walk, "_must_spill", lambda self: True)
    got = weights_of(pruned("llama", sparsity=0.3))
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_low_precision_models(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    reshape(model)
    bh.prune(model, MoDeGPT(sparsity=0.25), batches_for(family))
    out = logits(model, batches_for(family)[0])
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    assert math.isfinite(float(out.float().norm()))


@pytest.mark.parametrize(("modules", "sparsity"), [("vo", 0.17), ("mlp", 0.5)])
def test_redundancy_stays_within_what_may_leave(modules: str, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.methods.structured.block_influence", lambda walk: [0.9, 0.5, 0.01])
    method = bh.method("modegpt", sparsity=sparsity, modules=modules, sharing="redundancy")
    bh.prune(build("llama"), method, batches_for("llama"))
