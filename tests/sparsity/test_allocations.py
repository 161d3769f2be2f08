"""Allocations: exact budgets, and scores against what they estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import billhook as bh
from billhook.calibrate.sensitivity import FirstOrder, GroupBy, Tail, first_order, shortened, task_loss, zeroth_order
from billhook.calibrate.walk import Walk
from billhook.run import Options, run_steps
from billhook.sparsity import allocations, ecoflap
from billhook.sparsity.allocations import ALLOCATIONS, proportional_keep
from billhook.sparsity.select import budget
from tiny import batches_for, build, site_weights, weights_of


def test_the_sheet_s_example() -> None:
    sizes = dict(enumerate((1000, 2000, 4000, 1000, 2000)))
    scores = dict(enumerate((0.1, 0.5, 0.2, 3.0, 0.05)))
    keep = proportional_keep({str(k): v for k, v in scores.items()}, {str(k): v for k, v in sizes.items()}, 0.5, 0.6)
    assert sum(keep.values()) == 5000
    assert keep["3"] == 1000
    for got, expected in zip(keep.values(), (448, 1036, 1692, 1000, 824), strict=True):
        assert abs(got - expected) <= 3


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_budget_is_exact_and_the_cap_holds(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 12))
    sizes = {str(g): data.draw(st.integers(1, 5000)) for g in range(groups)}
    scores = {
        str(g): 10.0 ** data.draw(st.floats(-3, 3)) * data.draw(st.sampled_from([0, 1, 1, 1])) for g in range(groups)
    }
    sparsity = data.draw(st.floats(0, 0.9))
    cap = min(sparsity + data.draw(st.floats(0, 0.3)), 0.999)
    keep = proportional_keep(scores, sizes, sparsity, cap)
    total = sum(sizes.values())
    assert sum(keep.values()) == total - budget(total, sparsity)
    for g, size in sizes.items():
        assert 0 <= keep[g] <= size
        assert size - keep[g] <= size * cap + 1  # the last weight may be the rounding's
    scaled = proportional_keep({g: 1000 * s for g, s in scores.items()}, sizes, sparsity, cap)
    assert all(abs(scaled[g] - keep[g]) <= 1 for g in sizes)


def test_raising_a_score_never_prunes_its_group_more() -> None:
    sizes = {"a": 1000, "b": 700, "c": 4000}
    previous = 0
    for score in (0.0, 0.1, 1.0, 3.0, 10.0, 1e6):
        keep = proportional_keep({"a": score, "b": 1.0, "c": 2.0}, sizes, 0.6, 0.7)["a"]
        assert keep >= previous
        previous = keep
    assert previous == 870  # its minimum of 300, and all 570 that the cap leaves to be given


def test_equal_scores_or_no_slack_mean_uniform() -> None:
    sizes = {str(g): 1000 for g in range(5)}
    assert set(proportional_keep(dict.fromkeys(sizes, 2.0), sizes, 0.5, 0.6).values()) == {500}
    assert set(proportional_keep({g: float(g) for g in sizes}, sizes, 0.5, 0.5).values()) == {500}


def test_unsaturated_case_is_the_closed_form() -> None:
    sizes = dict.fromkeys("abcd", 10_000)
    scores = {"a": 1.0, "b": 1.2, "c": 0.9, "d": 0.7}
    keep = proportional_keep(scores, sizes, 0.5, 0.6)
    total = sum(scores.values())
    for g, score in scores.items():
        assert 1 - keep[g] / 10_000 == pytest.approx(0.6 - 0.1 * 4 * score / total, abs=2e-4)


def test_closed_form_holds_for_unequal_sizes_to_a_weight() -> None:
    sizes = {"a": 1000, "b": 7000, "c": 2500, "d": 400}
    scores = {"a": 1.0, "b": 4.3, "c": 2.7, "d": 0.6}
    keep = proportional_keep(scores, sizes, 0.5, 0.6)
    total, size = sum(scores.values()), sum(sizes.values())
    for g, score in scores.items():
        assert keep[g] < sizes[g]
        assert abs(sizes[g] - keep[g] - (0.6 * sizes[g] - 0.1 * score / total * size)) <= 1


def random_groups(seed: int) -> tuple[dict[str, float], dict[str, int], float, float]:
    """Scores over six decades, unequal sizes, a sparsity and a cap above it."""
    generator = torch.Generator().manual_seed(seed)
    names = "abcdefgh"
    scores = (10 ** (6 * torch.rand(8, generator=generator, dtype=torch.float64) - 3)).tolist()
    sizes = torch.randint(50, 5000, (8,), generator=generator).tolist()
    sparsity, slack = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    sparsity *= 0.85
    return dict(zip(names, scores, strict=True)), dict(zip(names, sizes, strict=True)), sparsity, sparsity + 0.1 * slack


def test_without_slack_every_group_gets_the_target_to_a_weight() -> None:
    for seed in range(20):
        scores, sizes, sparsity, _ = random_groups(seed)
        keep = proportional_keep(scores, sizes, sparsity, sparsity)
        assert all(abs(sizes[g] - keep[g] - sizes[g] * sparsity) <= 1 for g in sizes)


def test_order_of_groups_does_not_matter_and_the_cap_holds_to_the_weight() -> None:
    full = 0
    for seed in range(20):
        scores, sizes, sparsity, cap = random_groups(seed)
        keep = proportional_keep(scores, sizes, sparsity, cap)
        assert keep == proportional_keep(dict(reversed(scores.items())), dict(reversed(sizes.items())), sparsity, cap)
        total = sum(sizes.values())
        assert sum(keep.values()) == total - budget(total, sparsity)
        if sum(size - budget(size, cap) for size in sizes.values()) <= sum(keep.values()):  # the minima fit
            assert all(sizes[g] - keep[g] <= budget(sizes[g], cap) for g in sizes)
        full += any(keep[g] == sizes[g] for g in sizes)
    assert full > 0  # some groups were saturated


def walk_of(family: str = "llama", count: int = 4) -> Walk:
    return Walk(build(family), batches_for(family, count=count), precision="highest")


def test_tail_gives_the_model_s_own_loss_from_every_block() -> None:
    walk = walk_of()
    batches = shortened(walk.batches, 3, 12, 2)
    with walk.whole() as model:
        expected = [float(task_loss(model(input_ids=b), b)) for b in batches]
        tail = Tail(walk, batches)
        for _ in walk.blocks:
            assert [tail.loss(b) for b in range(len(batches))] == pytest.approx(expected, abs=1e-5)
            tail.advance()


class Stack(torch.nn.Module):
    """Blocks of two small matrices each: something to perturb, under losses that are made up."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 3, bias=False))
            for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(blocks: int, batches: int = 1) -> Walk:
    """A walk over a `Stack` with weights that are multiples of 1/8."""
    model, generator = Stack(blocks), torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=generator) / 8
    anatomy = bh.Anatomy(family="stack", blocks="layers", input=None)
    return Walk(model, [torch.ones(1, 3)] * batches, anatomy=anatomy, precision="highest")


