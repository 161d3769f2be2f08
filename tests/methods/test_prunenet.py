"""PruneNet: what the policy finds, which neurons leave and how many, and what a stopped run goes on with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.journal import Journal
from billhook.calibrate.walk import Walk
from billhook.measure.flops import PlannedFlops
from billhook.methods.prunenet import PruneNet
from billhook.run import reshape
from billhook.sparsity.spectrum import kolmogorov_smirnov, singular_values, wasserstein
from billhook.surgery.shrink import drop_attention_, drop_mlp_, keep_blocks_
from billhook.surgery.slim import is_slim, slim_
from tiny import FAMILIES, batches_for, build, weights_of

MakeFolder = Callable[..., Path]
QUICK: dict[str, Any] = {"episodes": 4, "every": 1}


def blocks_of(model: nn.Module) -> list[Any]:
    return find_blocks(model, anatomy_of(model))


def slim_model(family: str = "llama", double: bool = False) -> Any:
    model = build(family)
    slim_(model)
    return model.double() if double else model


def run(model: Any, **options: Any) -> Walk:
    """Prune without turning stock again, so that blocks have one set of names; without any data."""
    method = bh.PruneNet(**{**QUICK, **options})
    walk = Walk(model, [], needs="nothing")
    method.check(walk)
    method.prune(walk)
    return walk


def first(block: Any) -> Tensor:
    """The matrix that is scored: gate where there is one."""
    weight: Tensor = (block.mlp.gate_proj if hasattr(block.mlp, "gate_proj") else block.mlp.up_proj).weight
    return weight.detach()


def kept(model: Any, whole: Any) -> list[list[int]]:
    """Which neurons stayed, found by their rows."""
    return [
        [int((first(old) == row).all(1).nonzero()[0, 0]) for row in first(new)]
        for new, old in zip(blocks_of(model), blocks_of(whole), strict=True)
    ]


def mean_ks(model: Any, whole: Any) -> float:
    pairs = zip(blocks_of(model), blocks_of(whole), strict=True)
    values = [
        kolmogorov_smirnov(*(torch.linalg.svdvals(first(block).double()) for block in (new, old))) for new, old in pairs
    ]
    return sum(values) / len(values)


def planted(seed: int = 0) -> Any:
    """Half of the gate rows hold nearly all of the spectrum, and lie to one side of a direction."""
    model = slim_model()
    source = torch.Generator().manual_seed(seed)
    side = torch.nn.functional.normalize(torch.randn(32, generator=source), dim=0)
    for block in blocks_of(model):
        strong = torch.randperm(48, generator=source)[:24]
        with torch.no_grad():
            block.mlp.gate_proj.weight.mul_(0.02)
            block.mlp.gate_proj.weight[strong] *= 50
            block.mlp.gate_proj.weight[strong] += 0.5 * side
    return model


# -- nothing asked, nothing done -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"target_size": 1.0}, {"sparsity": 0.0, "learn_at": 0.3}])
def test_no_sparsity_leaves_every_bit(family: str, options: dict[str, Any]) -> None:
    model = build(family)
    before, kind = weights_of(model), type(model)
    bh.prune(model, bh.PruneNet(**options))
    assert type(model) is kind
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- what leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "phi", "gemma2", "vit"])
@pytest.mark.parametrize("score", ["policy", "norm", "random"])
def test_removing_neurons_is_zeroing_the_columns_that_read_them(family: str, score: str) -> None:
    model = slim_model(family)
    whole = copy.deepcopy(model)
    run(model, sparsity=0.2, score=score)
    zeroed = copy.deepcopy(whole)
    for block, old, keep in zip(blocks_of(model), blocks_of(zeroed), kept(model, whole), strict=True):
        assert len(keep) < old.mlp.down_proj.in_features
        assert keep == sorted(set(keep))
        gone = [i for i in range(old.mlp.down_proj.in_features) if i not in keep]
        with torch.no_grad():
            old.mlp.down_proj.weight[:, gone] = 0
        for name, parameter in block.named_parameters():
            if "mlp" not in name or name == "mlp.down_proj.bias":
                assert torch.equal(parameter, old.get_parameter(name))
    x = batches_for(family)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, zeroed(x).logits, rtol=1e-5, atol=1e-5)


def test_neurons_of_a_gated_mlp_leave_with_their_biases() -> None:
    """No tiny family has biases in a gated MLP."""
    torch.manual_seed(0)
    _, _, options = FAMILIES["llama"]
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, mlp_bias=True)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    slim_(model)
    whole = copy.deepcopy(model)
    run(model, sparsity=0.2, score="norm")
    zeroed = copy.deepcopy(whole)
    for block, old, keep in zip(blocks_of(model), blocks_of(zeroed), kept(model, whole), strict=True):
        assert len(keep) < 48
        gone = [i for i in range(48) if i not in keep]
        old.mlp.down_proj.weight.data[:, gone] = 0
        assert torch.equal(block.mlp.gate_proj.bias, old.mlp.gate_proj.bias[keep])
        assert torch.equal(block.mlp.up_proj.bias, old.mlp.up_proj.bias[keep])
        assert torch.equal(block.mlp.down_proj.bias, old.mlp.down_proj.bias)
    x = batches_for("llama")[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, zeroed(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_neurons_leave_by_the_direction_that_was_learnt(family: str) -> None:
    model = slim_model(family, double=True)
    whole = copy.deepcopy(model)
    found: list[dict[str, float]] = []

    class Watched(PruneNet):
        def learn(self, walk: Walk, counts: dict[int, int]) -> dict[str, float]:
            found.append(super().learn(walk, counts))
            assert counts == {0: 30, 2: 30}
            return dict(found[0])

    method = Watched(episodes=4, every=2, learn_at=18 / 48, sparsity=0.2)
    method.prune(Walk(model, [], needs="nothing"))
    assert len(found) == 1
    values = dict(found[0])
    random, learnt = values.pop("random"), values.pop("policy")
    assert 0 < learnt < 1
    assert 0 < random < 1
    direction = torch.tensor([values[str(i)] for i in range(33)], dtype=torch.float64)
    assert direction.any()
    for old, keep in zip(blocks_of(whole), kept(model, whole), strict=True):
        rows = first(old)
        norms = rows.norm(dim=1)
        scores = 5 * rows / norms.mean() @ direction[:32] + direction[32] * (norms - norms.mean()) / norms.std(
            unbiased=False
        )
        assert keep == scores.argsort(descending=True)[: len(keep)].sort().values.tolist()


@pytest.mark.parametrize(("policy", "reward"), [("linear", "ks"), ("linear", "wasserstein"), ("official", "ks")])
def test_the_policy_finds_the_rows_that_hold_the_spectrum(policy: str, reward: str) -> None:
    """Half of the neurons are nothing to the spectrum: on all blocks, learnt on the first only."""
    whole = planted()
    model, random = copy.deepcopy(whole), []
    options = {"policy": policy, "reward": reward, "every": 3, "episodes": 60, "selections": 4}
    options["lr"] = 0.01 if policy == "official" else None
    sparsity = 0.4 * 3 * 48 * 32 / sum(p.numel() for p in blocks_of(whole)[0].parameters())
    walk = run(model, sparsity=sparsity, **options)
    for seed in range(5):
        other = copy.deepcopy(whole)
        run(other, sparsity=sparsity, score="random", draw=seed)
        random.append(mean_ks(other, whole))
    assert mean_ks(model, whole) < 0.6 * sum(random) / 5
    assert len(walk.notes) == 1


def test_the_note_tells_what_was_measured() -> None:
    model = slim_model()
    whole = copy.deepcopy(model)
    walk = run(model, sparsity=0.2)
    assert f"{mean_ks(model, whole):.3f} with the policy's neurons" in walk.notes[0]
    assert "over 3 blocks" in walk.notes[0]
    model = copy.deepcopy(whole)
    walk = run(model, sparsity=0.2, reward="wasserstein")
    pairs = zip(blocks_of(model), blocks_of(whole), strict=True)
    spectra = [[torch.linalg.svdvals(first(block).double()) for block in pair] for pair in pairs]
    mean = sum(wasserstein(new, old) / float(old.mean()) for new, old in spectra) / 3
    assert f"{mean:.3f} with the policy's neurons" in walk.notes[0]
    assert not run(copy.deepcopy(whole), sparsity=0.2, score="norm").notes


@pytest.mark.parametrize("policy", ["linear", "official"])
def test_the_result_is_the_same_whatever_torch_was_seeded_with(policy: str) -> None:
    whole, results = slim_model(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = copy.deepcopy(whole)
        run(model, sparsity=0.2, policy=policy)
        results.append(kept(model, whole))
    assert results[0] == results[1]


@pytest.mark.parametrize("score", ["policy", "norm", "random"])
def test_a_higher_sparsity_removes_the_same_and_more(score: str) -> None:
    whole, results = slim_model(), []
    for sparsity in (0.1, 0.2, 0.4):
        model = copy.deepcopy(whole)
        run(model, sparsity=sparsity, learn_at=0.3, score=score)
        results.append(kept(model, whole))
    for more, less in itertools.pairwise(results):
        for a, b in zip(more, less, strict=True):
            assert set(b) < set(a)


def test_controls() -> None:
    whole = slim_model()
    model = copy.deepcopy(whole)
    run(model, sparsity=0.2, score="norm")
    for keep, old in zip(kept(model, whole), blocks_of(whole), strict=True):
        assert keep == first(old).norm(dim=1).argsort(descending=True)[: len(keep)].sort().values.tolist()
    model = copy.deepcopy(whole)
    run(model, sparsity=0.2, score="norm", matrix="gate+up")
    for keep, old in zip(kept(model, whole), blocks_of(whole), strict=True):
        both = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight], dim=1).norm(dim=1)
        assert keep == both.argsort(descending=True)[: len(keep)].sort().values.tolist()
    drawn = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(whole)
        run(model, sparsity=0.2, score="random", draw=seed)
        drawn.append(kept(model, whole))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "options", [{"norm_feature": False}, {"matrix": "gate+up"}, {"draw": 1}, {"policy": "official"}]
)
def test_options_change_what_is_learnt(options: dict[str, Any]) -> None:
    whole = slim_model()
    one, other = copy.deepcopy(whole), copy.deepcopy(whole)
    run(one, sparsity=0.3, episodes=8)
    run(other, sparsity=0.3, episodes=8, **options)
    assert kept(one, whole) != kept(other, whole)


def test_gamma_weighs_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plain gradient step on a loss that is the first row's logit: v = −mean of γ^l · that row's features."""
    model = slim_model(double=True)
    distances = iter([0.5] * 6 + [0.4] * 3 + [0.1] * 3)  # random draws, the start, then after the step
    monkeypatch.setattr("billhook.methods.prunenet.kolmogorov_smirnov", lambda a, b: next(distances))
    monkeypatch.setattr("billhook.methods.prunenet.reinforce", lambda logits, *rest: logits[0])
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr: torch.optim.SGD(parameters, lr=1.0))
    method = bh.PruneNet(episodes=1, every=1, gamma=0.5, norm_feature=False)
    found = method.learn(Walk(model, [], needs="nothing"), dict.fromkeys(range(3), 30))
    assert found.pop("random") == pytest.approx(0.5)
    assert found.pop("policy") == pytest.approx(0.1)
    rows = [first(block)[0] * 5 / first(block).norm(dim=1).mean() for block in blocks_of(model)]
    want = -(rows[0] + rows[1] / 2 + rows[2] / 4) / 3
    torch.testing.assert_close(torch.tensor([found[str(i)] for i in range(32)], dtype=torch.float64), want)


