"""What methods of several runs share: counts, resuming, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.training import Stretch
from billhook.training.runs import RUNS, fewer, in_rounds, proportional
from billhook.training.schedules import allr_peak, clr, ft, llr, lrw, slr
from billhook.training.store import snapshot
from runs import Training, accuracy, batch, net, schedule

METHODS: dict[str, dict[str, Any]] = {
    "imp-rewind": {"sparsity": 0.8, "per_round": 0.4, "rewind_to": 0.1},
    "imp": {"sparsity": 0.8, "phases": 2},
    "sparse-model-soup": {"sparsity": 0.8, "phases": 2, "candidates": 2},
}


@given(st.integers(10, 5000), st.floats(0.01, 0.99), st.floats(0.05, 0.9))
def test_proportional_counts(present: int, part: float, fraction: float) -> None:
    left = max(1, round(present * part))
    counts = proportional(present, left, fraction)
    assert counts[0] == present
    assert counts[-1] == min(left, present)
    for before, after in pairwise(counts[:-1]):
        assert after == before - math.ceil(round(fraction * before, 6))


def test_a_round_removes_one_weight_at_least() -> None:
    assert proportional(10, 7, 1e-9) == [10, 9, 8, 7]


def test_counts_in_rounds() -> None:
    assert in_rounds(10_000, 200, 3) == [10_000, 2714, 737, 200]
    assert in_rounds(10_000, 1000, 3) == [10_000, 4642, 2154, 1000]
    assert in_rounds(10_000, 2000, 1) == [10_000, 2000]
    keep = (1 - 0.98) ** (1 / 3)
    assert abs(keep**3 - 0.02) < 1e-12


def test_selection_is_a_sort_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randint(-3, 4, (5, 6), generator=generator).float(),
        "b": torch.randn(4, 5, generator=generator),
    }
    weights["b"] = (weights["b"] * 2).round()
    masks = {n: torch.rand(w.shape, generator=generator) > 0.2 for n, w in weights.items()}
    present = torch.cat([m.flatten() for m in masks.values()])
    flat = torch.cat([w.flatten().abs() for w in weights.values()])
    for left in (1, 7, 20, 33):
        found = fewer(weights, masks, {"": left})
        kept = torch.cat([m.flatten() for m in found.values()])
        assert int(kept.sum()) == left
        assert not bool((kept & ~present).any())
        order = sorted((i for i in range(50) if present[i]), key=lambda i: -float(flat[i]))
        assert sorted(flat[kept].tolist()) == sorted(float(flat[i]) for i in order[:left])
    layered = fewer(weights, masks, {"a": 3, "b": 5})
    assert [int(m.sum()) for m in layered.values()] == [3, 5]


class TestSchedules:
    def test_llr(self) -> None:
        assert llr(0.0) == 0
        assert llr(0.1) == 1
        assert llr(1.0) == 0
        after = [llr(0.1 + 0.09 * i) for i in range(11)]
        assert after == pytest.approx([1 - i / 10 for i in range(11)])
        assert llr(0.05) == pytest.approx(0.5)
        assert 0 < llr(0.02) < 0.2  # flat at first, like a cosine

    def test_others(self) -> None:
        assert ft(0.3, 0.01) == 0.01
        assert clr(0.0, 0.01) == 0
        assert clr(0.1, 0.01) == 1
        assert clr(0.55, 0.01) == pytest.approx(0.505)
        assert clr(1.0, 0.01) == pytest.approx(0.01)
        assert lrw(0.0, lambda t: t, 0.3) == pytest.approx(0.7)
        assert lrw(1.0, lambda t: t, 0.3) == 1
        assert slr(0.1, schedule) == 1
        assert slr(0.05, schedule) == pytest.approx(0.5)
        assert slr(0.54, schedule) == 1
        assert slr(0.56, schedule) == 0.1  # half of what the warm-up leaves is over

    def test_allr(self) -> None:
        assert allr_peak(0.0, 0.5, 0.3) == 0.3  # nothing was damaged
        assert allr_peak(0.9, 0.25, 0.3) == 1
        assert allr_peak(0.3, 0.25, 0.1) == pytest.approx(0.6)
        assert allr_peak(0.0, 0.0, 0.3) == 0.3
        assert allr_peak(0.0, 0.5, 4.0) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    method = RUNS.make(name, **METHODS[name])
    whole = net()
    training = Training(steps=20)
    expected = method.run(whole, training, evaluate=accuracy)  # type: ignore[attr-defined]
    calls = len(training.stretches)
    assert calls >= 4
    for stop in range(calls):
        out = tmp_path / str(stop)
        killed = Training(steps=20)
        killed.stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            method.run(net(), killed, evaluate=accuracy, out=out)  # type: ignore[attr-defined]
        model, rest = net(), Training(steps=20)
        torch.rand(stop + 1)  # another global random state
        result = method.run(model, rest, evaluate=accuracy, out=out)  # type: ignore[attr-defined]
        # BatchNorm is re-estimated within a part, so such a part may be done again as a whole
        assert calls - stop <= len(rest.stretches) <= calls - stop + 1
        for (key, one), two in zip(snapshot(whole).items(), snapshot(model).values(), strict=True):
            assert torch.equal(one, two), (stop, key)
        assert all(torch.equal(m, result.masks[n]) for n, m in expected.masks.items())
        wanted, found = (
            [{k: v for k, v in part.items() if k != "seconds"} for part in r.report["parts"]]
            for r in (expected, result)
        )
        assert wanted == found
        assert json.loads((out / "report.json").read_text())["sparsity"] == pytest.approx(0.8, abs=2e-3)
    finished, none = net(), Training(steps=20)
    method.run(finished, none, evaluate=accuracy, out=tmp_path / "0")  # type: ignore[attr-defined]
    assert not none.stretches
    assert all(torch.equal(a, b) for a, b in zip(snapshot(whole).values(), snapshot(finished).values(), strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [False, True])
def test_only_what_going_on_needs_is_kept(name: str, keep: bool, tmp_path: Path) -> None:
    method = RUNS.make(name, **METHODS[name])
    result = method.run(net(), Training(), out=tmp_path, keep=keep)  # type: ignore[attr-defined]
    weights = {p.name.split(".")[0] for p in tmp_path.glob("*.safetensors") if ".masks" not in p.name}
    parts = [part["part"] for part in result.report["parts"]]
    assert {p.name.split(".")[0] for p in tmp_path.glob("*.masks.safetensors")} == set(parts)
    needed = {"imp-rewind": {"start", "rewind", parts[-1]}}.get(name, {parts[-1]})
    assert weights == (set(parts) if keep else needed)
    if not keep:
        gone = next(part for part in parts if part not in needed)
        with pytest.raises(BillhookError, match=f"weights of {gone} were not kept"):
            result.store.state(gone)


def test_global_random_numbers_are_the_stretchs_and_the_callers_stay() -> None:
    drawn: dict[tuple[int, float], list[float]] = {}

    def train(model: nn.Module, stretch: Stretch) -> None:
        drawn.setdefault((stretch.seed, stretch.start), []).append(float(torch.rand(())))
        with torch.no_grad():
            next(model.parameters()).add_(0.1)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    bh.IMPRewind(sparsity=0.8, rounds=2, rewind_to=0.1).run(model := net(norm=False), train)
    assert isinstance(model, nn.Module)
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
    assert len(drawn[0, 0.1]) == 3
    assert len(set(drawn[0, 0.1])) == 1
    assert drawn[0, 0.0] != drawn[0, 0.1][:1]


class TestRefusals:
    method = bh.IMPRewind(sparsity=0.8, rounds=1, rewind_to=0.1)

    def test_training_that_does_not_train(self) -> None:
        with pytest.raises(BillhookError, match=r"rewind \(0 to 0\.1 of the training\) every weight is what it was"):
            self.method.run(net(), lambda model, stretch: None)
        with pytest.raises(BillhookError, match="at least one step"):
            bh.IMPRewind(sparsity=0.8, rewind_to=0.001).run(net(), Training())

    def test_training_that_diverges(self) -> None:
        def train(model: nn.Module, stretch: Stretch) -> None:
            with torch.no_grad():
                model.get_parameter("3.weight").fill_(float("nan") if stretch.stop == 1 else 0.5)

        with pytest.raises(BillhookError, match=r"After level-00 .* 3\.weight is not finite: lower the learning rate"):
            self.method.run(net(), train)

    def test_training_that_replaces_parameters(self) -> None:
        def train(model: Any, stretch: Stretch) -> None:
            model[0] = nn.Linear(8, 16)

        with pytest.raises(BillhookError, match="must not replace parameters"):
            self.method.run(net(), train)

    @pytest.mark.parametrize(
        ("sparsity", "message"),
        [(0.5, r"at sparsity 0\.5 already, and 0\.5 is not above"), (0.3, "0.3 is not above"), (0.0, "0 is not above")],
    )
    def test_a_sparsity_that_is_there_already(self, sparsity: float, message: str) -> None:
        model = net()
        bh.IMP(sparsity=0.5, phases=1).run(model, Training())
        for method in (bh.IMP, bh.SparseModelSoup, bh.IMPRewind):
            with pytest.raises(BillhookError, match=message):
                method(sparsity=sparsity).run(model, Training())

    def test_zeros_of_the_model_stay(self) -> None:
        model = net()
        first = bh.IMP(sparsity=0.5, phases=1).run(model, Training())
        second = bh.IMPRewind(sparsity=0.7, rounds=1, rewind_to=0.1).run(model, Training())
        assert second.sparsity == pytest.approx(0.7, abs=2e-3)
        assert all(not bool((second.masks[n] & ~m).any()) for n, m in first.masks.items())

    def test_a_layer_that_starts_at_zero_is_not_pruned(self) -> None:
        model = net()
        nn.init.zeros_(model.get_parameter("5.weight"))
        seen: list[bool] = []
        training = Training()
        training.after_step = lambda m: seen.append(bool(m.get_parameter("5.weight").any()))
        bh.IMPRewind(sparsity=0.5, rounds=1, rewind_to=0.1).run(model, training)
        assert seen[0]

    def test_nothing_left(self) -> None:
        with pytest.raises(BillhookError, match="The model has 368 prunable weights and would keep none"):
            bh.IMP(sparsity=0.999).run(net(), Training())
        with pytest.raises(BillhookError, match=r"5\.weight has 48 prunable weights.*or exclude it"):
            bh.IMP(sparsity=0.99, scope="layer").run(net(), Training())

    def test_unfit_models(self) -> None:
        frozen = net()
        frozen.get_parameter("0.weight").requires_grad_(False)
        with pytest.raises(BillhookError, match=r"0\.weight is frozen"):
            self.method.run(frozen, Training())
        broken = net()
        with torch.no_grad():
            broken.get_parameter("0.bias").fill_(float("inf"))
        with pytest.raises(BillhookError, match=r"0\.bias is not finite before any training"):
            self.method.run(broken, Training())

    @pytest.mark.parametrize("train", [None, 3, lambda model: None, lambda: None])
    def test_unusable_functions(self, train: Any) -> None:
        with pytest.raises(BillhookError, match=r"cannot be called as train\(model, stretch\)"):
            self.method.run(net(), train)

    @pytest.mark.parametrize(
        ("evaluate", "message"),
        [
            (lambda: 1, "cannot be called as evaluate"),
            (lambda model: "good", "evaluate returned str"),
            (lambda model: float("nan"), "evaluate returned nan"),
        ],
    )
    def test_unusable_scores(self, evaluate: Callable[..., Any], message: str) -> None:
        with pytest.raises(BillhookError, match=message):
            self.method.run(net(), Training(), evaluate=evaluate)

    def test_foreign_folders(self, tmp_path: Path) -> None:
        self.method.run(net(), Training(), out=tmp_path)
        with pytest.raises(BillhookError, match=r"a run with method = imp-rewind\(sparsity=0\.8.*give another folder"):
            bh.IMPRewind(sparsity=0.7).run(net(), Training(), out=tmp_path)
        with pytest.raises(BillhookError, match="with initial weights = "):
            self.method.run(net(seed=3), Training(), out=tmp_path)
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(BillhookError, match="cannot be a folder"):
            self.method.run(net(), Training(), out=file)

    def test_options(self) -> None:
        with pytest.raises(BillhookError, match=r"has no option 'rewind_step'.*did you mean"):
            bh.IMPRewind(rewind_step=3)
        with pytest.raises(BillhookError, match="values"):
            bh.SparseModelSoup(vary="length")
        with pytest.raises(BillhookError, match="3 different positive"):
            bh.SparseModelSoup(vary="length", values=[1.0, 1.0, 2.0])
        with pytest.raises(BillhookError, match="peak cannot vary"):
            bh.SparseModelSoup(vary="peak", values=[1.0, 2.0, 3.0], schedule="slr")
        with pytest.raises(BillhookError, match="procedure"):
            RUNS.make("nope")


def test_batches_of_equal_seeds_are_equal() -> None:
    assert torch.equal(batch(3, 1)[0], batch(3, 1)[0])
    assert not torch.equal(batch(3, 1)[0], batch(3, 2)[0])
