"""Curves, crossings and knees against synthetic curves with known answers and brute force."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from torch import Tensor, nn

import billhook as bh
from billhook import BillhookError
from billhook.analysis.curve import GRID, Curve, Hinge, Point, chord, essential_sparsity, hinge, isotonic
from billhook.training import held

Q0, A, B, T = 80.0, 0.5, 60.0, 0.437
CROSSING = (1.0 + B * T) / (A + B)  # where the broken line has lost one point


def broken(s: float, seed: int = 0) -> float:
    """Flat, then falling from T on."""
    return Q0 - A * s - B * max(0.0, s - T)


class Counted:
    """A quality function that remembers its calls."""

    def __init__(self, quality: Callable[[float], float]) -> None:
        self.quality = quality
        self.calls: list[tuple[float, int]] = []

    def __call__(self, s: float, seed: int) -> float:
        self.calls.append((s, seed))
        return self.quality(s)


def table(values: list[float]) -> Callable[[float, int], float]:
    """Linear between the values of a grid of tenths."""
    return lambda s, seed: float(np.interp(s, 0.1 * np.arange(len(values)), values))


# The pieces


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 10)), min_size=1, max_size=9),
)
def test_isotonic_is_the_minimax_of_means(rows: list[tuple[float, float]]) -> None:
    q, w = (np.array(column) for column in zip(*rows, strict=True))
    n = len(q)
    mean = {(j, k): np.average(q[j : k + 1], weights=w[j : k + 1]) for j in range(n) for k in range(j, n)}
    expected = [min(max(mean[j, k] for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    fit = isotonic(q, w)
    np.testing.assert_allclose(fit, expected, rtol=1e-9, atol=1e-9)
    assert (np.diff(fit) <= 1e-12).all()


def test_hinge_finds_the_bend_of_exact_data() -> None:
    fit = hinge(GRID, [broken(s) for s in GRID])
    assert fit is not None
    assert fit.tau == 0.435
    # 60 either side of a lattice point 0.002 off
    assert fit.before == pytest.approx(-A, abs=0.2)
    assert fit.after == pytest.approx(-A - B, abs=0.2)
    # with the bend on the lattice the fit is exact
    exact = hinge(GRID, [Q0 - A * s - B * max(0.0, s - 0.44) for s in GRID])
    assert exact is not None
    assert (exact.tau, exact.before, exact.after) == (0.44, pytest.approx(-A), pytest.approx(-A - B))
    assert exact.sse < 1e-18


def test_hinge_stays_close_under_noise() -> None:
    rng = np.random.default_rng(0)
    grid = np.array(GRID[:8])  # up to s_hi of the noiseless curve
    clean = np.array([broken(s) for s in grid])
    fits = [hinge(grid, clean + rng.normal(0, 0.2, (5, len(grid))).mean(axis=0)) for _ in range(200)]
    errors = [abs(fit.tau - T) for fit in fits if fit is not None]
    assert len(errors) == 200
    assert max(errors) < 0.01
    assert max(errors) > 0.002  # the noise reached the fit


@given(st.lists(st.floats(0, 10), min_size=7, max_size=9))
@settings(max_examples=30, deadline=None)
def test_hinge_is_the_best_of_its_lattice(losses: list[float]) -> None:
    x = 0.1 * np.arange(len(losses))
    y = 80 - np.cumsum(losses)
    best, best_tau = math.inf, None
    for i in range(201):
        tau = 0.005 * i
        if (x <= tau + 1e-9).sum() < 3 or (x > tau + 1e-9).sum() < 2:
            continue
        design = np.stack([np.ones_like(x), x, np.maximum(0, x - tau)])
        solution = np.linalg.solve(design @ design.T, design @ y)  # normal equations
        sse = float(((y - solution @ design) ** 2).sum())
        if solution[2] < 0 and sse < best:
            best, best_tau = sse, tau
    fit = hinge(x, y)
    if fit is None:
        line = np.polyval(np.polyfit(x, y, 1), x)
        assert best >= float(((y - line) ** 2).sum()) * (1 - 1e-6) - 1e-9
    else:
        assert fit.sse == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert fit.sse <= fit.sse_line
        assert best_tau is not None
        if best > 1e-6 and fit.sse < 0.5 * fit.sse_line:  # elsewhere two tau can tie
            assert fit.tau == pytest.approx(best_tau, abs=0.006)


def test_hinge_needs_points_and_a_bend_downwards() -> None:
    assert hinge([0, 0.1, 0.2, 0.3], [1, 1, 1, 0]) is None
    assert hinge(GRID, [5.0] * 10) is None
    assert hinge(GRID, [5.0 - 7 * s for s in GRID]) is None
    assert hinge(GRID, [(1 - s) ** 2 for s in GRID]) is None  # it bends upwards everywhere


def test_f_test_is_that_of_two_more_parameters() -> None:
    for sse, count in ((2.0, 9), (0.1, 6), (9.0, 30)):
        fit = Hinge(0.4, -1.0, -9.0, sse, 10.0, count)
        value, free = (10.0 - sse) / 2 / (sse / (count - 4)), count - 4
        # the tail of the F distribution's density, integrated in u = 1 / (1 + x) from 0 to that of the value
        u = (np.arange(200_000) + 0.5) / 200_000 / (1 + value)
        x = 1 / u - 1
        beta = math.gamma(1) * math.gamma(free / 2) / math.gamma(1 + free / 2)
        density = (2 / free) * (1 + 2 * x / free) ** (-(2 + free) / 2) / beta
        assert fit.p_value == pytest.approx(float(np.mean(density / u**2)) / (1 + value), rel=1e-3)
    assert Hinge(0.4, -1.0, -9.0, 0.1, 10.0, 5).p_value is None
    assert Hinge(0.4, -1.0, -9.0, 0.0, 10.0, 8).p_value == 0.0


def test_sharp_needs_slope_and_explanation() -> None:
    assert Hinge(0.4, -3.0, -30.0, 0.1, 10.0, 9).sharp(1.0)
    assert not Hinge(0.4, -11.0, -30.0, 0.1, 10.0, 9).sharp(1.0)  # not three times steeper
    assert not Hinge(0.4, -3.0, -30.0, 6.0, 10.0, 9).sharp(1.0)  # a line explains nearly as much
    assert not Hinge(0.4, -3.0, -30.0, 4.0, 10.0, 6).sharp(1.0)  # two degrees of freedom: an accident
    assert Hinge(0.4, -3.0, -30.0, 4.0, 10.0, 5).sharp(1.0)
    # a flat start counts as losing eps up to tau, and so does a rising one
    assert Hinge(0.5, 0.0, -30.0, 0.1, 10.0, 9).sharpness(1.0) == pytest.approx(15)
    assert Hinge(0.5, 8.0, -30.0, 0.1, 10.0, 9).sharpness(1.0) == pytest.approx(15)


def test_chord_names_a_point() -> None:
    assert chord(GRID[:8], [broken(s) for s in GRID[:8]]) == 0.4
    assert chord(GRID, [5.0 - 7 * s for s in GRID]) is None
    assert chord(GRID, [5.0] * 10) is None


# The masks that a curve of one-shot magnitude is drawn of


class Net(nn.Module):
    """Blocks of two matrices each between a norm and a head, all with biases."""

    def __init__(self, width: int = 4, inner: int = 2, blocks: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width)) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 3)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result

    def prunable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.layers.named_parameters() if name.endswith("weight")}


def masks_of(net: Net, **options: Any) -> dict[str, Tensor]:
    """Name -> bool mask, True where a weight stays; the net is not changed."""
    pruned = copy.deepcopy(net)
    anatomy = bh.Anatomy(family="net", blocks="layers", input=None)
    batch = torch.zeros(1, net.head.in_features, dtype=net.head.weight.dtype)
    bh.prune(pruned, bh.Magnitude(**options), [batch], anatomy=anatomy)
    changed = {f"layers.{name}" for name in net.prunable()}
    for name, parameter in net.named_parameters():
        if name not in changed:
            assert torch.equal(pruned.get_parameter(name), parameter)
    masks = {name: weight != 0 for name, weight in pruned.prunable().items()}
    for name, weight in pruned.prunable().items():
        assert torch.equal(weight, torch.where(masks[name], net.prunable()[name], 0))
    return masks


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_no_sparsity_keeps_every_weight_and_nearly_all_of_it_none(scope: str) -> None:
    """A sparsity of 1 itself is not an option of any method."""
    net = Net(5, 3, blocks=2)
    assert bool(flat(masks_of(net, sparsity=0.0, scope=scope)).all())
    assert not bool(flat(masks_of(net, sparsity=1 - 1e-9, scope=scope)).any())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "ties"])
def test_budgets_are_exact_and_masks_nested(kind: str) -> None:
    """floor(s · N) weights leave, of all matrices together; what left at a lower sparsity is gone at a higher one."""
    net = Net(18, 9, blocks=2)
    if kind == "bfloat16":  # many equal magnitudes
        net.bfloat16()
    if kind == "ties":
        for weight in net.prunable().values():
            weight.fill_(-0.5)
    before = torch.ones(648, dtype=torch.bool)
    for thousandths in (1, 237, 500, 501, 999):
        keep = flat(masks_of(net, sparsity=thousandths / 1000, scope="global"))
        assert int((~keep).sum()) == thousandths * len(before) // 1000
        assert not bool((keep & ~before).any())
        before = keep


@pytest.mark.parametrize("ties", [False, True])
def test_no_mask_of_the_same_size_keeps_more_magnitude(ties: bool) -> None:
    net = Net(seed=3)
    if ties:
        for weight in net.prunable().values():
            weight.copy_((2 * weight).round().clamp(min=-2) + 0.5)
    size = flat(net.prunable()).abs().double()
    every = (torch.arange(1 << 16)[:, None] >> torch.arange(16)) & 1
    sums, counts = every.double() @ size, every.sum(dim=1)
    for gone in (1, 5, 8, 13):
        keep = flat(masks_of(net, sparsity=gone / 16, scope="global"))
        assert int(keep.sum()) == 16 - gone
        assert float(size[keep].sum()) == pytest.approx(float(sums[counts == 16 - gone].max()), rel=1e-12)


def test_scale_matters_between_matrices_and_not_within() -> None:
    net = Net(6, 4)
    one, other = masks_of(net, sparsity=0.4, scope="global"), masks_of(net, sparsity=0.4, scope="layer")
    net.prunable()["0.0.weight"].mul_(10)
    assert not torch.equal(flat(masks_of(net, sparsity=0.4, scope="global")), flat(one))
    assert torch.equal(flat(masks_of(net, sparsity=0.4, scope="layer")), flat(other))
    single = Net(6, 6)
    single.layers = single.layers[0][:1]  # with one matrix there is nothing between
    one, other = masks_of(single, sparsity=0.4, scope="global"), masks_of(single, sparsity=0.4, scope="layer")
    assert one.keys() == {"0.weight"}
    assert torch.equal(flat(one), flat(other))


def test_two_of_four_is_the_best_of_the_six_patterns_of_each_group() -> None:
    net = Net(8, 12, blocks=2)
    six = torch.tensor([[i in pair for i in range(4)] for pair in combinations(range(4), 2)])
    for name, keep in masks_of(net, pattern="2:4").items():
        groups = net.prunable()[name].abs().reshape(-1, 4)  # consecutive inputs of a row
        best = six[(groups @ six.float().T).argmax(dim=1)]
        assert torch.equal(keep.reshape(-1, 4), best)


def test_fine_tuning_under_a_frozen_mask_revives_nothing() -> None:
    net = Net(8, 6, blocks=2)
    masks = {f"layers.{name}": keep for name, keep in masks_of(net, sparsity=0.5, scope="global").items()}
    x, y = (torch.randn(32, n, generator=torch.Generator().manual_seed(n)) for n in (8, 3))
    with held(net, masks):
        start = copy.deepcopy(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
            assert all(not bool(net.get_parameter(name)[~keep].any()) for name, keep in masks.items())
    for name, keep in masks.items():
        assert bool((net.get_parameter(name) != start.get_parameter(name))[keep].all())


# The search


def test_broken_line_is_found_with_four_more_evaluations() -> None:
    evaluate = Counted(broken)
    curve = essential_sparsity(evaluate, eps=1.0)
    assert abs(CROSSING - 0.44992) < 1e-5
    assert 0.4399 <= curve.s_eps <= 0.44992
    assert curve.s_above is not None
    assert 0 < curve.s_above - curve.s_eps <= 0.01
    assert curve.evaluations == len(evaluate.calls) == len(GRID) + 4
    assert curve.tau_hinge == pytest.approx(T, abs=0.005)
    assert curve.tau_chord == 0.4375  # of the points evaluated the one next to the bend
    assert curve.s_hi == 0.7  # 0.8 lost more than a quarter of 80
    assert curve.flag == "sharp"
    assert curve.sharpness == pytest.approx((A + B) / (1.0 / 0.435), rel=0.01)
    assert curve.crossings == [(curve.s_eps, curve.s_above)]
    assert not curve.warnings
    assert not curve.stopped_early


@pytest.mark.parametrize("block", range(4))
def test_broken_line_is_found_under_noise(block: int) -> None:
    for draw in range(50 * block, 50 * block + 50):
        rng = np.random.default_rng(draw)
        curve = essential_sparsity(lambda s, seed, rng=rng: broken(s) + rng.normal(0, 0.2), eps=1.0, seeds=5)
        assert curve.tau_hinge == pytest.approx(T, abs=0.01)
        assert curve.s_eps == pytest.approx(CROSSING, abs=0.02)
        assert curve.flag == "sharp"


@given(st.floats(2, 60), st.floats(0.5, 2))
@settings(max_examples=40, deadline=None)
def test_straight_line_is_gradual(k: float, eps: float) -> None:
    assume(eps / k < 0.89)
    curve = essential_sparsity(lambda s, seed: 80 - k * s, eps=eps)
    assert curve.flag == "gradual"
    assert curve.s_eps <= eps / k + 1e-9
    assert curve.s_eps > eps / k - 0.01 - 1e-9
    assert curve.tau_chord is None


@pytest.mark.parametrize("quality", [lambda s: 80.0, lambda s: 80 + 3 * s, lambda s: 80 - s])
def test_no_crossing(quality: Callable[[float], float]) -> None:
    evaluate = Counted(quality)
    curve = essential_sparsity(evaluate, eps=1.0)
    assert curve.flag == "no crossing"
    assert curve.s_eps == 0.9
    assert (curve.s_above, curve.tau_hinge, curve.tau_chord, curve.sharpness) == (None, None, None, None)
    assert not curve.crossings
    assert len(evaluate.calls) == len(GRID)
    assert "No crossing" in curve.warnings[0]


@given(st.lists(st.floats(0, 2), min_size=9, max_size=9), st.lists(st.floats(0.1, 15), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_more_tolerance_never_gives_less_sparsity(losses: list[float], tolerances: list[float]) -> None:
    values = [80 - float(loss) for loss in np.cumsum([0, *losses])]
    found = []
    for eps in sorted(tolerances):
        evaluate = Counted(lambda s: table(values)(s, 0))
        curve = essential_sparsity(evaluate, eps=eps, chance=0.0)
        found.append(curve.s_eps)
        # at most a quarter of 80 is lost, so that nothing is evaluated for s_hi
        assert len(evaluate.calls) <= len(GRID) + math.ceil(math.log2(0.1 / 0.01))
        at = table(values)(curve.s_eps, 0)
        assert at >= curve.line - 1e-9
        if curve.s_above is not None:
            assert table(values)(curve.s_above, 0) < curve.line
    assert found == sorted(found)


@pytest.mark.parametrize(("rho", "extra"), [(0.1, 0), (0.05, 1), (0.025, 2), (0.001, 7)])
def test_resolution_sets_the_number_of_evaluations(rho: float, extra: int) -> None:
    curve = essential_sparsity(broken, eps=1.0, rho=rho)
    assert curve.evaluations == len(GRID) + extra
    assert curve.s_eps == pytest.approx(CROSSING, abs=rho)
    assert curve.s_eps <= CROSSING


def test_a_rise_that_follows_a_dip_is_pooled_with_it() -> None:
    # the dip at 0.1 alone is below the line of 79; with the rise after it the fit is at 79.3
    dip = table([80, 78.4, 80.2, 79.2, 60, 40, 40, 40, 40, 40])
    curve = essential_sparsity(dip, eps=1.0)
    assert 0.3 <= curve.s_eps < 0.31
    fitted = {point.sparsity: point.fitted for point in curve.points}
    assert fitted[0.1] == fitted[0.2] == pytest.approx(79.3)
    # raw crossings are all reported: into the dip, and for good
    assert len(curve.crossings) == 2
    assert curve.crossings[0] == (0.0, 0.1)
    assert curve.crossings[1] == (curve.s_eps, curve.s_above)
    assert any("2 times" in text for text in curve.warnings)
    # a deeper one is not made up for
    deep = table([80, 76, 80.2, 79.2, 60, 40, 40, 40, 40, 40])
    assert essential_sparsity(deep, eps=1.0).s_eps < 0.1


@pytest.mark.parametrize("eps", [0.999, 0.7, 1.1, 0.1])
def test_an_exact_tie_is_within_the_drop(eps: float) -> None:
    # the mean of equal numbers can come out lower than each of them
    tie = table([80.0, *[80.0 - eps] * 6, 60.0, 40.0, 40.0])
    curve = essential_sparsity(tie, eps=eps)
    assert 0.6 <= curve.s_eps < 0.61


@given(st.lists(st.floats(-3, 6), min_size=9, max_size=9), st.floats(0.5, 3))
@settings(max_examples=60, deadline=None)
def test_the_crossing_is_that_of_the_fit(losses: list[float], eps: float) -> None:
    values = [80 - float(loss) for loss in np.cumsum([0, *losses])]
    curve = essential_sparsity(table(values), eps=eps, chance=0.0)
    fitted = [point.fitted for point in curve.points]
    assert all(a is not None and b is not None and b <= a + 1e-9 for a, b in pairwise(fitted))
    for point in curve.points:
        assert point.fitted is not None
        if abs(point.fitted - curve.line) > 1e-9:
            assert (point.fitted >= curve.line) == (point.sparsity <= curve.s_eps)


def test_early_stop_saves_the_rest_of_the_grid() -> None:
    evaluate = Counted(lambda s: 80.0 if s < 0.25 else 20.0)
    curve = essential_sparsity(evaluate, eps=1.0, seeds=2)
    visited = {s for s, _ in evaluate.calls}
    assert curve.stopped_early
    assert max(visited) == 0.4  # 0.3 and 0.4 lost 60, the second one ends it
    assert curve.evaluations == len(evaluate.calls) == 2 * len(visited)
    assert len(visited) == 5 + 4
    # far points that do not follow each other do not end it
    once = Counted(lambda s: 20.0 if 0.25 < s < 0.35 or 0.55 < s < 0.65 else 80.0 - s)
    assert not essential_sparsity(once, eps=1.0).stopped_early
    assert 0.9 in {s for s, _ in once.calls}


def test_points_of_a_fast_fall_are_bisected_for_the_knee() -> None:
    # 0.4 lost a little more than eps, 0.5 more than a quarter: one point on the slope is too few
    evaluate = Counted(lambda s: max(10.0, 80 - 300 * max(0.0, s - 0.395)))
    curve = essential_sparsity(evaluate, eps=1.0)
    assert evaluate.calls[-1] == (0.45, 0)
    assert curve.s_hi == 0.45
    assert sum(curve.s_eps < point.sparsity <= curve.s_hi for point in curve.points) >= 2
    assert all(80 - point.quality <= 20 for point in curve.points if point.sparsity <= curve.s_hi)
    assert not curve.cliff
    assert curve.tau_hinge == 0.395
    assert curve.flag == "sharp"


@pytest.mark.parametrize("place", [0.05, 0.43, 0.61])
def test_cliff(place: float) -> None:
    evaluate = Counted(lambda s: 80.0 if s < place else 20.0)
    curve = essential_sparsity(evaluate, eps=1.0)
    assert curve.cliff
    assert place - 0.01 <= curve.s_eps < place
    assert curve.tau_hinge == curve.tau_chord == curve.s_eps
    assert curve.sharpness == math.inf
    assert curve.flag == "sharp"
    assert len({s for s, _ in evaluate.calls}) == len(evaluate.calls)
    again = Curve.model_validate_json(curve.model_dump_json())
    assert "Infinity" in curve.model_dump_json()
    assert again == curve


def test_chance_level_keeps_the_flat_bottom_out() -> None:
    # 45% falling from 0.3 on to 25% of guessing, reached at 0.55
    def quality(s: float, seed: int) -> float:
        return 25 + 20 * min(1.0, max(0.0, 1 - max(0.0, s - 0.3) / 0.25)) - 0.5 * s

    curve = essential_sparsity(quality, eps=1.0, chance=25.0)
    assert curve.s_hi is not None
    assert 45 - quality(curve.s_hi, 0) <= 5.0
    assert curve.tau_hinge == pytest.approx(0.3, abs=0.01)
    assert curve.flag == "sharp"
    blind = essential_sparsity(quality, eps=1.0)  # takes 0 for chance
    assert blind.s_hi is not None
    assert blind.s_hi > curve.s_hi
    assert blind.s_eps == curve.s_eps


def test_negative_log_likelihood_with_a_relative_drop() -> None:
    # NLL of a small language model under global magnitude pruning
    def nll(s: ArrayLike) -> Any:
        return np.interp(s, 0.1 * np.arange(7), [3.493, 3.505, 3.537, 4.045, 5.195, 6.868, 10.149])

    curve = essential_sparsity(
        lambda s, seed: -float(nll(s)), eps=1.0, eps_mode="relative", chance=-math.log(49152), grid=GRID[:7]
    )
    assert curve.drop == pytest.approx(0.03493)
    fine = np.linspace(0, 0.6, 60001)
    truth = float(fine[np.flatnonzero(nll(fine) > 3.493 * 1.01)[0]])
    assert truth - 0.01 <= curve.s_eps <= truth
    assert 0.1 <= curve.s_eps <= 0.2
    assert curve.s_hi == 0.4
    assert curve.tau_hinge is not None
    assert 0.2 <= curve.tau_hinge <= 0.3
    assert curve.flag == "sharp"
    # an absolute drop of as many nats is the same curve
    absolute = essential_sparsity(lambda s, seed: -float(nll(s)), eps=0.03493, chance=-math.log(49152), grid=GRID[:7])
    assert absolute.s_eps == curve.s_eps


def test_resumed_search_repeats_nothing_and_ends_the_same() -> None:
    saved: dict[tuple[float, int], float] = {}

    def noisy(s: float, seed: int) -> float:
        return broken(s) + 0.1 * math.sin(1000 * s + 7 * seed)

    whole = essential_sparsity(noisy, eps=1.0, seeds=3, on_point=lambda s, seed, q: saved.update({(s, seed): q}))
    assert whole.evaluations == len(saved) == 3 * len(whole.points)
    assert whole.reused == 0
    for done in (0, 1, 7, 30, whole.evaluations - 1, whole.evaluations):
        # keys as a file would give them back, and some that are of no use
        known = {(float(f"{s:.12g}"), seed): q for (s, seed), q in list(saved.items())[:done]}
        calls: list[tuple[float, int]] = []

        def evaluate(s: float, seed: int, calls: list[tuple[float, int]] = calls) -> float:
            calls.append((s, seed))
            return noisy(s, seed)

        fresh: list[tuple[float, int]] = []
        rest = essential_sparsity(
            evaluate,
            eps=1.0,
            seeds=3,
            known=known | {(0.123, 0): 5.0, (0.0, 9): 5.0},
            on_point=lambda s, seed, q, fresh=fresh: fresh.append((s, seed)),
        )
        assert calls == fresh
        assert not set(calls) & set(list(saved)[:done])
        assert len(calls) == rest.evaluations == whole.evaluations - done
        assert rest.reused == done
        assert rest.model_copy(update={"evaluations": 0, "reused": 0}) == whole.model_copy(update={"evaluations": 0})


def test_points_are_saved_before_an_interruption() -> None:
    saved: dict[tuple[float, int], float] = {}

    def evaluate(s: float, seed: int) -> float:
        if s > 0.25:
            raise KeyboardInterrupt
        return broken(s)

    with pytest.raises(KeyboardInterrupt):
        essential_sparsity(evaluate, eps=1.0, on_point=lambda s, seed, q: saved.update({(s, seed): q}))
    assert saved == {(s, 0): broken(s) for s in (0.0, 0.1, 0.2)}


def test_standard_errors_and_the_noise_warning() -> None:
    offsets = [-1.0, 0.0, 0.3, 0.7]
    curve = essential_sparsity(lambda s, seed: broken(s) + offsets[seed], eps=1.0, seeds=4)
    expected = np.std(offsets, ddof=1) / 2
    for point in curve.points:
        assert point.se == pytest.approx(expected)
        assert point.quality == pytest.approx(broken(point.sparsity))
        assert point.values == [broken(point.sparsity) + offset for offset in offsets]
    assert curve.se == pytest.approx(expected)
    assert expected < 0.5
    assert not curve.warnings
    noisy = essential_sparsity(lambda s, seed: broken(s) + 2 * offsets[seed], eps=1.0, seeds=4)
    assert len(noisy.warnings) == 1
    assert "more seeds" in noisy.warnings[0]
    assert essential_sparsity(broken, eps=1.0).se is None


def test_noise_far_from_the_crossing_is_no_reason_to_warn() -> None:
    def quality(s: float, seed: int) -> float:
        return broken(s) + (5.0 * (-1) ** seed if s > 0.65 else 0.01 * seed)

    curve = essential_sparsity(quality, eps=1.0, seeds=2)
    assert curve.se == pytest.approx(0.005)
    assert not any("standard error" in text for text in curve.warnings)


def test_a_noisy_point_weighs_less_in_the_fit() -> None:
    # 0.2 rises by 2 above 0.1: pooled to the middle if both are as certain, towards 0.1 if it is the certain one
    def quality(s: float, seed: int) -> float:
        mean = float(np.interp(s, [0, 0.1, 0.2, 0.3], [80, 78, 80, 60]))
        return mean + (-1) ** seed * (2.0 if s == 0.2 else 1.0)

    curve = essential_sparsity(quality, eps=1.0, seeds=2, grid=(0.1, 0.2, 0.3))
    fitted = {point.sparsity: point.fitted for point in curve.points}
    assert fitted[0.1] == fitted[0.2] == pytest.approx((4 * 78 + 80) / 5)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_broken_model_is_below_the_line(bad: float) -> None:
    curve = essential_sparsity(lambda s, seed: broken(s) if s < 0.55 else bad, eps=1.0)
    assert curve.s_eps == pytest.approx(CROSSING, abs=0.01)
    assert curve.tau_hinge == pytest.approx(T, abs=0.005)
    assert all(point.fitted is not None and math.isfinite(point.fitted) for point in curve.points)
    assert any("not finite" in text for text in curve.warnings)
    again = Curve.model_validate_json(curve.model_dump_json())
    assert again.model_dump_json() == curve.model_dump_json()
    assert [math.isfinite(p.quality) for p in again.points] == [p.sparsity < 0.55 for p in again.points]


def test_losing_at_once() -> None:
    curve = essential_sparsity(lambda s, seed: 80.0 if s == 0 else 70.0 - 10 * s, eps=1.0)
    assert curve.s_eps == 0.0
    assert any("already" in text for text in curve.warnings)


def test_other_knobs_move_in_steps() -> None:
    evaluate = Counted(lambda layers: 80 - 0.1 * layers - 4 * max(0.0, layers - 9))
    curve = essential_sparsity(evaluate, eps=2.0, grid=range(0, 25, 4), rho=0.5, step=1, knob="layers")
    assert all(s == int(s) for s, _ in evaluate.calls)
    assert (curve.s_eps, curve.s_above) == (9, 10)
    assert curve.tau_hinge == pytest.approx(9, abs=0.2)
    assert curve.knob == "layers"


def test_the_grid_may_be_unordered_and_lack_zero() -> None:
    curve = essential_sparsity(broken, eps=1.0, grid=(0.5, 0.4, 0.4, 0.1, 0.3, 0.2))
    assert [point.sparsity for point in curve.points] == sorted({point.sparsity for point in curve.points})
    assert curve.dense == 80.0
    assert curve.s_eps == pytest.approx(CROSSING, abs=0.01)


def test_a_point_keeps_its_values() -> None:
    point = Point.of(0.3, [1.0, 2.0, 6.0])
    assert (point.quality, point.se) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert Point.of(0.3, [1.0]).se is None
    assert Point.of(0.3, [1.0, -math.inf]).quality == -math.inf
    assert math.isnan(Point.of(0.3, [1.0, math.nan]).quality)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"rho": 0.0}, "rho is 0.0"),
        ({"step": 0.0}, "step is 0.0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"grid": ()}, "needs a finite value"),
        ({"grid": (-0.1, 0.5)}, "none below"),
        ({"grid": (0.1, math.inf)}, "finite"),
        ({"grid": (0.1, 50.0)}, "fractions between 0 and 1"),
        ({"chance": 90.0}, "not above chance"),
        ({"eps": 80.0}, "use a smaller eps"),
    ],
)
def test_errors_say_what_to_do(options: dict[str, object], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        essential_sparsity(broken, **({"eps": 1.0} | options))  # type: ignore[arg-type]


def test_dense_quality_must_make_sense() -> None:
    with pytest.raises(BillhookError, match="no curve"):
        essential_sparsity(lambda s, seed: math.nan, eps=1.0)
    with pytest.raises(BillhookError, match="vocabulary size"):
        essential_sparsity(lambda s, seed: -3.5, eps=1.0, eps_mode="relative")
    with pytest.raises(BillhookError, match=r"0\.01 for one point"):
        essential_sparsity(lambda s, seed: 0.8, eps=1.0)