# -- how much --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.1, 0.3])
def test_every_block_loses_its_share_and_the_model_stays_stock(family: str, sparsity: float) -> None:
    model = build(family)
    kind, parameters = type(model), [sum(p.numel() for p in b.parameters()) for b in blocks_of(model)]
    bh.prune(model, bh.PruneNet(sparsity=sparsity, **QUICK))  # no data
    assert type(model) is kind
    assert not is_slim(model)
    for block, size in zip(blocks_of(model), parameters, strict=True):
        left = sum(p.numel() for p in block.parameters())
        assert size - left == pytest.approx(sparsity * size, abs=3 * 32 + 2)  # within a neuron


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_share_of_neurons_is_what_the_description_says(family: str) -> None:
    model = slim_model(family)
    block = blocks_of(model)[0]
    total, mlp, size = (sum(p.numel() for p in m.parameters()) for m in (block, block.mlp, block.mlp.down_proj))
    size = block.mlp.down_proj.in_features
    run(model, sparsity=0.2)
    assert 1 - blocks_of(model)[0].mlp.down_proj.in_features / size == pytest.approx(0.2 * total / mlp, abs=1 / size)


def test_widths_are_multiples_and_the_target_is_met() -> None:
    model = slim_model()
    run(model, sparsity=0.25, round=16)
    assert {block.mlp.down_proj.in_features for block in blocks_of(model)} == {32}
    whole = build("llama")
    size = sum(p.numel() for p in whole.parameters())
    bh.prune(whole, bh.PruneNet(target_size=0.8, **QUICK))
    assert sum(p.numel() for p in whole.parameters()) == pytest.approx(0.8 * size, abs=0.01 * size)


