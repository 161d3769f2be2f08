"""iCBS: better masks for the same density, one small binary quadratic problem after another.

Memory beside the model: a second copy of the pruned matrices, 3 bytes per weight for masks, and in a step the
activations of one batch from the first chosen matrix on, of which 4 · S · T · (in + out) bytes per chosen matrix are
kept (S sequences of T tokens), and 8 n² bytes for the problem of a block of n weights.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
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
    """Iterative combinatorial brain surgeon.

    Memory in bytes, for a model of P parameters of b bytes each, N of them prunable, whose largest matrix is in × out:

        (P + N) b                   the model, and the dense weights of what is pruned
        4 N + 8 · tabu · N          masks (which are pruned now, at best, and take part; a copy), waiting blocks
        4 B S T (in + out)          what B matrices read and got back in a step of S sequences of T tokens
        24 in · out + 8 n² + 4 S n  ranking one matrix, and the problem of n variables

    at most, and what a backward pass of S · T tokens keeps. B is `blocks_per_step`, S `sequences`, T `tokens`, n
    `variables`; none of it grows with the budget or with the calibration data beyond the token ids.
    """

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

    @property
    def exact_passes(self) -> bool:
        return False  # exchanges are judged by the loss

    def prune(self, walk: Walk) -> None:
        seconds, steps = _parse_budget(self.budget)
        losses, batches = _losses_of(walk), _cut(walk, self.sequences, self.tokens)
        held = batches.pop() if len(batches) > 1 else batches[0]
        with walk.editing() as model:

            def loss() -> float:
                with forward_precision(walk.precision, walk.device):
                    return float(losses(model, held).mean())

            dense = {site.name: site.weight.clone() for site in walk.all_sites()}
            search, kept = Search(self, walk.all_sites(), dense), walk.kept_state()
            if kept is None:
                search.begin(self._start(walk), loss())
            else:
                search.load(*kept)
                walk.targets = self.targets(walk)
            before, since = search.seconds, time.monotonic()
            with bar("icbs", steps or round(seconds or 0)) as advance:
                try:
                    while steps is None or search.number < steps:
                        search.seconds = before + time.monotonic() - since
                        if seconds is not None and search.seconds >= seconds:
                            break
                        sites = search.sites()
                        if not sites:  # nothing is pruned, or everything
                            break
                        with forward_precision(walk.precision, walk.device):
                            batch = batches[search.number % len(batches)]
                            gradients = sample_gradients(model, [site.name for site in sites], batch, losses)
                        predicted = search.step(sites, gradients)
                        if search.number % _EVERY == 0:
                            search.judge(loss())
                        walk.keep_state(search.state)
                        advance(f"loss {search.value:.4f}  best {search.best_value:.4f}  predicted {predicted:+.2g}")
                except KeyboardInterrupt:
                    walk.notes.append(f"Interrupted after {search.number} steps: the best mask so far was kept.")
            if search.number == 0:
                walk.notes.append(
                    f"The budget {self.budget} was too small for one step: the starting mask is the result."
                )
            search.write(search.pruned())  # an interrupted step may have written half
            search.judge(loss())
            if self.keep == "best":
                search.write(search.best)

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

    def __init__(self, options: ICBS, sites: list[Site], dense: dict[str, Tensor]) -> None:
        self.options = options
        self.nm: NM | None = options.nm
        self.all_sites = sites
        self.dense = dense
        self.layers: dict[str, _Layer] = {}
        self.number = 0  # steps taken
        self.seconds = 0.0  # of the budget used
        self.value = self.best_value = math.inf  # loss on the held-out batch, at the last look and at its lowest
        self.best: dict[str, Tensor] = {}

    def begin(self, free: dict[str, Tensor], value: float) -> None:
        """Start from the masks of the weights as they are; `free`: bool [out · in], which of them take part."""
        for site in self.all_sites:
            pruned = (site.weight == 0).flatten()
            if 0 < int(pruned.sum()) < pruned.numel():
                self.layers[site.name] = _Layer(site, self.dense[site.name], pruned, free[site.name])
        self.best, self.best_value, self.value = self.pruned(), value, value

    def judge(self, value: float) -> None:
        """Take note of the held-out loss of the present masks."""
        self.value = value
        if value < self.best_value:
            self.best, self.best_value = self.pruned(), value

    def sites(self) -> list[Site]:
        """The matrices of the next step: random order in every epoch, larger ones earlier (by log size)."""
        sites = [layer.site for layer in self.layers.values()]
        if not sites:
            return []
        per_step = min(self.options.blocks_per_step, len(sites))
        epoch, position = divmod(self.number, -(-len(sites) // per_step))
        weights = torch.tensor([site.numel for site in sites], dtype=torch.float64).log10()
        order = torch.multinomial(weights, len(sites), generator=self._generator(epoch)).tolist()
        return [sites[i] for i in order[position * per_step : (position + 1) * per_step]]

    def _generator(self, *stream: int) -> torch.Generator:
        """Draws that depend on the seed and on where the search is alone, so that a resumed one has the same."""
        seed = hash((self.options.draw, *stream)) % 2**63
        return torch.Generator().manual_seed(seed)

    def step(self, sites: list[Site], gradients: SampleGradients) -> float:
        """Solve one block of each matrix and write the masks; returns the predicted change of the loss."""
        total = sum(self._solve(self.layers[site.name], gradients, self.number) for site in sites)
        self.number += 1
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
            place = list(self.layers).index(layer.site.name)
            score = torch.rand(score.shape, generator=self._generator(self.number, place)).to(score.device)
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

    def pruned(self) -> dict[str, Tensor]:
        """A copy of the present masks: site name -> bool [out · in], True where pruned."""
        return {name: layer.pruned.clone() for name, layer in self.layers.items()}

    def write(self, pruned: dict[str, Tensor]) -> None:
        """Make these masks the present ones."""
        for name, mask in pruned.items():
            layer = self.layers[name]
            layer.pruned = mask
            layer.site.weight.copy_(
                torch.where(mask.view(layer.site.shape), torch.zeros_like(layer.dense), layer.dense)
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed search needs, masks packed to bits."""
        tensors: dict[str, Tensor] = {}
        waiting: dict[str, list[int]] = {}
        for name, layer in self.layers.items():
            for part, mask in (("pruned", layer.pruned), ("free", layer.free), ("best", self.best[name])):
                tensors[f"{name}:{part}"] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
            if layer.waiting:
                tensors[f"{name}:waiting"] = torch.cat(list(layer.waiting)).cpu()
            waiting[name] = [len(index) for index in layer.waiting]
        values = {
            "number": self.number,
            "seconds": self.seconds,
            "value": self.value,
            "best_value": self.best_value,
            "waiting": waiting,
        }
        return tensors, values

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for site in self.all_sites:
            if site.name not in values["waiting"]:
                continue
            device = site.weight.device
            masks = {
                part: torch.from_numpy(np.unpackbits(tensors[f"{site.name}:{part}"].numpy(), count=site.numel))
                for part in ("pruned", "free", "best")
            }
            pruned, free, best = (masks[part].bool().to(device) for part in ("pruned", "free", "best"))
            layer = _Layer(site, self.dense[site.name], pruned, free)
            lengths = values["waiting"][site.name]
            if lengths:
                parts = torch.split(tensors[f"{site.name}:waiting"].to(device), lengths)
                layer.waiting, layer.count = deque(parts), sum(lengths)
            self.layers[site.name], self.best[site.name] = layer, best
        self.number, self.seconds = values["number"], values["seconds"]
        self.value, self.best_value = values["value"], values["best_value"]
        self.write(self.pruned())


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
