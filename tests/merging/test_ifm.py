"""IFM: exact on duplicates, bounded on the rest, and its stop rule, against brute force."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from billhook.analysis.complexity import feature_complexity
from billhook.errors import BillhookError
from billhook.merging import IFM, MergeReport, merge_features
from billhook.merging.features import Features
from billhook.surgery.batchnorm import fold_norms_, recalibrate_norms
from billhook.surgery.channels import ChannelGroup, channel_groups, keep_channels_
from billhook.surgery.coupling import fetch
from cnns import MLP, NETS, VGG, Gated, build, inputs, random_norms

WIDE = {name: [2 * width for width in net.widths] for name, net in NETS.items()}


def free(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    return [group for group in channel_groups(model, example) if group.fixed is None]


def clusters(size: int) -> list[list[int]]:
    return [[0, 3], [1, 4, 5]] if size >= 6 else [[0, 2]]


def plant_(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Make exact duplicates in every group; returns how many features are left without them."""
    left = {}
    for group in free(model, example):
        for same in clusters(group.size):
            for slot in group.slots:
                tensor = fetch(model, slot.tensor).data
                first = tensor.index_select(slot.axis, slot.index[same[0]])
                if slot.role == "consume":
                    first = first / len(same)
                for channel in same:
                    tensor.index_copy_(slot.axis, slot.index[channel], first)
        left[group.name] = group.size - sum(len(same) - 1 for same in clusters(group.size))
    return left


