"""DSnoT's swaps against their definition, written out row by row."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import billhook as bh
from billhook.calibrate.statistics import Moments, SequenceMoments
from billhook.sparsity.dsnot import cycles_for, dsnot
from billhook.sparsity.patterns import NM, Unstructured
from billhook.sparsity.saliency import wanda
from tiny import batches_for, build, site_weights


def moments_of(x: Tensor) -> Moments:
    statistic = SequenceMoments(x.shape[-1], torch.device("cpu"))
    for sequence in x:
        statistic.update(sequence[None])
    return statistic.result()


def problem(seed: int, rows: int = 6, columns: int = 24, tokens: int = 40) -> tuple[Tensor, Tensor, Moments, Tensor]:
    """Weight, per-row Wanda mask at 50%, moments, inputs [sequences, tokens, columns] with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    scale = 0.2 + torch.rand(columns, generator=generator)
    x = (torch.randn(3, tokens, columns, generator=generator) + torch.randn(columns, generator=generator)) * scale
    keep = Unstructured("row").keep(wanda(w, x.reshape(-1, columns).norm(dim=0)), 0.5)
    return w, keep, moments_of(x), x


def reference(
    w: Tensor, keep: Tensor, m: Moments, cycles: int, threshold: float, power: float, overshoot: bool, nm: NM | None
) -> Tensor:
    """The definition for one row at a time, in float64, with sets of candidates."""
    result = keep.clone()
    for r in range(len(w)):
        c = (w[r].double() * m.token_sum.double()).tolist()
        v = m.within_variance.double().clamp(min=1e-12).tolist()
        importance = (w[r].double().abs() * m.square_sum.double().sqrt()).tolist()
        pruned = {j for j in range(w.shape[1]) if not keep[r, j]}
        kept = set(range(w.shape[1])) - pruned
        alive = {j for j in pruned if m.square_sum[j] > 0}
        error = sum(c[j] for j in pruned)
        first = error
        for _ in range(cycles):
            if abs(error) <= threshold * m.length / 2048 or not alive:
                break
            sign = 1 if error > 0 else -1
            grow = max(alive, key=lambda j: (sign * c[j] / v[j] ** power, -j))
            if nm is None:
                candidates = {j for j in kept if sign * c[j] < 0}
            else:
                candidates = {j for j in kept if j // nm.m == grow // nm.m}
            if sign * c[grow] <= 0 or not candidates:
                if nm is None:
                    break
                alive.discard(grow)
                continue
            drop = min(candidates, key=lambda j: (importance[j], j))
            after = error + c[drop] - c[grow]
            refused = (nm is not None or not overshoot) and after * first <= 0
            if refused and nm is None:
                break
            alive.discard(grow)
            kept.discard(drop)
            if refused:
                continue
            result[r, grow], result[r, drop] = True, False
            error = after
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cycles=st.integers(0, 12),
    threshold=st.sampled_from([0.0, 0.1, 5.0, 1e9]),
    power=st.sampled_from([0.0, 1.0]),
    overshoot=st.booleans(),
    pattern=st.sampled_from([None, NM(2, 4), NM(4, 8)]),
)
def test_equals_the_definition(
    seed: int, cycles: int, threshold: float, power: float, overshoot: bool, pattern: NM | None
) -> None:
    w, keep, m, _ = problem(seed)
    if pattern is not None:
        keep = pattern.keep(wanda(w, m.square_sum.sqrt()), 0.5)
    got = dsnot(w, keep, m, cycles=cycles, threshold=threshold, variance_power=power, overshoot=overshoot, nm=pattern)
    expected = reference(w, keep, m, cycles, threshold, power, overshoot, pattern)
    assert torch.equal(got.keep, expected)
    # sparsity of every row, and of every group, is what it was
    assert torch.equal(got.keep.sum(dim=1), keep.sum(dim=1))
    if pattern is not None:
        assert (got.keep.reshape(len(w), -1, pattern.m).sum(dim=2) == pattern.n).all()
    # the running error is the error of the final mask; each swap moved two weights, none of them twice
    final = (w * m.token_sum * ~got.keep).sum(dim=1)
    torch.testing.assert_close(got.after, final, rtol=1e-4, atol=1e-3)
    assert torch.equal((got.keep != keep).sum(dim=1), 2 * got.swaps)