def test_a_target_of_flops_is_met() -> None:
    model = build("llama")
    before = PlannedFlops(slim_model()).now.total
    bh.prune(model, bh.PruneNet(target_flops=0.8, **QUICK))
    slim_(model)
    assert PlannedFlops(model).now.total == pytest.approx(0.8 * before, rel=0.01)


def test_sharing_by_influence_reads_data() -> None:
    method = bh.PruneNet(sparsity=0.3, sharing="influence", **QUICK)
    assert method.requires == "calibration"
    assert bh.PruneNet().requires == "nothing"
    model = build("llama")
    bh.prune(model, method, batches_for("llama"))
    assert is_slim(model)
    assert len({block.mlp.down_proj.in_features for block in blocks_of(model)}) > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 0.65}, "65% of a block cannot be removed when its MLP neurons, which alone leave, are 60% of it"),
        ({"sparsity": 0.598}, "cannot be removed"),
        ({"target_size": 0.05}, "cannot be reached"),
        ({"sparsity": 0.3, "selections": 1}, "selections=1 is not possible"),
        ({"sparsity": 0.3, "score": "best"}, "score='best' is not possible"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*args: Any) -> Any:
        raise AssertionError("a policy was learnt")

    monkeypatch.setattr(PruneNet, "learn", worked)
    model = build("llama")
    with pytest.raises(bh.BillhookError, match=match):
        bh.prune(model, bh.method("prunenet", **options))


