"""Sparse model soups: several retrainings of one pruned network, averaged; and IMP, which retrains once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from billhook.analysis.stability import apart, spread
from billhook.declared import Paper
from billhook.errors import BillhookError
from billhook.surgery.batchnorm import recalibrate_norms
from billhook.training import schedules
from billhook.training.merge import greedy_soup, merge_state_dicts
from billhook.training.norms import estimating, running_norms
from billhook.training.runs import Evaluate, Outcome, Runs, SeveralRuns, in_rounds, procedure
from billhook.training.store import State, restore, snapshot
from billhook.training.stretch import Stretch, Train

RETRAINING = "Learning rate of the retraining: linear, adaptive linear or cyclic restart (llr, allr, clr), low and "


class _Phases(SeveralRuns):
    """Prune by magnitude, retrain, and again."""

    phases: int | None = Field(
        None, ge=1, description="Times of pruning and retraining; 1 below 90 % sparsity and 3 above, unless given."
    )
    length: float = Field(0.3, gt=0, description="Length of a retraining, as a multiple of the usual training.")
    schedule: Literal["llr", "allr", "clr", "ft", "lrw", "slr"] = Field(
        "llr",
        description=RETRAINING + "constant (ft), or the training's own: its last part (lrw), or all of it (slr).",
    )
    low: float = Field(0.01, gt=0, le=1, description="Lowest learning rate (ft, clr), as a part of the peak.")
    recalibrate: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Part of a retraining whose batches re-estimate statistics of BatchNorm; 0 leaves them.",
    )

    @property
    def candidates_per_phase(self) -> int:
        return 1

    @property
    def varied(self) -> str:
        """What of a stretch differs between candidates."""
        return "seed"

    def stretches(self, damage: float, removed: float) -> list[Stretch]:
        """The retraining of each candidate.

        Args:
            damage: ‖θ − θ_pruned‖ / ‖θ‖; removed: fraction of the present weights that was removed.
        """
        return [self.retraining(self.length, 1.0, self.seed, damage, removed)]

    def counts(self, present: int, total: int) -> list[int]:
        return in_rounds(present, self.left(total), self.phases or (1 if self.sparsity < 0.9 else 3))

    def retraining(self, length: float, peak: float, seed: int, damage: float, removed: float) -> Stretch:
        """A retraining by `schedule`, `peak` times as high and `length` times as long as the usual training."""
        if self.schedule == "lrw":
            return Stretch(1 - min(length, 1.0), 1.0, length=max(length, 1.0), seed=seed)
        if self.schedule == "slr":
            return Stretch(length=length, seed=seed)
        if self.schedule == "allr":
            peak *= schedules.allr_peak(damage, removed, length)
        shape: dict[str, Callable[[float], float]] = {
            "llr": schedules.llr,
            "allr": schedules.llr,
            "clr": lambda t: schedules.clr(t, self.low),
            "ft": lambda t: schedules.ft(t, self.low),
        }
        factor = shape[self.schedule]
        return Stretch(length=length, seed=seed, rate=lambda t: peak * factor(t))

    def check(self, evaluate: Evaluate | None) -> None:
        """Refuse what cannot work without a score, before any work is done."""

    def run(
        self,
        model: nn.Module,
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        batches: Iterable[Any] | None = None,
        out: str | Path | None = None,
        keep: bool = False,
    ) -> Outcome:
        """Prune and retrain a trained network, in place.

        Args:
            model: trained; its zeros stay.
            train: called as train(model, stretch) for each retraining. It has to follow `stretch.rate` where there is
                one, and `stretch.seed`.
            evaluate: score of a model on data set aside for it, higher is better.
            batches: inputs that re-estimate statistics of BatchNorm, each a tensor or a tuple that begins with one;
                iterated anew every time. Without them `train` is called at a learning rate of 0.
            out: folder for finished retrainings; the same call goes on where a killed one stopped. It also keeps
                candidates out of memory.
            keep: the weights of every retraining, not only what going on needs.

        Raises:
            BillhookError: nothing to prune, a sparsity that is not above the present one or that a layer cannot reach,
                a training that changes nothing, diverges or does not follow `stretch`, a folder of another run.
        """
        self.check(evaluate)
        if batches is not None and iter(batches) is batches:
            raise BillhookError("batches are needed again after every retraining: give a list or a loader.")
        runs = Runs(self, model, train, evaluate, out)
        number = self.candidates_per_phase
        with runs.working(1 + runs.rounds * (number + 1)):
            if not runs.resume("start"):
                runs.keep("start")
            before = "start"
            for phase in range(1, runs.rounds + 1):
                end = f"phase-{phase}"
                candidates = [f"{end}-candidate-{j}" for j in range(number)]
                if runs.store.has(end):
                    for name in (*candidates, end):
                        runs.resume(name)
                else:
                    self._phase(runs, phase, before, end, candidates, batches)
                for name in () if keep else (before, *candidates):
                    runs.store.drop(name)
                before = end
            runs.load(before)
        return Outcome(model, runs.masks, runs.report(), runs.store)

    def _phase(
        self,
        runs: Runs,
        phase: int,
        before: str,
        end: str,
        candidates: list[str],
        batches: Iterable[Any] | None,
    ) -> None:
        """Prune the last phase's result, retrain copies of it, and keep their average."""
        runs.load(before)
        there, whole = runs.active, _norm(runs.model)
        runs.prune(phase)
        damage = abs(whole**2 - _norm(runs.model) ** 2) ** 0.5 / (whole or 1.0)
        masks = runs.masks
        stretches = self.stretches(damage, 1 - runs.active / there)
        for j, (name, stretch) in enumerate(zip(candidates, stretches, strict=True)):
            if not runs.resume(name):
                runs.load(before)
                runs.fit(name, stretch, lambda: self._settle(runs, batches))
            runs.masks = masks
            if j and _equal(runs.store.state(candidates[0]), runs.store.state(name), masks):
                raise BillhookError(
                    f"Retrainings 0 and {j} ended in the same weights, so that their average is nothing new: train "
                    f"must follow stretch.{self.varied}."
                )
        self._serve(runs, end, candidates, batches)

    def _serve(self, runs: Runs, name: str, candidates: list[str], batches: Iterable[Any] | None) -> None:
        """The phase's result: of a single candidate, the candidate."""
        runs.load(candidates[0])
        runs.keep(name, score=runs.store.record(candidates[0])["score"])

    def _settle(self, runs: Runs, batches: Iterable[Any] | None) -> None:
        """Re-estimate statistics of BatchNorm, if there is any."""
        if not running_norms(runs.model) or not self.recalibrate:
            return
        if batches is not None:
            recalibrate_norms(runs.model, batches)
            return
        still = Stretch(0.0, self.recalibrate, length=self.length, seed=self.seed, rate=lambda t: 0.0)
        with estimating(runs.model):
            runs.train(still, "re-estimating BatchNorm", frozen=True)