def test_error_is_the_mean_output_error() -> None:
    w, keep, m, x = problem(3)
    got = dsnot(w, keep, m, cycles=5, threshold=0.0)
    dense_minus_sparse = x @ (w * ~got.keep).T
    torch.testing.assert_close(got.after, dense_minus_sparse.sum(dim=1).mean(dim=0), rtol=1e-4, atol=1e-3)
    careful = dsnot(w, keep, m, cycles=5, threshold=0.0, overshoot=False)
    assert careful.after.abs().mean() < 0.6 * careful.before.abs().mean()


def test_without_overshoot_the_error_falls_and_keeps_its_sign() -> None:
    w, keep, m, _ = problem(5, rows=40)
    previous = dsnot(w, keep, m, cycles=0).after
    for cycles in range(1, 8):
        now = dsnot(w, keep, m, cycles=cycles, threshold=0.0, overshoot=False).after
        assert (now.abs() <= previous.abs() + 1e-4).all()
        assert (torch.sign(now) == torch.sign(previous)).all()
        previous = now


def test_every_swap_moves_the_error_towards_zero_and_no_weight_moves_twice() -> None:
    w, keep, m, _ = problem(5, rows=40)
    contribution = w.double() * m.token_sum.double()
    runs = [dsnot(w, keep, m, cycles=cycles, threshold=0.0) for cycles in range(9)]  # each goes on from the last
    moved = torch.zeros_like(keep)
    crossings = 0
    for old, new in pairwise(runs):
        grown, dropped = new.keep & ~old.keep, old.keep & ~new.keep
        assert torch.equal(grown.sum(dim=1), new.swaps - old.swaps)
        assert torch.equal(dropped.sum(dim=1), new.swaps - old.swaps)
        assert not (moved & (grown | dropped)).any()
        moved |= grown | dropped
        before, after = ((contribution * ~run.keep).sum(dim=1) for run in (old, new))
        swapped = grown.any(dim=1)
        change = (contribution * dropped).sum(dim=1) - (contribution * grown).sum(dim=1)
        assert (torch.sign(before) * change < 0)[swapped].all()
        assert (after.abs() < before.abs() + change.abs())[swapped].all()
        torch.testing.assert_close(after, before + change, rtol=1e-9, atol=1e-9)
        crossings += int((torch.sign(before) * torch.sign(after) < 0).sum())
    assert crossings > 0  # overshoot is allowed


def test_one_swap_in_one_row_is_the_best_of_all_pairs() -> None:
    """Eight weights, four pruned, no variances: every pair of a pruned and a kept weight is looked at."""
    signs = set()
    for seed in range(20):
        w, keep, m, _ = problem(seed, rows=1, columns=8)
        c = (w * m.token_sum)[0].tolist()
        importance = (w.abs() * m.square_sum.sqrt())[0].tolist()
        error = sum(c[j] for j in range(8) if not keep[0, j])
        sign = 1 if error > 0 else -1
        pairs = [
            (-sign * c[grow], importance[drop], grow, drop)
            for grow, drop in product(range(8), range(8))
            if not keep[0, grow] and keep[0, drop] and sign * c[grow] > 0 and sign * c[drop] < 0
        ]
        expected = keep.clone()
        if pairs:
            _, _, grow, drop = min(pairs)
            expected[0, grow], expected[0, drop] = True, False
            signs.add(sign)
        for mirror in (1, -1):
            got = dsnot(mirror * w, keep, m, cycles=1, threshold=0.0, variance_power=0.0)
            assert torch.equal(got.keep, expected)
    assert signs == {1, -1}


def test_mirrored_weights_give_the_same_mask() -> None:
    w, keep, m, _ = problem(7)
    assert torch.equal(dsnot(w, keep, m, cycles=4).keep, dsnot(-w, keep, m, cycles=4).keep)