def test_one_policy_needs_one_width() -> None:
    model = slim_model()
    block = blocks_of(model)[1]
    for name in ("gate_proj", "up_proj"):
        setattr(block.mlp, name, nn.Linear(30, 48, bias=False))
    with pytest.raises(bh.BillhookError, match="their MLPs read 30 to 32 channels"):
        bh.PruneNet(sparsity=0.1).check(Walk(model, [], needs="nothing"))
    bh.PruneNet(sparsity=0.1, score="norm").check(Walk(model, [], needs="nothing"))


def test_emptied_blocks_are_passed_over_and_a_missing_mlp_is_refused() -> None:
    model = slim_model()
    blocks = blocks_of(model)
    drop_attention_(blocks[0])
    drop_mlp_(blocks[0])
    reshape(model)
    run(model, sparsity=0.2)
    assert all(block.mlp.down_proj.in_features < 48 for block in blocks[1:])
    drop_mlp_(blocks[1])
    with pytest.raises(bh.BillhookError, match="are 0% of it"):
        run(model, sparsity=0.1)


# -- with data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_refit_is_the_least_squares_fit_on_what_stays(family: str) -> None:
    model = slim_model(family, double=True)
    whole, batches = copy.deepcopy(model), batches_for(family, count=4)
    method = bh.PruneNet(sparsity=0.2, restore=True, damping=0.0, **QUICK)
    assert method.requires == "calibration"
    method.prune(Walk(model, batches, precision="highest"))
    seen: list[Tensor] = []
    old, new = (blocks_of(m)[0].mlp.down_proj for m in (whole, model))
    handle = old.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            whole(batch)
    handle.remove()
    x, keep = torch.cat(seen), kept(model, whole)[0]
    target = x @ old.weight.T
    fitted = torch.linalg.lstsq(x[:, keep], target).solution
    torch.testing.assert_close(x[:, keep] @ new.weight.T, x[:, keep] @ fitted, rtol=1e-4, atol=1e-4)
    assert (target - x[:, keep] @ new.weight.T).norm() < (target - x[:, keep] @ old.weight[:, keep].T).norm()