@procedure("imp")
class IMP(_Phases):
    title = "Iterative magnitude pruning"
    paper = None
    summary = "Removes the smallest weights of a trained network, retrains what is left, and again."
    when = "The baseline of a soup. With fold = the soup's candidates it does the soup's work, one step after another."

    fold: float = Field(1.0, ge=1, description="Factor on the length of every retraining.")

    def stretches(self, damage: float, removed: float) -> list[Stretch]:
        return [self.retraining(self.length * self.fold, 1.0, self.seed, damage, removed)]


@procedure("sparse-model-soup")
class SparseModelSoup(_Phases):
    title = "Sparse model soups"
    paper = Paper(
        "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
        "M. Zimmer, C. Spiegel, S. Pokutta",
        "ICLR 2024",
        "2306.16788",
    )
    summary = "Retrains one pruned network several times under one mask, and goes on with the average of the weights."
    when = (
        "To win accuracy at a given sparsity and inference cost, where retrainings can run side by side. IMP with as "
        "many times longer retraining is the fair opponent and may be as good."
    )

    candidates: int = Field(3, ge=1, description="Retrainings of every phase.")
    vary: Literal["seed", "length", "peak"] = Field(
        "seed", description="What differs between them: data order, length, or peak learning rate."
    )
    values: list[float] | None = Field(
        None, description="Factor on the length or on the peak of every candidate; only with vary=length or peak."
    )
    merge: Literal["uniform", "greedy"] = Field(
        "uniform", description="Average all, or only those that do not lower the score."
    )

    @model_validator(mode="after")
    def _varied(self) -> SparseModelSoup:
        if (self.values is None) != (self.vary == "seed"):
            raise ValueError("values belong to vary=length or vary=peak, one per candidate")
        if self.values is not None and (len(set(self.values)) != self.candidates or min(self.values) <= 0):
            raise ValueError(f"values={self.values} must be {self.candidates} different positive numbers")
        if self.vary == "peak" and self.schedule in ("lrw", "slr"):
            raise ValueError(f"schedule={self.schedule} is the training's own, so its peak cannot vary")
        return self

    @property
    def candidates_per_phase(self) -> int:
        return self.candidates

    @property
    def varied(self) -> str:
        return {"seed": "seed", "length": "length", "peak": "rate"}[self.vary]

    def stretches(self, damage: float, removed: float) -> list[Stretch]:
        result = []
        for j in range(self.candidates):
            factor = self.values[j] if self.values is not None else 1.0
            seed = self.seed + j if self.vary == "seed" else self.seed
            length = self.length * (factor if self.vary == "length" else 1.0)
            result.append(self.retraining(length, factor if self.vary == "peak" else 1.0, seed, damage, removed))
        return result

    def check(self, evaluate: Evaluate | None) -> None:
        if self.merge == "greedy" and evaluate is None:
            raise BillhookError("merge=greedy chooses by score: give evaluate, on data that were set aside for it.")

    def _serve(self, runs: Runs, name: str, candidates: list[str], batches: Iterable[Any] | None) -> None:
        states = [runs.store.state(candidate) for candidate in candidates]
        masks = [runs.store.masks(candidate, runs.weights) for candidate in candidates]

        def serve(chosen: list[int]) -> Any:
            restore(runs.model, merge_state_dicts([states[j] for j in chosen], None, [masks[j] for j in chosen]))
            self._settle(runs, batches)
            return runs.score()

        scores = [runs.store.record(candidate)["score"] for candidate in candidates]
        chosen = list(range(len(candidates)))
        if self.merge == "greedy":
            chosen, _ = greedy_soup(scores, serve)
        score = serve(chosen)
        soup = snapshot(runs.model)
        facts: dict[str, Any] = {
            "chosen": chosen,
            "candidate_scores": scores,
            "apart": spread(states, masks[0]),
            "from_soup": [apart(soup, state, masks[0]).l2 for state in states],
        }
        if score is not None:
            mean = sum(scores) / len(scores)
            facts |= {"mean_candidate": mean, "best_candidate": max(scores)}
            if score < mean:
                runs.note(
                    f"{name}: the soup scores {score:.4g} and its candidates {mean:.4g} on average: they have left "
                    "their common basin; lower the learning rate or shorten the retraining."
                )
        runs.keep(name, score=score, **facts)


@torch.no_grad()
def _norm(model: nn.Module) -> float:
    """‖θ‖ over all parameters."""
    return float(sum(p.detach().double().square().sum().item() for p in model.parameters()) ** 0.5)


def _equal(first: State, second: State, names: Iterable[str]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in names)