def test_scale_of_a_row_and_order_of_channels_do_not_matter() -> None:
    w, keep, m, _ = problem(8)
    got = dsnot(w, keep, m, cycles=4, threshold=0.1)
    assert torch.equal(got.keep, dsnot(w * 4, keep, m, cycles=4, threshold=0.4).keep)
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
    moved = Moments(m.token_sum[order], m.square_sum[order], m.within_variance[order], m.length)
    assert torch.equal(got.keep[:, order], dsnot(w[:, order], keep[:, order], moved, cycles=4, threshold=0.1).keep)


def test_nothing_to_do_leaves_the_mask() -> None:
    w, keep, m, _ = problem(9)
    still = Moments(torch.zeros_like(m.token_sum), m.square_sum, m.within_variance, m.length)
    for got in (
        dsnot(w, keep, m, cycles=0),
        dsnot(w, keep, m, cycles=9, threshold=1e9),
        dsnot(w, keep, still, cycles=9),
    ):
        assert torch.equal(got.keep, keep)
        assert int(got.swaps.sum()) == 0


def test_dead_channels_are_never_revived() -> None:
    w, _, _, x = problem(10)
    x[..., :6] = 0.0
    m = moments_of(x)
    keep = Unstructured("row").keep(wanda(w, m.square_sum.sqrt()), 0.5)
    got = dsnot(w, keep, m, cycles=12, threshold=0.0)
    assert not (got.keep[:, :6] & ~keep[:, :6]).any()


def test_equal_variances_make_the_power_irrelevant() -> None:
    w, keep, m, _ = problem(11)
    flat = Moments(m.token_sum, m.square_sum, torch.full_like(m.within_variance, 0.7), m.length)
    a = dsnot(w, keep, flat, cycles=6, variance_power=0.0, threshold=0.0)
    assert torch.equal(a.keep, dsnot(w, keep, flat, cycles=6, variance_power=1.0, threshold=0.0).keep)


def test_moments_are_those_of_the_definition() -> None:
    _, _, _, x = problem(12)
    statistic = SequenceMoments(24, torch.device("cpu"))
    statistic.update(x[:2])
    statistic.update(x[2:])
    m, exact = statistic.result(), x.double()
    torch.testing.assert_close(m.token_sum.double(), exact.sum(1).mean(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(m.square_sum.double(), exact.square().sum(1).mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m.within_variance.double(), exact.var(1, unbiased=False).mean(0), rtol=1e-5, atol=1e-6)
    assert m.length == 40


def test_cycles_follow_the_width() -> None:
    assert cycles_for(4096) == 50
    assert cycles_for(576) == 7
    assert cycles_for(8) == 1


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_refines_the_mask_of_every_method(method: str, pattern: str) -> None:
    """Through the walk: refined matrices change, their counts do not, weights keep their dense values."""
    options = {"pattern": pattern} | ({"scope": "row"} if pattern == "unstructured" else {})
    dense, plain, refined = build("llama"), build("llama"), build("llama")
    batches = batches_for("llama")
    bh.prune(plain, bh.method(method, **options), batches, precision="highest")
    bh.prune(
        refined,
        bh.method(method, **options, refine="dsnot(modules=all, cycles=4, threshold=0)"),
        batches,
        precision="highest",
    )
    before, after, full = site_weights(plain), site_weights(refined), site_weights(dense)
    changed = 0
    for name in before:
        a, b = before[name] != 0, after[name] != 0
        if method != "sparsegpt":
            assert torch.equal(a.sum(dim=1), b.sum(dim=1)), name
            assert torch.equal(after[name][b], full[name][b]), name
        if pattern == "2:4":
            assert (b.reshape(len(b), -1, 4).sum(dim=2) == 2).all()
        changed += int((a != b).sum())
    assert changed > 0


def test_the_default_leaves_the_mlp_alone() -> None:
    plain, refined, batches = build("llama"), build("llama"), batches_for("llama")
    bh.prune(plain, bh.Wanda(), batches, precision="highest")
    bh.prune(refined, bh.Wanda(refine="dsnot(cycles=4, threshold=0)"), batches, precision="highest")
    before, after = site_weights(plain), site_weights(refined)
    same = {name for name in before if torch.equal(before[name] != 0, after[name] != 0)}
    first_block = {name for name in before if ".0." in name}
    assert {name for name in first_block if "mlp" in name} <= same
    assert not {name for name in first_block if "q_proj" in name or "v_proj" in name} <= same
