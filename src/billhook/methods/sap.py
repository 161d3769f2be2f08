"""SAP: lottery tickets whose every pruning removes as much as the PQ index of the trained weights allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.sparsity.inequality import pq_index
from billhook.sparsity.pqi import PAPER, excess, least_kept, removals, removals_to
from billhook.training.masks import Masks, among_active, keep_globally, keep_in_layer
from billhook.training.prunable import TRANSPOSED, prunable
from billhook.training.runs import Evaluate, Outcome, Runs, SeveralRuns, procedure
from billhook.training.runs import present as present_weights
from billhook.training.stretch import Stretch, Train


@procedure("sap")
class SAP(SeveralRuns):
    title = "SAP"
    paper = PAPER
    summary = (
        "Trains, prunes every unit by as much as the PQ index of its weights allows, puts the rest back to their "
        "initial values, and begins again."
    )
    when = (
        "Where the weights shall decide how much goes, and where: units of unequal weights lose more, flat ones less. "
        "One training per iteration. After a short training or little weight decay it slows down early; gamma speeds "
        "it up."
    )

    sparsity: float | None = Field(  # type: ignore[assignment]
        None, gt=0, lt=1, description="Where it ends, by a smaller last step; a result of the weights unless given."
    )
    scope: Literal["neuron", "layer", "global"] = Field(  # type: ignore[assignment]
        "layer", description="What has an amount of its own: each output neuron, each layer, or the network."
    )
    p: float = Field(0.5, gt=0, description="Smaller norm of the PQ index.")
    q: float = Field(1.0, gt=0, description="Larger norm of the PQ index; p=1 with q=2 prunes much harder.")
    eta: float = Field(0.0, ge=0, description="Mass of the dropped weights over that of the kept ones, in the bound.")
    gamma: float = Field(1.0, ge=0, description="How many times what the bound lets go is removed.")
    beta: float = Field(0.9, gt=0, lt=1, description="No unit loses more than this share of its weights at once.")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Remove this share of every unit instead: plain lottery tickets, to compare with."
    )
    iterations: int = Field(15, ge=1, description="How often weights are removed at most.")
    rewind_to: float = Field(
        0.0, ge=0, lt=1, description="Where in the training weights go back to; 0 is their initial values."
    )
    stop_density: float | None = Field(None, gt=0, lt=1, description="End with the first density not above this.")
    stop_on_rise: float | None = Field(
        None, ge=0, description="End when the network's PQ index is more than this above its lowest so far."
    )

    @model_validator(mode="after")
    def _norms(self) -> SAP:
        if self.p >= self.q:
            raise ValueError(f"p={self.p:g} is not below q={self.q:g}")
        return self

    def counts(self, present: int, total: int) -> list[int]:
        return [present]  # nothing is planned: every iteration asks the weights

    def run(
        self, model: nn.Module, train: Train, *, evaluate: Evaluate | None = None, out: str | Path | None = None
    ) -> Outcome:
        """Train and prune a network in turns.

        Biases and norms go back with the weights. The training function makes a fresh optimizer, so momentum starts
        from zero every time.

        Args:
            model: at its initialisation; ends as trained after the last pruning.
            train: called as train(model, stretch) once per iteration.
            evaluate: score of a model, higher is better; called after every iteration.
            out: folder for finished iterations; the same call goes on where a killed one stopped.

        Returns:
            the trained network. Each level in `report["parts"]` has the PQ index of its trained weights:
            `inequality["network"]`, and `inequality["layers"]` by name.

        Raises:
            BillhookError: nothing to prune, a sparsity that is not above the present one, a training that changes
                nothing or diverges, a folder of another run.

        Source: algorithm 1.
        """
        runs = Runs(self, model, train, evaluate, out, present_weights(prunable(model, self.exclude)))
        if self.sparsity is not None and runs.active <= self.left(runs.total):
            raise BillhookError(
                f"The model is at sparsity {1 - runs.active / runs.total:.4g} already, and {self.sparsity:g} is not "
                "above that: ask for more, or give the dense model."
            )
        with runs.working(self.iterations + 2 + bool(self.rewind_to)):
            point = runs.rewind_point(self.rewind_to)
            level = 0
            while runs.resume(_level(level)):
                level += 1
            if level:
                runs.load(_level(level - 1))
            while level == 0 or self._goes_on(runs, level):
                if level:
                    masks = self.fewer(model, runs.weights, runs.masks)
                    if all(torch.equal(masks[name], mask) for name, mask in runs.masks.items()):
                        runs.note(f"After level {level - 1} no weight may go: raise gamma, or use p=1 and q=2.")
                        break
                    runs.masks = masks
                runs.load(point)
                self._fit(runs, level)
                if level:
                    runs.store.drop(_level(level - 1))
                level += 1
        if self.sparsity is not None and runs.active > self.left(runs.total):
            runs.note(
                f"Sparsity {self.sparsity:g} was not reached within {level - 1} prunings: raise iterations or gamma."
            )
        return Outcome(model, runs.masks, runs.report(), runs.store)

    def _fit(self, runs: Runs, level: int) -> None:
        found: dict[str, Any] = {}  # filled when the weights are trained, before they are kept

        def after() -> None:
            found.update(self.indices(runs.weights, runs.masks))

        runs.fit(_level(level), Stretch(self.rewind_to, 1.0, seed=self.seed), after, inequality=found)

    def _goes_on(self, runs: Runs, level: int) -> bool:
        if level > self.iterations or (self.sparsity is not None and runs.active <= self.left(runs.total)):
            return False
        if self.stop_density is not None and runs.active <= self.stop_density * runs.total:
            return False
        if self.stop_on_rise is not None:
            seen = [part["inequality"]["network"] for part in runs.parts if "inequality" in part]
            if seen[-1] > min(seen) + self.stop_on_rise:
                runs.note(f"The PQ index rose from {min(seen):.4f} to {seen[-1]:.4f}: capacity gets short.")
                return False
        return True

    # -- mathematics ----------------------------------------------------------------------------------------

    def indices(self, weights: dict[str, nn.Parameter], masks: Masks) -> dict[str, Any]:
        """The PQ index of the weights that are there, of the network and of each layer."""
        layers = {name: float(pq_index(weight, self.p, self.q, masks[name])) for name, weight in weights.items()}
        return {"network": float(pq_index(weights, self.p, self.q, masks)), "layers": layers}

    def amounts(self, size: Tensor, index: Tensor, most: int) -> Tensor:
        """How many weights each unit loses.

        Args:
            size, index: weights of each unit, and their PQ index.
            most: of all units together.

        Returns:
            int64, shaped like size.
        """
        if self.fraction is None:
            share = self.gamma * excess(size, least_kept(size, index, self.p, self.q, self.eta))
        else:
            share = torch.full(size.shape, self.fraction, dtype=torch.float64)
        counts = removals(size, share, beta=self.beta)
        return counts if int(counts.sum()) <= most else removals_to(most, size, share, self.beta)

    @torch.no_grad()
    def fewer(self, model: nn.Module, weights: dict[str, nn.Parameter], masks: Masks) -> Masks:
        """The next masks, nested in the present ones, by the magnitudes of the trained weights."""
        active = sum(int(mask.sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        most = active - (0 if self.sparsity is None else self.left(total))
        sizes = {name: weight.detach().abs() for name, weight in weights.items()}
        if self.scope == "global":
            whole = pq_index(sizes, self.p, self.q, masks).cpu().reshape(1)
            return keep_globally(sizes, masks, active - int(self.amounts(torch.tensor([active]), whole, most)))

        def units(name: str, tensor: Tensor) -> Tensor:
            return tensor.reshape(1, -1) if self.scope == "layer" else _rows(model, name, tensor)

        present = [units(name, mask).sum(1).cpu() for name, mask in masks.items()]
        index = [pq_index(units(n, sizes[n]), self.p, self.q, units(n, masks[n]), dim=1).cpu() for n in masks]
        counts = self.amounts(torch.cat(present), torch.cat(index), most)
        gone = torch.split(counts, [len(part) for part in present])
        result: Masks = {}
        for (name, mask), there, count in zip(masks.items(), present, gone, strict=True):
            if self.scope == "layer":
                result[name] = keep_in_layer(sizes[name], mask, int(there - count))
            else:
                kept = keep_in_rows(units(name, sizes[name]), units(name, mask), count.to(mask.device))
                result[name] = _of_rows(model, name, kept, mask.shape)
        return result


def keep_in_rows(scores: Tensor, mask: Tensor, remove: Tensor) -> Tensor:
    """The mask without the `remove[i]` smallest scores of row i, among the weights that are there.

    Args:
        scores, mask: [rows, n].
        remove: int64 [rows].
    """
    order = among_active(scores, mask).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank >= ((~mask).sum(1) + remove)[:, None]


def _rows(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight, or its mask, as [out, n]: what feeds an output neuron in a row."""
    groups = _groups_if_transposed(model, name)
    if not groups:
        return tensor.flatten(1)
    parts = tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1)
    return parts.transpose(1, 2).reshape(groups * tensor.shape[1], -1)


def _of_rows(model: nn.Module, name: str, rows: Tensor, shape: torch.Size) -> Tensor:
    """What `_rows` was given."""
    groups = _groups_if_transposed(model, name)
    if not groups:
        return rows.view(shape)
    return rows.view(groups, shape[1], shape[0] // groups, -1).transpose(1, 2).reshape(shape)


def _groups_if_transposed(model: nn.Module, name: str) -> int:
    """Groups of a layer whose weight is [in, out / groups, *kernel]; 0 for [out, in / groups, *kernel]."""
    module = model.get_submodule(name.rpartition(".")[0])
    return int(getattr(module, "groups", 1)) if isinstance(module, TRANSPOSED) else 0


def _level(index: int) -> str:
    return f"level-{index:02d}"