def widths_of(report: MergeReport) -> dict[str, int]:
    return {name: group.after for name, group in report.groups.items()}


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def one_layer(width: int = 6, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP([width], act).double().eval()


def features_of(model: nn.Module, example: Tensor, **options: Any) -> list[Features]:
    """Features on copies of the model's tensors."""
    groups = free(model, example)
    tensors = {slot.tensor: fetch(model, slot.tensor).data.double().clone() for g in groups for slot in g.slots}
    return [Features(group, tensors, **{"distance": "centroid", **options}) for group in groups]


def written(model: nn.Module, features: list[Features]) -> nn.Module:
    """The model with the features' tensors in full size: those merged away are zeros."""
    model = copy.deepcopy(model)
    for f in features:
        for name, tensor in f._tensors.items():
            fetch(model, name).data.copy_(tensor)
    return model


# 1


@pytest.mark.parametrize("name", NETS)
def test_nothing_is_merged_where_nothing_is_alike(name: str) -> None:
    model, example = build(name), inputs(name)
    state = copy.deepcopy(model.state_dict())
    merged, report = merge_features(model, example=example, beta=0.0)
    assert not any(group.merges for group in report.groups.values())
    torch.testing.assert_close(merged(example), model(example), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# 2


@pytest.mark.parametrize("distance", ["centroid", "ward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NETS)
def test_exactly_the_planted_duplicates_are_merged(name: str, dtype: torch.dtype, distance: str) -> None:
    model, example = build(name, widths=WIDE[name]).to(dtype), inputs(name).to(dtype)
    planted = plant_(model, example)
    merged, report = merge_features(model, example=example, beta=1e-6, distance=distance)
    assert widths_of(report) == planted
    for group in report.groups.values():
        assert [m for m in group.members if len(m) > 1] == clusters(group.before)
    assert error(merged(example), model(example)) < (1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("form", ["mean_sum", "sum_mean"])
@pytest.mark.parametrize("name", ["mlp", "vgg", "basic"])
def test_distances_of_stored_tensors_leave_a_triple_at_two(name: str, form: str) -> None:
    model, example = build(name, widths=WIDE[name]).double(), inputs(name).double()
    planted = plant_(model, example)
    merged, report = merge_features(model, example=example, beta=1e-6, distance="running", form=form)
    triples = {group.name: sum(len(c) == 3 for c in clusters(group.before)) for group in report.groups.values()}
    assert widths_of(report) == {group: left + triples[group] for group, left in planted.items()}
    assert error(merged(example), model(example)) < 1e-10


# 3


@pytest.mark.parametrize(
    ("act", "form", "exact"),
    [
        (nn.ReLU, "mean_sum", True),
        (nn.ReLU, "sum_mean", True),
        (nn.GELU, "mean_sum", True),
        (nn.GELU, "sum_mean", False),
    ],
)
def test_equal_rows_with_unequal_columns(act: type[nn.Module], form: str, exact: bool) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 3, 8, 8).double()
    model = random_norms(VGG([8, 10, 8, 9], act)).double()
    for group in free(model, example):
        for slot in (*group.producers, *group.through):
            tensor = fetch(model, slot.tensor).data
            tensor[slot.index[4]] = tensor[slot.index[1]]
    group_widths = {group.name: group.size - 1 for group in free(model, example)}
    merged, report = merge_features(model, example=example, widths=group_widths, form=form, distance="bound")
    assert all(group.members[1] == [1, 4] for group in report.groups.values())  # the bound sees that these cost nothing
    wrong = error(merged(example), model(example))
    assert wrong < 1e-10 if exact else wrong > 1e-3


# 4


def test_summed_norms_are_wrong_and_folded_ones_are_not() -> None:
    torch.manual_seed(0)
    example = torch.randn(8, 3, 8, 8).double()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)).double()
    random_norms(model)
    recalibrate_norms(model, [example])
    (group,) = free(model, example)
    for slot in (*group.producers, *group.through):
        tensor = fetch(model, slot.tensor).data
        tensor[3] = tensor[0]
    pair = {"0": 3}
    official = {"form": "sum_mean", "bn": "keep", "biases": False, "distance": "running"}
    summed, report = merge_features(model, example=example, widths=pair, **official)
    assert [0, 3] in report.groups["0"].members
    assert error(summed(example), model(example)) > 0.05
    for bn in ("fold", "identity"):
        right, _ = merge_features(model, example=example, widths=pair, form="sum_mean", bn=bn, distance="bound")
        assert error(right(example), model(example)) < 1e-6
        assert sum(isinstance(m, nn.BatchNorm2d) for m in right.modules()) == (bn == "identity")
    kept, _ = merge_features(model, example=example, widths=pair, bn="keep", distance="bound")  # equal, averaged
    assert error(kept(example), model(example)) < 1e-6


def test_equal_rows_with_unequal_norms_are_not_equal() -> None:
    model, example = build("vgg").double(), inputs("vgg").double()
    model[0].weight.data[3] = model[0].weight.data[1]
    model[3].weight.data[:, 3] = model[3].weight.data[:, 1]
    official = {"form": "sum_mean", "bn": "keep", "biases": False, "distance": "running"}
    assert merge_features(model, example=example, beta=1e-6, **official)[1].groups["0"].after == 3
    assert merge_features(model, example=example, beta=1e-6)[1].groups["0"].after == 4
    assert merge_features(model, example=example, beta=1e-6, bn="keep")[1].groups["0"].after == 4


# 5


def brute_force(vectors: list[Tensor]) -> Tensor:
    result = torch.full((len(vectors), len(vectors)), torch.inf, dtype=torch.float64)
    for i, j in itertools.combinations(range(len(vectors)), 2):
        result[i, j] = (vectors[i] - vectors[j]).square().sum()
    return result


def test_distances_are_those_of_the_weights() -> None:
    torch.manual_seed(0)
    model, example = VGG([4, 6, 5, 7], bn=False), inputs("vgg")
    first, second, third, last = features_of(model, example)
    w = {key: value.double() for key, value in model.state_dict().items()}
    places = {first: ("0", "3", 4, 1), second: ("3", "7", 6, 1), third: ("7", "12", 5, 4), last: ("12", "14", 7, 1)}
    want = {
        features: [
            torch.cat(
                [
                    w[f"{here}.weight"][i].flatten(),
                    w[f"{here}.bias"][[i]],
                    w[f"{there}.weight"][:, each * i : each * i + each].flatten(),  # 2x2 positions after the flatten
                ]
            )
            for i in range(size)
        ]
        for features, (here, there, size, each) in places.items()
    }
    for features, vectors in want.items():
        torch.testing.assert_close(features.distances(), brute_force(vectors), rtol=1e-10, atol=1e-10)
    weights = [slot for slot in first.group.slots if slot.tensor.endswith("weight")]
    without = Features(first.group, first._tensors, distance="centroid", compared=weights)
    torch.testing.assert_close(
        without.distances(),
        brute_force([torch.cat([w["0.weight"][i].flatten(), w["3.weight"][:, i].flatten()]) for i in range(4)]),
    )


@pytest.mark.parametrize("form", ["mean_sum", "sum_mean"])
@pytest.mark.parametrize("distance", ["ward", "centroid", "running", "bound"])
def test_distances_of_merged_features_follow_from_their_members(distance: str, form: str) -> None:
    model = one_layer(7)
    w, b, c = (p.detach().clone() for p in list(model.parameters())[:3])
    (features,) = features_of(model, torch.zeros(1, 6).double(), form=form, distance=distance)
    for pair in ((0, 3), (1, 6), (0, 5)):
        features.merge_(*pair, [features])
    members = {0: [0, 3, 5], 1: [1, 6], 2: [2], 4: [4]}
    incoming = {i: torch.cat([w, b[:, None]], 1)[m].mean(0) for i, m in members.items()}
    outgoing = {i: c[:, m].mean(1) for i, m in members.items()}
    want = torch.full((7, 7), torch.inf, dtype=torch.float64)
    for i, j in itertools.combinations(members, 2):
        k, n = len(members[i]), len(members[j])
        apart, across = (incoming[i] - incoming[j]).norm(), (outgoing[i] - outgoing[j]).norm()
        mean = (k * outgoing[i] + n * outgoing[j]) / (k + n)
        want[i, j] = {
            "centroid": apart**2 + across**2,
            "ward": k * n / (k + n) * (apart**2 + across**2),
            "running": (k * incoming[i] - n * incoming[j]).square().sum() + across**2,
            "bound": k * n / (k + n) * (mean.norm() + across) * apart,
        }[distance]
    torch.testing.assert_close(features.distances(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["mean_sum", "sum_mean"])
@pytest.mark.parametrize("name", NETS)
def test_gram_matrices_are_up_to_date_after_merges(name: str, form: str) -> None:
    model, example = build(name, widths=WIDE[name]), inputs(name)
    features = features_of(model, example, form=form)
    for _ in range(2):
        for f in features:
            f.merge_(*f.closest()[1:], features)
    for f in features:
        fresh = Features(f.group, f._tensors, f.form)
        assert f.grams.keys() == fresh.grams.keys()
        for side, gram in f.grams.items():
            torch.testing.assert_close(gram, fresh.grams[side], rtol=1e-10, atol=1e-10)


def test_the_order_of_channels_does_not_matter() -> None:
    torch.manual_seed(0)
    model, example = VGG([6, 6, 6, 6], bn=False).double(), inputs("vgg").double()
    other = copy.deepcopy(model)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for group in free(other, example):
        for slot in group.slots:
            tensor = fetch(other, slot.tensor).data
            tensor.index_copy_(
                slot.axis, slot.index.flatten(), tensor.index_select(slot.axis, slot.index[order].flatten())
            )
    torch.testing.assert_close(other(example), model(example))
    for one, two in zip(features_of(model, example), features_of(other, example), strict=True):
        full = [torch.where(d.isinf(), 0, d) for d in (one.distances(), two.distances())]
        full = [d + d.T for d in full]
        assert torch.equal(full[0].diagonal(), torch.zeros(6).double())
        torch.testing.assert_close(full[0][order][:, order], full[1])
    for options in ({"widths": 0.5}, {"beta": 0.6}):
        merged, permuted = (merge_features(m, example=example, **options) for m in (model, other))
        torch.testing.assert_close(permuted[0](example), merged[0](example))
        for name, group in merged[1].groups.items():
            back = sorted(sorted(order[c].tolist()) for c in permuted[1].groups[name].members)
            assert back == sorted(group.members)


# 6


def test_the_bound_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    (group,) = free(one_layer(2), torch.zeros(1, 6).double())
    shapes = {"layers.0.weight": (2, 6), "layers.0.bias": (2,), "layers.1.weight": (4, 2)}

    def output(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        w, b, c = (tensors[name] for name in shapes)
        return c @ torch.relu(w @ x + b)

    tight = 0.0
    for draw in range(1000):
        tensors = {
            name: torch.randn(shape, dtype=torch.double, generator=generator) * 4 ** torch.rand(1, generator=generator)
            for name, shape in shapes.items()
        }
        x = torch.randn(6, dtype=torch.double, generator=generator)
        before = output(tensors, x)
        features = Features(group, tensors, "mean_sum", "bound")
        if draw % 2:  # as if merged before: means of rows, sums of columns
            features.count = torch.randint(1, 4, (2,), generator=generator).double()
        limit = features.closest()[0] * (x.square().sum() + 1).sqrt().item()
        features.merge_(0, 1, [features])
        wrong = (output(tensors, x) - before).norm().item()
        assert wrong <= limit * (1 + 1e-9)
        tight = max(tight, wrong / limit)
    assert tight > 0.3  # and is not idle


def test_the_bound_is_met_at_opposite_signs_and_equal_columns() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([1.0, 2.0, 2.0])[:, None].expand(3, 2))
    x = torch.tensor([[5.0]]).double()
    (features,) = features_of(model, x, distance="bound")
    limit = features.closest()[0]
    assert limit == pytest.approx(0.5 * 3 * 2)
    features.merge_(0, 1, [features])
    # z = 5 and -5: half of |z_i - z_j| = 10 is min(|a|, |b|) = 5, times the length 3 of the columns
    assert (written(model, [features])(x) - model(x)).norm().item() == pytest.approx(limit * 5)


# 7


@pytest.mark.parametrize("form", ["mean_sum", "sum_mean"])
def test_three_features_in_two_merges(form: str) -> None:
    model = one_layer(3)
    w, b, c = (p.data.clone() for p in list(model.parameters())[:3])
    w[1] = w[0] + 0.01
    c[:, 1] = c[:, 0]
    w[2] += 1
    for parameter, value in zip(model.parameters(), (w, b, c), strict=False):
        parameter.data.copy_(value)
    (features,) = features_of(model, torch.zeros(1, 6).double(), form=form)
    assert features.closest()[1:] == (0, 1)
    features.merge_(0, 1, [features])
    assert features.count.tolist() == [2, 1, 1]
    assert features.alive.tolist() == [True, False, True]
    c_12 = (c[:, 0] + c[:, 1]) / 2
    features.merge_(0, 2, [features])
    tensors = features._tensors
    scale = 3 if form == "mean_sum" else 1
    torch.testing.assert_close(tensors["layers.0.weight"][0] * scale, w.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tensors["layers.0.bias"][0] * scale, b.sum(), rtol=1e-12, atol=1e-12)
    mean = (2 * c_12 + c[:, 2]) / 3
    torch.testing.assert_close(tensors["layers.1.weight"][:, 0] / scale, mean, rtol=1e-12, atol=1e-12)
    assert features.members[0] == [0, 1, 2]


# 8


@pytest.mark.parametrize("name", ["mlp", "vgg", "basic", "bottleneck", "padded"])
def test_both_forms_compute_the_same_in_a_relu_network(name: str) -> None:
    model, example = build(name).double(), inputs(name).double()
    fold_norms_(model, example)
    pair = [features_of(model, example, form=form) for form in ("mean_sum", "sum_mean")]
    for turn in range(3):  # single merges, then merges of what was merged
        for place, (one, two) in enumerate(zip(*pair, strict=True)):
            alive = one.alive.nonzero().flatten().tolist()
            if len(alive) > 1:
                i, j = alive[0], alive[-1 - (turn + place) % (len(alive) - 1)]
                one.merge_(i, j, pair[0])
                two.merge_(i, j, pair[1])
                outputs = [written(model, features)(example) for features in pair]
                torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    assert error(outputs[0], model(example)) > 1e-3  # something was changed


# 9


def test_a_larger_beta_leaves_fewer_features() -> None:
    model, example = one_layer(40), torch.randn(2, 6).double()
    betas = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
    for options in ({}, {"form": "sum_mean"}, {"distance": "centroid"}, {"distance": "running"}, {"distance": "bound"}):
        widths = [
            merge_features(model, example=example, beta=b, max_ratio=1, **options)[1].groups["layers.0"].after
            for b in betas
        ]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == 40
        assert widths[-1] < 20
        curve = feature_complexity(model, betas, example=example, **options)
        assert curve == {"layers.0": widths}


@pytest.mark.parametrize("name", NETS)
def test_widths_are_met_and_the_net_is_a_stock_one_of_them(name: str) -> None:
    net, model, example = NETS[name], build(name, widths=WIDE[name]), inputs(name)
    wanted = {group.name: max(2, group.size // 2) for group in free(model, example)}
    merged, report = merge_features(model, example=example, widths=wanted, bn="identity")
    assert widths_of(report) == wanted
    assert report.parameters[1] == sum(p.numel() for p in merged.parameters())
    left = list(WIDE[name])
    for group in report.groups.values():
        place, each = net.groups[group.name]
        left[place] -= each * (group.before - group.after)
    fresh = net.build(left)
    biases = sum(m.bias.numel() for m in merged.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    fresh_biases = sum(m.bias.numel() for m in fresh.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert report.parameters[1] - biases == sum(p.numel() for p in fresh.parameters()) - fresh_biases
    for (_, one), (_, two) in zip(merged.named_modules(), fresh.named_modules(), strict=True):
        if isinstance(one, nn.Conv2d) and one.bias is not None and two.bias is None:
            two.bias = nn.Parameter(torch.zeros(one.out_channels))  # folding gave it one
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(fresh.eval()(example), merged(example))


def test_a_fraction_is_of_every_group() -> None:
    model, example = build("vgg", widths=[8, 12, 10, 14]), inputs("vgg")
    _, report = merge_features(model, example=example, widths=0.5)
    assert widths_of(report) == {"0": 4, "3": 6, "7": 5, "12": 7}
    _, report = merge_features(model, example=example, widths={"3": 0.25, "12": 2})
    assert widths_of(report) == {"0": 8, "3": 3, "7": 10, "12": 2}


# 10


@pytest.mark.parametrize("distance", ["centroid", "ward"])
@pytest.mark.parametrize("base", ["initial", "running"])
@pytest.mark.parametrize("beta", [0.05, 0.15])
def test_merging_stops_where_it_should(beta: float, base: str, distance: str) -> None:
    torch.manual_seed(0)
    model, example = VGG([12, 12, 12, 12], bn=False).double(), inputs("vgg").double()
    for group in free(model, example):  # lengths of all kinds
        weight = fetch(model, group.producers[0].tensor).data
        weight.mul_(torch.logspace(-1.5, 0.5, 12).double().view(-1, *[1] * (weight.ndim - 1)))
    merged, report = merge_features(model, example=example, beta=beta, max_ratio=0.8, base=base, distance=distance)
    before = {f.group.name: f.largest() for f in features_of(model, example, distance=distance)}
    assert any(group.merges for group in report.groups.values())
    stopped = 0
    for group in free(merged, example):
        known = report.groups[group.name]
        k = torch.tensor([float(len(m)) for m in known.members])[:, None]
        vectors = torch.cat(
            [slot.rows(fetch(merged, slot.tensor).data) / (k if slot.role == "consume" else 1) for slot in group.slots],
            dim=1,
        )
        distances = brute_force(list(vectors))
        if distance == "ward":
            distances *= k * k.T / (k + k.T)
        largest = before[group.name] if base == "initial" else float(distances[distances.isfinite()].max())
        limit = known.before - int(0.8 * known.before)
        assert known.after >= limit
        if known.after > limit:
            assert distances.min() > beta * largest
            stopped += 1
        assert sum(map(len, known.members)) == known.before
    assert stopped


# 11


@pytest.mark.parametrize("scale", [1e-3, 50.0])
@pytest.mark.parametrize("distance", ["ward", "centroid", "running", "bound"])
def test_a_common_factor_changes_no_merge(distance: str, scale: float) -> None:
    model, example = build("vgg", widths=[12, 12, 12, 12]).double(), inputs("vgg").double()
    fold_norms_(model, example)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(scale)
    one, two = (merge_features(m, example=example, beta=0.4, distance=distance)[1] for m in (model, other))
    assert {n: [(m.first, m.second) for m in g.merges] for n, g in one.groups.items()} == {
        n: [(m.first, m.second) for m in g.merges] for n, g in two.groups.items()
    }
    assert any(g.merges for g in one.groups.values())


# Beyond the sheet


def test_normalising_finds_rescaled_duplicates() -> None:
    model, example = build("mlp", widths=[8, 8]).double(), inputs("mlp").double()
    first, second = model.layers[0], model.layers[1]
    with torch.no_grad():
        first.weight[5], first.bias[5] = 3 * first.weight[2], 3 * first.bias[2]
        second.weight[:, 5] = second.weight[:, 2] / 3
    want = model(example)
    assert widths_of(merge_features(model, example=example, beta=1e-6)[1]) == {"layers.0": 8, "layers.1": 8}
    merged, report = merge_features(model, example=example, beta=1e-6, normalise=True)
    assert widths_of(report) == {"layers.0": 7, "layers.1": 8}
    torch.testing.assert_close(merged(example), want, rtol=1e-10, atol=1e-10)
    with pytest.raises(BillhookError, match=r"The channels of layers\.0 pass a norm or an activation"):
        merge_features(MLP([8], nn.GELU), example=torch.randn(1, 6), normalise=True)


@pytest.mark.parametrize("name", ["vgg", "basic", "bottleneck"])
def test_normalising_changes_no_function(name: str) -> None:
    model, example = build(name).double(), inputs(name).double()
    merged, _ = merge_features(model, example=example, beta=0.0, normalise=True)
    torch.testing.assert_close(merged(example), model(example), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"form": "sum_mean"}, {"normalise": True}], ids=str)
def test_norms_put_back_are_neutral_until_they_are_counted(options: dict[str, Any]) -> None:
    model, example = build("basic", widths=WIDE["basic"]).double(), inputs("basic", batch=16).double()
    plain, one = merge_features(model, example=example, widths=0.5, **options)
    normed, two = merge_features(model, example=example, widths=0.5, bn="identity", **options)
    assert one.groups == two.groups
    torch.testing.assert_close(normed(example), plain(example), rtol=1e-8, atol=1e-8)
    recalibrate_norms(normed, [example])
    assert error(normed(example), plain(example)) > 1e-3


def test_one_group_hidden_in_a_gated_block_merges_by_its_gate_too() -> None:
    torch.manual_seed(0)
    model, example = Gated([6]).double(), torch.randn(2, 3, 6).double()
    with torch.no_grad():
        model.up.weight[4], model.up.bias[4] = model.up.weight[1], model.up.bias[1]
    assert widths_of(merge_features(model, example=example, beta=0.0)[1]) == {"gate": 6}
    with torch.no_grad():
        model.gate.weight[4], model.gate.bias[4] = model.gate.weight[1], model.gate.bias[1]
    merged, report = merge_features(model, example=example, widths={"gate": 5}, distance="bound")
    assert report.groups["gate"].members[1] == [1, 4]
    assert error(merged(example), model(example)) < 1e-10
    wrong, _ = merge_features(model, example=example, widths={"gate": 5}, distance="bound", form="sum_mean")
    assert error(wrong(example), model(example)) > 1e-3


def test_merging_is_kinder_than_dropping() -> None:
    """At half the width on a net with noisy copies of half its features."""
    torch.manual_seed(0)
    model, example = VGG([16, 16, 16, 16], bn=False).double(), torch.randn(16, 3, 8, 8).double()
    for group in free(model, example):
        for slot in group.slots:
            tensor = fetch(model, slot.tensor).data
            half = tensor.index_select(slot.axis, slot.index[:8].flatten()) / (2 if slot.role == "consume" else 1)
            noise = 1 + 0.1 * torch.randn_like(half)
            tensor.index_copy_(slot.axis, slot.index[:8].flatten(), half)
            tensor.index_copy_(slot.axis, slot.index[8:].flatten(), half * noise)
    merged, report = merge_features(model, example=example, widths=0.5)
    assert all(m == [i, i + 8] for g in report.groups.values() for i, m in enumerate(g.members))
    dropped = copy.deepcopy(model)
    for name in ("0", "3", "7", "12"):
        group = next(g for g in free(dropped, example) if g.name == name)
        keep_channels_(dropped, group, torch.arange(8))
    assert error(merged(example), model(example)) < 0.2 * error(dropped(example), model(example))


def test_complexity_starts_whole_and_falls() -> None:
    model, example = build("basic", widths=[2 * w for w in NETS["basic"].widths]), inputs("basic")
    curves = feature_complexity(model, [0.0, 0.5, 0.999], example=example)
    groups = free(model, example)
    assert [curves[g.name][0] for g in groups] == [g.size for g in groups]
    assert all(a >= b >= c for a, b, c in curves.values())
    assert sum(c[2] for c in curves.values()) < sum(g.size for g in groups)


def test_mistakes_are_said() -> None:
    model, example = build("vgg"), inputs("vgg")
    with pytest.raises(BillhookError, match=r"beta=1\.5 is not possible"):
        merge_features(model, example=example, beta=1.5)
    with pytest.raises(BillhookError, match=r"no option 'width' \(did you mean 'widths'"):
        merge_features(model, example=example, width=0.5)
    with pytest.raises(BillhookError, match="There is no group '13' to give a width"):
        merge_features(model, example=example, widths={"13": 0.5})
    with pytest.raises(BillhookError, match="its channels reach the network's output"):
        merge_features(model, example=example, widths={"14": 0.5})
    with pytest.raises(BillhookError, match="above 0 and at most 1"):
        IFM(widths=1.5)
    with pytest.raises(BillhookError, match="neither a fraction up to 1 nor a whole number"):
        IFM(widths={"0": 2.5})
    with pytest.raises(BillhookError, match="No group is named 'layer9"):
        merge_features(model, example=example, exclude=("layer9*",))
    with pytest.raises(BillhookError, match="pass a norm that cannot be folded"):
        merge_features(build("dense"), example=inputs("dense"), form="sum_mean")
    with pytest.raises(BillhookError, match="takes betas instead of beta"):
        feature_complexity(model, [0.1], example=example, beta=0.1)
    _, report = merge_features(model, example=example, widths=0.5, exclude=("0", "1*"))
    assert widths_of(report) == {"3": 3, "7": 2}
    assert report.fixed["0"] == "are excluded"

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return F.relu(self.b(y)) * torch.ones(1, y.size(1) // 4, 1, 1)

    with pytest.raises(BillhookError, match="hold widths as constants"):
        merge_features(Constant(), example=torch.randn(1, 3, 4, 4), widths=0.5)


def test_options_are_declared_once() -> None:
    assert IFM(beta=0.1, form="sum_mean").text() == "ifm(beta=0.1, form=sum_mean)"
    assert all(field.description for field in IFM.model_fields.values())
    assert IFM.paper is not None
    assert IFM.paper.arxiv == "2310.06756"