# -- files -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("policy", ["linear", "official"])
def test_a_stopped_streaming_run_goes_on_with_the_policy_that_it_learnt(
    policy: str, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, method = make_folder("llama"), bh.PruneNet(sparsity=0.3, policy=policy, **QUICK)
    resident, _ = bh.load(folder)
    bh.prune(resident, method)
    whole = bh.prune(bh.load(folder, stream=True)[0], method, out=tmp_path / "whole")
    again, _ = bh.load(tmp_path / "whole")
    want = weights_of(resident)
    assert weights_of(again).keys() == want.keys()
    assert all(torch.equal(p, want[name]) for name, p in weights_of(again).items())
    commit, done = Journal.commit, itertools.count()

    def dying(self: Journal, *args: Any, **kwargs: Any) -> Any:
        if next(done) == 1:
            raise Killed
        return commit(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", dying)
        with pytest.raises(Killed):
            bh.prune(bh.load(folder, stream=True)[0], method, out=tmp_path / "out")

    def learnt_again(*args: Any) -> Any:
        raise AssertionError("the policy was learnt again")

    monkeypatch.setattr(PruneNet, "learn", learnt_again)
    report = bh.prune(bh.load(folder, stream=True)[0], method, out=tmp_path / "out")
    assert report.resumed
    assert report.steps[0].notes == whole.steps[0].notes
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_blocks_that_are_looked_at_are_read() -> None:
    model, loaded = slim_model(), []
    walk = Walk(model, [], needs="nothing")
    load = walk.source.load
    walk.source.load = lambda module, name, device: (loaded.append(name), load(module, name, device))  # type: ignore[method-assign, func-returns-value]
    bh.PruneNet(episodes=1, every=2).learn(walk, {0: 30, 2: 30})
    assert set(loaded) == {walk.names[0], walk.names[2]}
    assert len(loaded) == 6  # once for the spectra, then once per episode and once to judge the last


# -- the real model --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spectra_of_the_demo_model() -> None:
    """At 30% of the neurons, all blocks: random rows, those of largest norm, those of smallest."""
    model, _ = bh.load("demo")
    found: dict[str, list[float]] = {"random": [], "largest": [], "smallest": []}
    for index, block in enumerate(blocks_of(model)):
        rows = block.mlp.gate_proj.weight.detach().double()
        count = int(0.7 * len(rows))
        order = rows.norm(dim=1).argsort(descending=True)
        draw = torch.randperm(len(rows), generator=torch.Generator().manual_seed(index))[:count]
        full = singular_values(rows)
        for name, keep in (("random", draw), ("largest", order[:count]), ("smallest", order[-count:])):
            found[name].append(kolmogorov_smirnov(full, singular_values(rows[keep])))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert means["random"] == pytest.approx(0.168, abs=0.004)
    assert means["largest"] == pytest.approx(0.133, abs=0.002)
    assert means["smallest"] == pytest.approx(0.221, abs=0.002)


@pytest.mark.slow
def test_the_policy_is_nearer_than_random_at_ratios_it_did_not_learn_at() -> None:
    """The method's own objective, on every sixth block of the demo model: 5% below the mean of five random draws."""
    whole, _ = bh.load("demo")
    reshape(whole)
    keep_blocks_(whole, list(range(0, 30, 6)))
    block = blocks_of(whole)[0]
    neurons = sum(p.numel() for p in block.mlp.parameters()) / sum(p.numel() for p in block.parameters())
    learnt: list[dict[str, float]] = []

    class Once(PruneNet):
        def learn(self, walk: Walk, counts: dict[int, int]) -> dict[str, float]:
            learnt.extend([] if learnt else [super().learn(walk, counts)])
            return dict(learnt[0])

    for share in (0.1, 0.2, 0.3):
        policy = Once(sparsity=share * neurons, learn_at=0.3, episodes=20, every=2)
        controls = [bh.PruneNet(sparsity=share * neurons, score="random", draw=seed) for seed in range(5)]
        means = []
        for method in (policy, *controls):
            model = copy.deepcopy(whole)
            method.prune(Walk(model, [], needs="nothing"))
            means.append(mean_ks(model, whole))
        assert means[0] < 0.95 * sum(means[1:]) / 5
