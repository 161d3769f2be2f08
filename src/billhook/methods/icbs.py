"""iCBS: better masks for the same density, one small binary quadratic problem after another."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from billhook.anatomy import Site
from billhook.calibrate.capture import Batch
from billhook.calibrate.fisher import LossFn, SampleGradients, label_losses, next_token_losses, sample_gradients
from billhook.calibrate.precision import forward_precision
from billhook.calibrate.sensitivity import shortened
from billhook.calibrate.statistics import ColumnNorm
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, SparseMethod, register
from billhook.progress import bar
from billhook.sparsity.patterns import NM
from billhook.sparsity.qubo import block_problem, solve
from billhook.sparsity.saliency import magnitude, ria, wanda

_FEWEST = 16  # tabu is ignored where it would leave fewer candidates than 1/16 of a block on a side


@register("icbs")
class ICBS(SparseMethod):
    title = "iCBS"
    paper = Paper(
        "Scalable iterative pruning of large language and vision models using block coordinate descent",
        "G. Rosenberg, J. K. Brubaker, M. J. A. Schuetz, E. Y. Zhu, S. Kadıoğlu, S. E. Borujeni, H. G. Katzgraber",
        "2024",
        "2411.17796",
    )
    trains = True
    summary = (
        "Starts from another method's mask and exchanges pruned and kept weights block by block, by solving the "
        "second-order model of the loss over which of a block's weights to prune; updates no weight."
    )
    when = (
        "When a better mask is worth minutes to hours: quality grows with the budget. Needs backward passes and two "
        "copies of the model in memory."
    )

    start: Literal["wanda", "magnitude", "ria"] = Field("wanda", description="The method whose mask is improved.")
    budget: str = Field("100 steps", description="Time such as 90s, 10m or 1h, or a number of steps such as 300 steps.")
    variables: int = Field(1024, ge=2, le=4096, description="Weights in a block, half of them pruned.")
    blocks_per_step: int = Field(
        8, ge=1, description="Matrices that get a block each from one backward pass; the paper has 1."
    )
    solver: Literal["swap", "anneal", "local"] = Field("swap", description="Of the blocks' problems.")
    selection: Literal["gradient", "random"] = Field("gradient", description="How a block's weights are chosen.")
    gradient: float = Field(0.75, ge=0, le=1, description="Multiplier of the linear term.")
    ridge: float = Field(1e-3, ge=0, description="Penalty on changed weights, in units of the mean curvature.")
    tabu: float = Field(0.4, ge=0, lt=1, description="Share of the free weights that wait before they return.")
    freeze_pruned: float = Field(0.42, ge=0, lt=1, description="Share of the pruned weights, the worst, that stay so.")
    freeze_kept: float = Field(0.35, ge=0, lt=1, description="Share of the kept weights, the best, that stay so.")
    sequences: int = Field(8, ge=1, description="Sequences per step.")
    tokens: int = Field(256, ge=2, description="Tokens of each.")
    keep: Literal["best", "last"] = Field("best", description="Lowest loss on a held-out batch, or the last mask.")
    draw: int = Field(0, ge=0, description="Seed of the schedule.")

    @field_validator("budget")
    @classmethod
    def _budget(cls, text: str) -> str:
        _parse_budget(text)
        return text

    def prune(self, walk: Walk) -> None:
        seconds, steps = _parse_budget(self.budget)
        with walk.editing() as model:
            dense = {site.name: site.weight.clone() for site in walk.all_sites()}
            free = self._start(walk)
            losses = _losses_of(walk)
            batches = _cut(walk, self.sequences, self.tokens)
            held = batches.pop() if len(batches) > 1 else batches[0]
            search = Search(self, walk.all_sites(), dense, free)
            with forward_precision(walk.precision, walk.device):
                value = float(losses(model, held).mean())
            best = search.masks()
            best_value, since, number = value, time.monotonic(), 0
            with bar("icbs", steps or round(seconds or 0)) as advance:
                try:
                    for sites in search.schedule():
                        used = time.monotonic() - since
                        if (steps is not None and number >= steps) or (seconds is not None and used >= seconds):
                            break
                        names = [site.name for site in sites]
                        with forward_precision(walk.precision, walk.device):
                            batch = batches[number % len(batches)]
                            gradients = sample_gradients(model, names, batch, losses)
                        predicted = search.step(sites, gradients, number)
                        number += 1
                        if number % _EVERY == 0:
                            with forward_precision(walk.precision, walk.device):
                                value = float(losses(model, held).mean())
                            if value < best_value:
                                best, best_value = search.masks(), value
                        advance(f"loss {value:.4f}  best {best_value:.4f}  predicted {predicted:+.2g}")
                except KeyboardInterrupt:
                    walk.notes.append(f"Interrupted after {number} steps: the best mask so far was kept.")
            if number == 0:
                walk.notes.append(
                    f"The budget {self.budget} was too small for one step: the starting mask is the result."
                )
            with forward_precision(walk.precision, walk.device):
                current = float(losses(model, held).mean())
            better = self.keep == "best" and best_value < current
            search.restore(best if better else search.masks())

    def _start(self, walk: Walk) -> dict[str, Tensor]:
        """Prune by the starting method; returns which weights take part: site name -> bool [out · in]."""
        free: dict[str, Tensor] = {}
        inner = walk.inside(self.start)
        sparsity = self.targets(inner)
        walk.targets = inner.targets
        for block in inner:
            norms = block.collect(ColumnNorm)
            for site in block.sites:
                score = _SCORES[self.start](site.weight, norms[site])
                self.apply(block, site, self.density_pattern.keep(score, sparsity[site.name]))
                free[site.name] = self._free(score.flatten(), (site.weight == 0).flatten())
        return free

    def _free(self, score: Tensor, pruned: Tensor) -> Tensor:
        """Everything but the lowest of the pruned and the highest of the kept."""
        free = torch.ones_like(pruned)
        for side, share, largest in ((pruned, self.freeze_pruned, False), (~pruned, self.freeze_kept, True)):
            index = side.nonzero()[:, 0]
            free[index[score[index].topk(int(share * len(index)), largest=largest).indices]] = False
        return free


_EVERY = 10  # steps between two looks at the held-out batch
_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wanda": wanda,
    "ria": ria,
    "magnitude": lambda weight, norm: magnitude(weight),
}


@dataclass
class _Layer:
    """The search's state for one matrix."""

    site: Site
    dense: Tensor
    pruned: Tensor  # bool [out * in]
    free: Tensor  # bool [out * in]: not frozen
    waiting: deque[Tensor] = field(default_factory=deque)  # tabu: blocks in the order they were solved
    count: int = 0  # weights in `waiting`


