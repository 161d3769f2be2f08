"""What each method does, on one tiny model."""

from __future__ import annotations

import pytest
import torch

import billhook as bh
from billhook.anatomy import anatomy_of, sites_of
from billhook.calibrate.gram import Gram, inverse_cholesky
from billhook.sparsity.obs import quadratic_loss, sweep
from tiny import batches_for, build, weights_of


def test_wanda_is_the_formula_on_the_first_block() -> None:
    """A mask computed with nothing of billhook: dense inputs of block 0, |W|·‖X‖, stable sort per row."""
    model, batches = build("llama"), batches_for("llama")
    reference = build("llama")
    inputs: list[torch.Tensor] = []
    q = reference.get_submodule("model.layers.0.self_attn.q_proj")
    handle = q.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    handle.remove()
    x = torch.cat([i.reshape(-1, 32) for i in inputs]).double()
    score = q.weight.double().abs() * x.norm(dim=0)
    expected = torch.ones_like(score, dtype=torch.bool).scatter(1, score.argsort(dim=1, stable=True)[:, :16], False)

    bh.prune(model, bh.Wanda(sparsity=0.5), batches, precision="highest")
    assert torch.equal(model.get_submodule("model.layers.0.self_attn.q_proj").weight != 0, expected)


def test_later_blocks_see_pruned_predecessors() -> None:
    model, batches = build("llama"), batches_for("llama")
    seen: list[torch.Tensor] = []
    for block in bh.walk(model, batches, precision="highest"):
        norms = block.collect(bh.ColumnNorm)
        seen.append(norms[block.sites[0]])
        for site in block.sites:
            site.mask(torch.zeros(site.shape, dtype=torch.bool))  # remove everything
    # with all weights gone a block passes its input on: every block sees the embeddings' norm direction
    first = build("llama")
    dense = [b.collect(bh.ColumnNorm)[b.sites[0]] for b in bh.walk(first, batches, precision="highest")]
    torch.testing.assert_close(seen[0], dense[0])
    assert not torch.allclose(seen[1], dense[1])
    torch.testing.assert_close(seen[1], seen[0])


def test_sparsegpt_beats_wanda_and_magnitude_on_the_layer_problem() -> None:
    model, batches = build("llama"), batches_for("llama", count=8)
    blocks = iter(bh.walk(model, batches, precision="highest"))
    block = next(blocks)
    grams = block.collect(Gram)
    for site in block.sites:
        weight = site.weight.clone()
        gram = grams[site].matrix
        swept, keep = sweep(weight, inverse_cholesky(grams[site].matrix), sparsity=0.5)
        loss = quadratic_loss(weight, swept, gram)
        assert loss < quadratic_loss(weight, weight * keep, gram)
        by_size = bh.Magnitude(sparsity=0.5).density_pattern.keep(weight.abs(), 0.5)
        assert loss < quadratic_loss(weight, weight * by_size, gram)


def test_sites_of_one_input_share_one_gram() -> None:
    blocks = iter(bh.walk(build("llama"), batches_for("llama")))
    block = next(blocks)
    grams = block.collect(Gram)
    by_name = {site.projection: grams[site] for site in block.sites}
    assert by_name["self_attn.q_proj"] is by_name["self_attn.k_proj"] is by_name["self_attn.v_proj"]
    assert by_name["mlp.gate_proj"] is by_name["mlp.up_proj"]
    assert len({id(g) for g in by_name.values()}) == 4


def test_global_magnitude_is_one_ranking() -> None:
    model = build("llama")
    weights = torch.cat([s.weight.abs().flatten() for b in sites_of(model, anatomy_of(model)) for s in b])
    threshold = weights.sort().values[int(0.6 * len(weights)) - 1]
    bh.prune(model, bh.Magnitude(sparsity=0.6, scope="global"))
    kept = [s.weight[s.weight != 0].abs().min() for b in sites_of(model, anatomy_of(model)) for s in b]
    assert min(kept) > threshold


def test_true_sequential_differs_and_keeps_the_budget() -> None:
    one, two = build("llama"), build("llama")
    batches = batches_for("llama")
    bh.prune(one, bh.SparseGPT(sparsity=0.5, true_sequential=False), batches)
    bh.prune(two, bh.SparseGPT(sparsity=0.5), batches)
    a, b = weights_of(one), weights_of(two)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(a[first], b[first])  # the first group sees the same inputs
    assert not torch.equal(a["model.layers.0.mlp.down_proj.weight"], b["model.layers.0.mlp.down_proj.weight"])