Weights = dict[str, torch.Tensor]


def with_loss(monkeypatch: pytest.MonkeyPatch, of: Callable[[Weights], torch.Tensor]) -> list[Weights]:
    """Replace the model's loss by a function of its weights in float64; returns the weights at every call."""
    seen: list[Weights] = []

    def loss(self: Tail, batch: int) -> float:
        seen.append({site.name: site.weight.double() for site in self.walk.all_sites()})
        return float(of(seen[-1]))

    monkeypatch.setattr(Tail, "loss", loss)
    return seen


def directions(walk: Walk, seed: int = 3) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in walk.all_sites()}


@pytest.mark.parametrize("group_by", ["block", "matrix"])
def test_one_draw_under_a_linear_loss_is_the_exact_projection(
    group_by: GroupBy, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = stack(2)
    for site in walk.all_sites():
        site.weight.zero_()  # then W ± εz are exact in float32
    c = directions(walk)
    seen = with_loss(monkeypatch, lambda weights: 5.0 + sum((c[name] * w).sum() for name, w in weights.items()))
    groups = walk.sites if group_by == "block" else [[site] for site in walk.all_sites()]
    results = []
    for eps in (1e-3, 0.5, 30.0):
        seen.clear()
        scores = zeroth_order(walk, walk.batches, group_by=group_by, eps=eps)
        assert len(seen) == 2 * len(groups)
        for group, plus, minus in zip(groups, seen[::2], seen[1::2], strict=True):
            names = {site.name for site in group}
            assert all(torch.equal(plus[name], -minus[name]) for name in plus)
            assert all(bool(w.any()) == (name in names) for name, w in plus.items())  # all else is untouched
            projection = sum((c[name] * plus[name] / eps).sum() for name in names)
            for name in names:
                assert scores[name] == pytest.approx(abs(float(projection)), rel=1e-9)
        results.append(scores)
    assert results[1] == pytest.approx(results[0], rel=1e-5)  # the size of the step does not matter
    assert results[2] == pytest.approx(results[0], rel=1e-5)


def test_even_terms_cancel_under_a_quadratic_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = stack(2)
    c, curvature = directions(walk), directions(walk, seed=4)
    dense = {site.name: site.weight.double() for site in walk.all_sites()}

    def loss(weights: Weights) -> torch.Tensor:
        return sum((c[n] * w + curvature[n] * w.square() / 2).sum() for n, w in weights.items())  # type: ignore[return-value]

    seen = with_loss(monkeypatch, loss)
    scores = zeroth_order(walk, walk.batches, eps=0.5)
    for sites, plus, minus in zip(walk.sites, seen[::2], seen[1::2], strict=True):
        names = [site.name for site in sites]
        z = {n: plus[n] - minus[n] for n in names}  # 2ε = 1
        expected = abs(float(sum((z[n] * (c[n] + curvature[n] * dense[n])).sum() for n in names)))
        assert scores[names[0]] == pytest.approx(expected, rel=1e-5)


def with_gradient(monkeypatch: pytest.MonkeyPatch, c: Weights) -> None:
    """A linear loss with this gradient; blocks that are not perturbed add a constant, which is left out."""

    def loss(self: Tail, batch: int) -> float:
        return float(sum((c[site.name] * site.weight).sum() for site in self.walk.sites[self.index]))

    monkeypatch.setattr(Tail, "loss", loss)


def test_the_mean_of_many_draws_is_the_norm_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = stack(1)
    c = directions(walk)
    with_gradient(monkeypatch, c)
    score = next(iter(zeroth_order(walk, walk.batches, draws=1500).values())) / 1500
    norm = math.sqrt(sum(float(direction.square().sum()) for direction in c.values()))
    assert score == pytest.approx(math.sqrt(2 / math.pi) * norm, rel=0.04)  # the noise is 2%


def test_scores_of_few_draws_rank_blocks_by_their_gradients_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = stack(15, batches=8)
    c = directions(walk)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    for sites, rank in zip(walk.sites, order.tolist(), strict=True):
        norm = math.sqrt(sum(float(c[site.name].square().sum()) for site in sites))
        for site in sites:
            c[site.name] *= 1.15**rank / norm
    with_gradient(monkeypatch, c)
    scores = zeroth_order(walk, walk.batches, draws=4)
    found = torch.tensor([scores[sites[0].name] for sites in walk.sites]).argsort().argsort()
    spearman = 1 - 6 * int((found - order).square().sum()) / (15 * (15**2 - 1))
    assert spearman >= 0.8
    few = [zeroth_order(walk, walk.batches[:1], seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1]
    assert few[0] != few[2]


@pytest.mark.slow
def test_zeroth_order_estimates_gradient_norms() -> None:
    """E|⟨z, g⟩| = √(2/π)·‖g‖ for every matrix, within the noise of 400 draws."""
    walk = walk_of(count=1)
    batches = shortened(walk.batches, 2, 12, 2)
    norms = {}
    model = walk.model
    task_loss(model(input_ids=batches[0]), batches[0]).backward()
    for site in walk.all_sites():
        norms[site.name] = float(site.module.weight.grad.norm())
    model.zero_grad()
    scores = zeroth_order(walk, batches, group_by="matrix", draws=400)
    for name, norm in norms.items():
        assert scores[name] / 400 == pytest.approx(math.sqrt(2 / math.pi) * norm, rel=0.2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeroth_order_leaves_weights_and_random_state(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    walk = Walk(model, batches_for("llama"), precision="highest")
    state = torch.get_rng_state()
    batches = shortened(walk.batches, 2, 8, 1)
    first = zeroth_order(walk, batches)
    assert zeroth_order(walk, batches) == pytest.approx(first, rel=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def failing(self: Tail, batch: int) -> float:
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())  # perturbed at that time
        raise RuntimeError("enough")

    monkeypatch.setattr(Tail, "loss", failing)
    with pytest.raises(RuntimeError, match="enough"):
        zeroth_order(walk, batches)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_zeroth_order_makes_two_passes_per_group_batch_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = Tail.loss

    def counted(self: Tail, batch: int) -> float:
        nonlocal calls
        calls += 1
        return real(self, batch)

    monkeypatch.setattr(Tail, "loss", counted)
    walk = walk_of()
    batches = shortened(walk.batches, 4, 8, 2)
    zeroth_order(walk, batches, draws=3)
    assert calls == 2 * len(walk.blocks) * len(batches) * 3
    calls = 0
    zeroth_order(walk, batches, group_by="matrix")
    assert calls == 2 * len(walk.all_sites()) * len(batches)


def test_a_block_without_effect_scores_zero_and_is_pruned_most() -> None:
    model = build("llama")
    block = model.get_submodule("model.layers.1")
    # the whole block is invisible where its norms are zero: both branches then add nothing, whatever their weights
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.data.zero_()
    walk = Walk(model, batches_for("llama"), precision="highest")
    shares = ALLOCATIONS.parse("ecoflap").shares(walk, 0.5)
    assert shares["model.layers.1.self_attn.q_proj"] == pytest.approx(0.6, abs=1e-3)
    assert shares["model.layers.0.self_attn.q_proj"] < 0.5


def test_first_order_is_the_gradient_s() -> None:
    walk = walk_of(count=2)
    model, batches = walk.model, walk.batches
    expected = {site.name: 0.0 for site in walk.all_sites()}
    for batch in batches:
        model.zero_grad()
        task_loss(model(input_ids=batch), batch).backward()
        for site in walk.all_sites():
            expected[site.name] += float((site.weight * site.module.weight.grad).abs().sum()) / len(batches)
    model.zero_grad()
    got = first_order(walk, batches, "grad_mag")
    assert got == pytest.approx(expected, rel=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_other_first_order_scores_are_sums_of_gradients_and_of_squared_products() -> None:
    walk = walk_of(count=2)
    expected: dict[FirstOrder, dict[str, float]] = {"grad": {}, "grad_mag_sq": {}}
    for batch in walk.batches:
        task_loss(walk.model(input_ids=batch), batch).backward()
        for site in walk.all_sites():
            gradient, weight = site.module.weight.grad.double(), site.weight.double()
            for score, value in (("grad", gradient.abs()), ("grad_mag_sq", (weight * gradient).square())):
                scores = expected[score]  # type: ignore[index]
                scores[site.name] = scores.get(site.name, 0.0) + float(value.sum()) / 2
        walk.model.zero_grad()
    for score, scores in expected.items():
        assert first_order(walk, walk.batches, score) == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("name", ["owl", "ecoflap", "ecoflap(score=grad_mag)", "ecoflap(group_by=matrix, samples=2)"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_reaches_the_overall_sparsity(name: str, method: str) -> None:
    model = build("llama")
    report = bh.prune(model, bh.method(method, sparsity=0.6, allocation=name, scope="layer"), batches_for("llama"))
    assert report.steps[0].sparsity == pytest.approx(0.6, abs=2e-3)
    shares = {round(site.asked, 6) for site in report.steps[0].sites}
    assert len(shares) > 1
    assert all(0.4 <= share <= 0.7001 or "ecoflap" in name for share in shares)


def test_the_masks_have_the_counts_that_were_allocated() -> None:
    options = {"sparsity": 0.6, "allocation": "ecoflap(score=grad_mag, group_by=matrix)"}
    for scope in ("row", "layer"):
        model = build("llama")
        report = bh.prune(model, bh.Wanda(**options, scope=scope), batches_for("llama"))
        zeros = {name: weight == 0 for name, weight in site_weights(model).items()}
        for site in report.steps[0].sites:
            z = zeros[site.site]
            if scope == "row":
                assert (z.sum(dim=1) == budget(z.shape[1], site.asked)).all()
            else:
                assert int(z.sum()) == budget(z.numel(), site.asked)
        assert len({site.asked for site in report.steps[0].sites}) > 10
    total = sum(z.numel() for z in zeros.values())
    assert sum(int(z.sum()) for z in zeros.values()) == budget(total, 0.6)  # of the whole model, to the weight


def test_owl_follows_the_outliers() -> None:
    """Scores of block 1 made to hold outliers: it is pruned less than block 0, by at most twice the limit."""
    model = build("llama")
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.data
    weight[:, ::7] *= 60
    report = bh.prune(model, bh.Wanda(sparsity=0.6, allocation="owl(limit=0.05)"), batches_for("llama"))
    asked = {site.block: site.asked for site in report.steps[0].sites}
    assert asked[1] < 0.6 < asked[0]
    assert max(asked.values()) - min(asked.values()) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("name", ["owl", "ecoflap", "ecoflap(score=grad)"])
def test_runs_that_share_looks_find_the_same_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sparsities of one comparison; a second step sees another model, and another option is another look."""
    made: list[str] = []
    for owner, function in ((allocations.OWL, "_outliers"), (ecoflap.ECoFLaP, "_scores")):
        inner: Any = getattr(owner, function)

        def counted(self: Any, walk: Walk, inner: Any = inner) -> dict[str, float]:
            made.append("look")
            found: dict[str, float] = inner(self, walk)
            return found

        monkeypatch.setattr(owner, function, counted)
    looks: dict[str, dict[str, float]] = {}
    masks = []
    for options in (Options(looks=looks), Options()):
        for sparsity in (0.5, 0.6):
            model = build("llama")
            run_steps(model, [bh.Wanda(sparsity=sparsity, allocation=name)], batches_for("llama"), None, options)
            masks.append(site_weights(model))
    assert len(made) == 1 + 2
    for shared, alone in zip(masks[:2], masks[2:], strict=True):
        assert all(torch.equal(weight, alone[key]) for key, weight in shared.items())
    steps = [bh.Magnitude(sparsity=0.3), bh.Wanda(sparsity=0.5, allocation=name)]
    run_steps(build("llama"), steps, batches_for("llama"), None, Options(looks=looks))
    other = name.removesuffix(")") + ("," if "(" in name else "(") + ("multiple=3)" if "owl" in name else "samples=1)")
    run_steps(build("llama"), [bh.Wanda(allocation=other)], batches_for("llama"), None, Options(looks=looks))
    assert len(made) == 1 + 2 + 2


def test_uniform_is_the_method_alone() -> None:
    a, b = build("llama"), build("llama")
    bh.prune(a, bh.Wanda(sparsity=0.6), batches_for("llama"))
    bh.prune(b, bh.Wanda(sparsity=0.6, allocation="uniform"), batches_for("llama"))
    assert all(torch.equal(x, y) for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("owll", r"No allocation 'owll' \(did you mean 'owl'\?\)"),
        ("owl(limt=0.1)", r"Allocation owl has no option 'limt' \(did you mean 'limit'\?\)"),
        ("owl(limit=2)", r"Allocation owl: limit=2 is not possible"),
        ("owl(limit)", r"options are written as owl\(key=value, \.\.\.\)"),
        ("uniform(x=1)", r"Allocation uniform has no options"),
        ("owl(limit=[)", r"Allocation owl: limit="),
        ("a b c", r"is not the name of a known allocation"),
    ],
)
def test_bad_allocations_get_a_sentence(text: str, words: str) -> None:
    with pytest.raises(bh.BillhookError, match=words):
        bh.Wanda(allocation=text)


def test_an_allocation_is_written_one_way() -> None:
    from billhook.sparsity.allocations import OWL

    for given_as in ("owl( limit = 0.1 )", {"name": "owl", "limit": 0.1}, OWL(limit=0.1)):
        assert bh.Wanda(allocation=given_as).allocation == "owl(limit=0.1)"
    assert bh.Wanda(allocation="owl(limit=0.08)").allocation == "owl"


def test_density_is_one_minus_sparsity() -> None:
    assert bh.Wanda(density=0.3).overall == 0.7
    with pytest.raises(bh.BillhookError, match="leave one of the two out"):
        bh.Wanda(density=0.3, sparsity=0.6)