class Search:
    """Block coordinate descent over masks: choose a block, build its quadratic model, solve, write the mask back."""

    def __init__(self, options: ICBS, sites: list[Site], dense: dict[str, Tensor], free: dict[str, Tensor]) -> None:
        self.options = options
        self.nm: NM | None = options.nm
        self.generator = torch.Generator().manual_seed(options.draw)
        self.layers: dict[str, _Layer] = {}
        for site in sites:
            pruned = (site.weight == 0).flatten()
            if not 0 < int(pruned.sum()) < pruned.numel():
                continue
            self.layers[site.name] = _Layer(site, dense[site.name], pruned, free[site.name])

    def schedule(self) -> Iterator[list[Site]]:
        """Matrices in random order, several at a time, epoch after epoch; larger ones more often (by log size)."""
        sites = [layer.site for layer in self.layers.values()]
        if not sites:
            return
        weights = torch.tensor([site.numel for site in sites], dtype=torch.float64).log10()
        per_step = min(self.options.blocks_per_step, len(sites))
        while True:
            order = torch.multinomial(weights, len(sites), generator=self.generator).tolist()
            for first in range(0, len(order), per_step):
                yield [sites[i] for i in order[first : first + per_step]]

    def step(self, sites: list[Site], gradients: SampleGradients, number: int) -> float:
        """Solve one block of each matrix and write the masks; returns the predicted change of the loss."""
        total = 0.0
        for site in sites:
            total += self._solve(self.layers[site.name], gradients, number)
        return total

    def _solve(self, layer: _Layer, gradients: SampleGradients, number: int) -> float:
        site, captured = layer.site, gradients[layer.site.name]
        columns = site.shape[1]
        w0_all = layer.dense.flatten()
        score = (w0_all.float() * captured.mean().flatten()).abs()
        index, groups = self._block(layer, score)
        start = layer.pruned[index]
        k = int(start.sum())
        if k == 0 or k == len(index):
            return 0.0
        g = captured.gather(index // columns, index % columns)
        w0 = w0_all[index].float()
        w = torch.where(start, 0.0, w0)
        curvature = float(g.double().square().mean())
        problem = block_problem(g, w0, w, alpha=self.options.gradient, ridge=self.options.ridge * curvature)
        x, energy = solve(problem, k, start, solver=self.options.solver, groups=groups, seed=self.options.draw + number)
        self._wait(layer, index)
        if energy >= 0:
            return 0.0
        layer.pruned[index] = x.to(layer.pruned.device)
        site.weight.copy_(torch.where(layer.pruned.view(site.shape), torch.zeros_like(layer.dense), layer.dense))
        return energy

    def _block(self, layer: _Layer, score: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices of a block: the pruned weights that look most useful and the kept ones that look least so."""
        if self.options.selection == "random":
            score = torch.rand(score.shape, generator=self.generator).to(score.device)
        if self.nm is not None:
            return self._groups(layer, score, self.nm.m)
        half = self.options.variables // 2
        open_ = layer.free.clone()
        for waiting in layer.waiting:
            open_[waiting] = False
        sides = []
        for side, largest in ((layer.pruned, True), (~layer.pruned, False)):
            candidates = (side & open_).nonzero()[:, 0]
            if len(candidates) < min(half, self.options.variables // _FEWEST):
                candidates = (side & layer.free).nonzero()[:, 0]  # tabu starves small or very sparse matrices
            top = score[candidates].topk(min(half, len(candidates)), largest=largest).indices
            sides.append(candidates[top])
        return torch.cat(sides), None

    def _groups(self, layer: _Layer, score: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """Whole groups of M, those first where a pruned weight looks most useful beside a kept one."""
        pruned = layer.pruned.view(-1, m)
        lanes = score.view(-1, m)
        gain = lanes.masked_fill(~pruned, -torch.inf).amax(1) - lanes.masked_fill(pruned, torch.inf).amin(1)
        open_ = torch.ones(len(gain), dtype=torch.bool, device=gain.device)
        for waiting in layer.waiting:
            open_[waiting[::m] // m] = False
        wanted = max(1, self.options.variables // m)
        if int(open_.sum()) < min(wanted, len(gain)):
            open_[:] = True
        chosen = gain.masked_fill(~open_, -torch.inf).topk(min(wanted, len(gain))).indices
        index = (chosen[:, None] * m + torch.arange(m, device=chosen.device)).flatten()
        return index, torch.arange(len(chosen), device=chosen.device).repeat_interleave(m)

    def _wait(self, layer: _Layer, index: Tensor) -> None:
        """Put a solved block on the tabu list, and take the oldest off while the list is too long."""
        capacity = round(self.options.tabu * int(layer.free.sum()))
        layer.waiting.append(index)
        layer.count += len(index)
        while layer.waiting and layer.count > capacity:
            layer.count -= len(layer.waiting.popleft())

    def masks(self) -> dict[str, Tensor]:
        """A copy of the present masks: site name -> bool [out · in], True where pruned."""
        return {name: layer.pruned.clone() for name, layer in self.layers.items()}

    def restore(self, masks: dict[str, Tensor]) -> None:
        """Go back to earlier masks."""
        for name, pruned in masks.items():
            layer = self.layers[name]
            layer.pruned = pruned
            layer.site.weight.copy_(
                torch.where(pruned.view(layer.site.shape), torch.zeros_like(layer.dense), layer.dense)
            )


def _parse_budget(text: str) -> tuple[float | None, int | None]:
    """(seconds, steps), one of them None.

    Raises:
        ValueError: neither a time nor a number of steps.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|steps?)\s*", text)
    if match is None:
        raise ValueError("it is a time such as 90s, 10m or 1h, or a number of steps such as '300 steps'")
    value, unit = float(match[1]), match[2]
    if unit.startswith("step"):
        return None, int(value)
    return value * {"s": 1, "m": 60, "h": 3600}[unit], None


def _losses_of(walk: Walk) -> LossFn:
    first = walk.batches[0]
    ids = first if isinstance(first, Tensor) else first.get("input_ids")
    return label_losses if ids is None or ids.is_floating_point() else next_token_losses


def _cut(walk: Walk, sequences: int, tokens: int) -> list[Batch]:
    batches = shortened(walk.batches, 1 << 62, tokens, sequences)
    if not batches:
        raise BillhookError("iCBS needs calibration batches: give some.")
    return batches