def test_steps_compose() -> None:
    model, batches = build("llama"), batches_for("llama")
    report = bh.prune(model, [bh.Wanda(sparsity=0.3), bh.SparseGPT(sparsity=0.6)], batches)
    assert [step.method for step in report.steps] == ["wanda", "sparsegpt"]
    assert report.steps[0].sparsity == pytest.approx(0.3, abs=0.02)
    assert report.steps[1].sparsity == pytest.approx(0.6, abs=0.001)


def test_a_module_that_is_not_from_transformers() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = torch.nn.Linear(6, 16)
            self.layers = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)) for _ in range(3)
            )
            self.out = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.out(x)

    batches = [torch.randn(20, 6) for _ in range(3)]
    anatomy = bh.Anatomy(family="net", blocks="layers", input=None)
    for method in (bh.Magnitude(), bh.Wanda(), bh.RIA(), bh.SparseGPT(), bh.Wanda(pattern="2:4")):
        net = Net()
        report = bh.prune(net, method, batches, anatomy=anatomy)
        assert report.steps[0].sparsity == pytest.approx(0.5)
        assert (net.layers[1][0].weight == 0).float().mean() == 0.5
        assert not (net.out.weight == 0).any()
    with pytest.raises(bh.BillhookError, match=r"has no config.model_type"):
        bh.prune(Net(), bh.Magnitude(), batches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": "much"}, "sparsity='much'"),
        ({"sparsty": 0.5}, "did you mean 'sparsity'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "not reachable under pattern 2:4"),
        ({"pattern": "3to4"}, "Pattern '3to4' is not known"),
        ({"pattern": "4:2"}, "1 <= N <= M"),
        ({"scope": "collumn"}, "scope='collumn'"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, object], words: str) -> None:
    with pytest.raises(bh.BillhookError) as error:
        bh.Wanda(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_method_and_allocation_name_the_nearest() -> None:
    with pytest.raises(bh.BillhookError, match="did you mean 'wanda'"):
        bh.method("wnada")
    with pytest.raises(bh.BillhookError, match="did you mean 'uniform'"):
        bh.prune(build("llama"), bh.Wanda(allocation="unifrom"), batches_for("llama"))


def test_m_that_does_not_divide_a_width_names_the_site() -> None:
    with pytest.raises(bh.BillhookError, match=r"2:5 does not divide the 32 inputs of model.layers.0.self_attn.q_proj"):
        bh.prune(build("llama"), bh.Wanda(pattern="2:5"), batches_for("llama"))


def test_zeros_are_positive() -> None:
    model = build("llama")
    bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama"))
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert not torch.signbit(weight[weight == 0]).any()


def test_dead_inputs_and_zero_activations_do_not_crash() -> None:
    for name in ("wanda", "ria", "sparsegpt"):
        model = build("llama")
        with torch.no_grad():
            for layer in range(3):
                model.get_submodule(f"model.layers.{layer}.input_layernorm").weight.zero_()
                model.get_submodule(f"model.layers.{layer}.mlp.up_proj").weight[:20] = 0
        report = bh.prune(model, bh.method(name, sparsity=0.5), batches_for("llama"))
        assert report.steps[0].sparsity == pytest.approx(0.5, abs=0.05)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_non_finite_activations_name_block_and_site() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(3e38)
    with pytest.raises(bh.BillhookError, match=r"model.layers.1.mlp.down_proj \(block 1\) is not finite"):
        bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama"))


def test_collecting_outside_the_loop_is_refused() -> None:
    blocks = list(bh.walk(build("llama"), batches_for("llama")))
    with pytest.raises(bh.BillhookError, match="not at block 0 any more"):
        blocks[0].collect(Gram)


def test_auto_precision_rounds_nothing_where_a_choice_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    """N:M leaves near-ties that rounding turns: float32 there, but not where an update repairs the choice."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)

    def used(method: bh.Method, precision: str = "auto") -> str:
        return bh.prune(build("llama"), method, batches_for("llama"), precision=precision).steps[0].precision

    assert used(bh.Wanda(pattern="2:4")) == "highest"
    assert used(bh.Wanda(pattern="2:4"), "bf16") == "bf16"
    assert used(bh.Wanda(sparsity=0.5)) == "bf16"
    assert used(bh.SparseGPT(pattern="2:4")) == "bf16"
    assert (
        bh.prune(build("llama"), [bh.Wanda(), bh.Wanda(pattern="2:4")], batches_for("llama")).precision
        == "bf16/highest"
    )
