"""Iterative magnitude pruning with rewinding: what is left goes back to where it was early in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from billhook.analysis.stability import Stability, apart, error_barrier
from billhook.declared import Paper
from billhook.errors import BillhookError, nearest
from billhook.training.masks import Masks, random_mask
from billhook.training.runs import Evaluate, Outcome, Runs, SeveralRuns, in_rounds, procedure, proportional
from billhook.training.store import State, restore, snapshot
from billhook.training.stretch import Stretch, Train

Control = Literal["random", "random-global", "reinit", "original"]


@procedure("imp-rewind")
class IMPRewind(SeveralRuns):
    title = "IMP with rewinding"
    paper = Paper(
        "Stabilizing the Lottery Ticket Hypothesis",
        "J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin",
        "2019",
        "1903.01611",
    )
    summary = (
        "Trains, removes the smallest weights, puts the others back to their values early in training, and trains "
        "again, until few are left."
    )
    when = (
        "For the best accuracy at a high sparsity, where training can be repeated some ten times, and as the baseline "
        "of other ways to train sparse networks. `ticket.control` trains what a ticket has to beat."
    )

    per_round: float = Field(0.2, gt=0, lt=1, description="Share of the remaining weights removed per round.")
    rounds: int | None = Field(
        None, ge=1, description="Rounds that all remove the same share, instead of per_round; 1 prunes at once."
    )
    rewind_to: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Where in the training weights go back to; 0 is the original lottery ticket.",
    )
    rewind: Literal["weights", "rate", "none"] = Field(
        "weights",
        description="weights: weights and learning rate go back; rate: the learning rate alone; none: fine-tuning.",
    )
    low: float = Field(
        0.01, gt=0, le=1, description="Constant learning rate of fine-tuning (rewind=none), as a part of the peak."
    )
    same_order: bool = Field(True, description="Whether all rounds see the same data order.")

    def counts(self, present: int, total: int) -> list[int]:
        if self.rounds is not None:
            return in_rounds(present, self.left(total), self.rounds)
        return proportional(present, self.left(total), self.per_round)

    def run(
        self,
        model: nn.Module,
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        out: str | Path | None = None,
        keep: bool = False,
    ) -> Ticket:
        """Find the ticket of a network, and train it.

        Biases, norms and their statistics go back with the weights. The training function makes a fresh optimizer, so
        momentum starts from zero every time.

        Args:
            model: at its initialisation, or pretrained; ends as the trained ticket.
            train: called as train(model, stretch) for the part up to `rewind_to` and for the rest, once per round.
            evaluate: score of a model, higher is better; called after every round.
            out: folder for finished rounds; the same call goes on where a killed one stopped.
            keep: the trained weights of every round, not only what going on needs.

        Raises:
            BillhookError: nothing to prune, a sparsity that is not above the present one or that a layer cannot reach,
                a training that changes nothing or diverges, a folder of another run.
        """
        runs = Runs(self, model, train, evaluate, out)
        with runs.working(runs.rounds + 2 + bool(self.rewind_to)):
            point = runs.rewind_point(self.rewind_to)
            done = 0
            while done <= runs.rounds and runs.resume(_level(done)):
                done += 1
            if done:
                runs.load(_level(done - 1))
            for level in range(done, runs.rounds + 1):
                if level:
                    runs.prune(level)
                if level == 0 or self.rewind == "weights":
                    runs.load(point)
                runs.fit(_level(level), self.stretch(level))
                if level and not keep:
                    runs.store.drop(_level(level - 1))
        return Ticket(model, runs.masks, runs.report(), runs.store, self, point)

    def stretch(self, level: int) -> Stretch:
        """The training of a round, 0 with all weights."""
        rate = (lambda t: self.low) if level and self.rewind == "none" else None
        return Stretch(self.rewind_to, 1.0, seed=self.seed + (0 if self.same_order else level), rate=rate)


@dataclass(frozen=True)
class Ticket(Outcome):
    """A trained ticket, and the state that it went back to.

    Attributes:
        method: what found it.
        point: the part of the store with that state.
    """

    method: IMPRewind
    point: str

    @property
    def levels(self) -> list[dict[str, Any]]:
        """The records of the rounds, the dense one first: sparsity, weights left, score, seconds."""
        return [part for part in self.report["parts"] if part["part"].startswith("level")]

    def rewound(self) -> dict[str, Tensor]:
        """The state at `rewind_to`, absent weights at zero, on the CPU; with rewind=weights training begins there."""
        state = self.store.state(self.point)
        return {n: state[n] * self.masks[n].cpu() if n in self.masks else state[n].clone() for n in state}

    def rewind_(self) -> None:
        """Put the model back to the state `rewound`."""
        restore(self.model, self.rewound())

    def control(
        self,
        kind: Control,
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        seed: int = 0,
        start: float | None = None,
        initialize: Callable[[nn.Module], Any] | None = None,
        out: str | Path | None = None,
    ) -> Outcome:
        """Train what the ticket has to beat, on a copy of the model.

        Args:
            kind: random: as many weights in every layer, at random places; random-global: as many in all, at random
                places of all layers; reinit: the ticket's mask on newly drawn weights; original: the whole search
                again from the initialisation (rewind_to = 0).
            seed: of the random places or the new draw. The data order is the ticket's.
            start: where in the training the control begins; where the ticket did, unless given. A network drawn anew
                may want 0. The original search has a beginning and draws of its own: `start`, `seed` and
                `initialize` are not for it.
            initialize: draws the weights of a model anew, for `reinit`; by default every module's reset_parameters().
            out: as in `IMPRewind.run`.

        Returns:
            the trained control; `report["parts"]` has its score and the start that was used.

        Raises:
            BillhookError: no such control; or a module that cannot be initialised without `initialize`.
        """
        if kind not in get_args(Control):
            known = get_args(Control)
            raise BillhookError(f"No control {kind!r}{nearest(str(kind), known)}: there are {', '.join(known)}.")
        model = copy.deepcopy(self.model)
        if kind == "original":
            restore(model, self.store.state("start"))
            method = self.method.model_copy(update={"rewind_to": 0.0})
            return method.run(model, train, evaluate=evaluate, out=out)
        masks = self.masks
        restore(model, self.store.state(self.point))
        if kind == "reinit":
            reinitialize_(model, seed, initialize)
        else:
            masks = shuffled(masks, seed, over_all=kind == "random-global")
        begin = self.method.rewind_to if start is None else start
        runs = Runs(self.method, model, train, evaluate, out, masks=masks)
        part = kind if start is None else f"{kind}-{start:g}"  # another start is another training
        with runs.working(1):
            if runs.resume(part):
                runs.load(part)
            else:
                runs.fit(part, Stretch(begin, 1.0, seed=self.method.seed), draw=seed)
        return Outcome(model, masks, runs.report(), runs.store)

    def stability(
        self,
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        masks: Masks | None = None,
        other_seed: int | None = None,
        points: int = 30,
    ) -> Stability:
        """How close to the dense network a sparse one ends, and how close to itself under another data order.

        Three trainings from the state at `rewind_to`: dense, sparse, and sparse in another order. Distances are over
        the weights that are there.

        Args:
            masks: of the sparse network; the ticket's unless given (a control's, to compare).
            other_seed: of the other data order; the ticket's + 1 unless given.
            evaluate: with it, also the barrier between the two orders, at `points` points.
        """
        sparse = self.masks if masks is None else masks
        model = copy.deepcopy(self.model)

        def end(masks: Masks, seed: int) -> State:
            restore(model, self.store.state(self.point))
            runs = Runs(self.method, model, train, evaluate, None, masks=masks)
            runs.train(Stretch(self.method.rewind_to, 1.0, seed=seed), "stability")
            return {name: tensor.clone() for name, tensor in snapshot(model).items()}

        seed = self.method.seed
        dense = end({name: torch.ones_like(mask) for name, mask in sparse.items()}, seed)
        one = end(sparse, seed)
        two = end(sparse, seed + 1 if other_seed is None else other_seed)
        barrier = None if evaluate is None else error_barrier(model, one, two, evaluate, points)
        return Stability(apart(dense, one, sparse), apart(one, two, sparse), barrier)


def shuffled(masks: Masks, seed: int, over_all: bool = False) -> Masks:
    """Masks with as many weights at random places: of each layer, or of all layers together."""
    generator = torch.Generator().manual_seed(seed)
    if not over_all:
        return {n: random_mask(m.shape, int(m.sum()), generator).to(m.device) for n, m in masks.items()}
    total, kept = sum(m.numel() for m in masks.values()), sum(int(m.sum()) for m in masks.values())
    flat = random_mask(torch.Size([total]), kept, generator)
    result: Masks = {}
    for name, mask in masks.items():
        part, flat = flat[: mask.numel()], flat[mask.numel() :]
        result[name] = part.view(mask.shape).to(mask.device)
    return result


@torch.no_grad()
def reinitialize_(model: nn.Module, seed: int, initialize: Callable[[nn.Module], Any] | None = None) -> None:
    """Draw the weights of a model anew.

    Args:
        seed: of the draw; the global random state is left as it was.
        initialize: does it; by default every module's reset_parameters().

    Raises:
        BillhookError: a parameter belongs to a module without reset_parameters().
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        # a seed of its own kind: the model may well have been drawn after manual_seed(0) itself
        torch.manual_seed(int(np.random.SeedSequence([seed, 190301611]).generate_state(1)[0]))
        if initialize is not None:
            initialize(model)
            return
        for path, module in model.named_modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise BillhookError(
                    f"{path or 'The model'} ({type(module).__name__}) has no reset_parameters() to draw its weights "
                    "anew: give initialize=a function that initialises the model."
                )


def _level(index: int) -> str:
    return f"level-{index:02d}"
