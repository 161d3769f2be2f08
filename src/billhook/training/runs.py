"""Methods that own several training runs: lottery tickets, soups, iterative pruning with retraining.

    ticket = bh.IMPRewind(sparsity=0.95).run(model, train=train, evaluate=accuracy, out="out/ticket")

`train` is the user's own function (see `stretch`), called once for every part of a training that the method asks for.
What is finished is kept in `out`; the same call goes on where a killed one stopped, to the same bits.
"""

from __future__ import annotations

import inspect
import math
import random
import time
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from billhook import progress
from billhook.calibrate import distributed
from billhook.declared import Declared, Registry
from billhook.errors import BillhookError
from billhook.models.files import byte_view
from billhook.system import finite
from billhook.training.hold import apply_masks, held
from billhook.training.masks import Masks, keep_globally, keep_in_layer
from billhook.training.prunable import prunable
from billhook.training.schedules import geometric
from billhook.training.store import Store, restore, snapshot
from billhook.training.stretch import Stretch, Train

Evaluate = Callable[[nn.Module], float]


class SeveralRuns(Declared):
    """Base of all methods that own several training runs: what they share to declare."""

    kind = "procedure"
    needs: ClassVar[str] = "training"

    sparsity: float = Field(0.9, ge=0, lt=1, description="Fraction of the prunable weights that is removed at the end.")
    scope: Literal["global", "layer"] = Field(
        "global", description="Weights compete over all layers, or every layer has the same sparsity."
    )
    exclude: list[str] = Field(
        default_factory=list, description="Names of weights that stay dense, such as fc.* or *.downsample.*."
    )
    seed: int = Field(0, ge=0, description="Seed of data order and augmentation, handed to the training function.")

    @abstractmethod
    def counts(self, present: int, total: int) -> list[int]:
        """How many weights are left after each round, `present` of them before the first.

        Args:
            present: weights that are there now; total: with the absent ones.
        """

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        train: Train,
        *,
        evaluate: Evaluate | None = None,
        out: str | Path | None = None,
    ) -> Outcome:
        """Do all the runs; the model ends as the result.

        Args:
            model: any module.
            train: the user's training function, see `stretch`.
            evaluate: score of a model, higher is better; called after every run.
            out: folder for finished parts; the same call goes on where a killed one stopped.
        """

    def left(self, total: int) -> int:
        """How many of `total` weights the sparsity leaves."""
        return round((1 - self.sparsity) * total)


@dataclass(frozen=True)
class Outcome:
    """What a method of several runs leaves.

    Attributes:
        model: the user's own, now trained and sparse.
        masks: name of the parameter -> bool, True where a weight is.
        report: what was done and measured, plain values; `parts` in the order of the runs.
        store: weights and masks of the parts that were kept.
    """

    model: nn.Module
    masks: Masks
    report: dict[str, Any]
    store: Store

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is absent."""
        return _sparsity(self.masks)

    @property
    def score(self) -> float | None:
        """What `evaluate` said of the model in the end, if it was given."""
        found: float | None = self.report["parts"][-1]["score"]
        return found


class Runs:
    """A procedure at work on one model: trains parts, makes sure that they are what was asked for, and keeps them.

    Attributes:
        weights: name -> parameter that may lose weights.
        masks: the present ones, name -> bool tensor.
        parts: records of the finished parts, in order.
        notes: what the user should know of how it went.
    """

    def __init__(
        self,
        method: SeveralRuns,
        model: nn.Module,
        train: Train,
        evaluate: Evaluate | None,
        out: str | Path | None,
        masks: Masks | None = None,
    ) -> None:
        _refuse_unusable(train, evaluate)
        self.method, self.model, self._train, self._evaluate = method, model, train, evaluate
        self.weights = prunable(model, method.exclude)
        self.parts: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._refuse_unfit()
        self.masks = present(self.weights) if masks is None else masks
        self.counts: dict[str, list[int]] = self._plan() if masks is None else {}
        self.store = Store(None if out is None else Path(out))
        self.store.claim(
            {
                "method": method.text(),
                "model": f"{len(snapshot(model))} tensors, {self.total} prunable weights",
                "initial weights": f"{_checksum(model):08x}",
                "masks": f"{_crc(self.masks.values()):08x}",
            }
        )
        self._advance: progress.Bar = lambda note="", *, advance=1: None

    @contextmanager
    def working(self, parts: int) -> Iterator[None]:
        """A bar over the parts; the model's mode is as before in the end."""
        training = self.model.training
        try:
            with progress.bar(self.method.title, parts) as self._advance:
                yield
        finally:
            self.model.train(training)

    # -- parts ----------------------------------------------------------------------------------------------

    def rewind_point(self, at: float) -> str:
        """The part that weights go back to: the network after this fraction of the training, made if need be."""
        if not self.resume("start"):
            self.keep("start")
        if not at:
            return "start"
        if not self.resume("rewind"):
            self.load("start")
            self.fit("rewind", Stretch(0.0, at, seed=self.method.seed))
        return "rewind"

    def keep(self, name: str, **record: Any) -> dict[str, Any]:
        """Keep the model as the finished part `name`; returns its record."""
        record = {"part": name, "sparsity": round(_sparsity(self.masks), 6), "left": self.active, **record}
        record.setdefault("score", None)
        self.store.put(name, snapshot(self.model), self.masks, record)
        self._done(record)
        return record

    def resume(self, name: str) -> bool:
        """Whether the part is finished; if so its masks are the present ones and its record is among the parts."""
        if not self.store.has(name):
            return False
        self.masks = self.store.masks(name, self.weights)
        self._done(self.store.record(name))
        return True

    def load(self, name: str) -> None:
        """Put the model into the state of a finished part."""
        restore(self.model, self.store.state(name))

    def fit(self, name: str, stretch: Stretch, after: Callable[[], None] | None = None, **record: Any) -> None:
        """Train a stretch under the present masks, measure and keep it.

        Args:
            after: what is done before the part is measured.

        Raises:
            BillhookError: the training changed no weight, or left one that is not finite.
        """
        begin = time.perf_counter()
        self.train(stretch, name)
        if after is not None:
            after()
        score = self.score()
        self.keep(
            name,
            start=stretch.start,
            stop=stretch.stop,
            length=stretch.length,
            seed=stretch.seed,
            score=score,
            seconds=round(time.perf_counter() - begin, 3),
            **record,
        )

    def train(self, stretch: Stretch, name: str, frozen: bool = False) -> None:
        """Call the user's function, and make sure that it did what it was asked for.

        Args:
            name: of the part, for error sentences.
            frozen: whether the weights must not change, rather than that they must.
        """
        apply_masks(self.model, self.masks)
        if stretch.start == stretch.stop:
            return
        before, own = _checksum(self.model), list(self.model.parameters())
        self.model.train()
        with _seeded(self.model, stretch), held(self.model, self.masks):
            self._train(self.model, stretch)
        where = f"{name} ({stretch.start:.4g} to {stretch.stop:.4g} of the training)"
        if [id(p) for p in own] != [id(p) for p in self.model.parameters()]:
            raise BillhookError(
                f"After {where} the model has other parameters than before, so that absent weights could not be held: "
                "train must not replace parameters."
            )
        for key, tensor in snapshot(self.model).items():
            if tensor.is_floating_point() and not finite(tensor):
                raise BillhookError(f"After {where} {key} is not finite: lower the learning rate, or clip gradients.")
        changed = _checksum(self.model) != before
        if frozen and changed:
            raise BillhookError(
                "train changed weights at a learning rate of 0, so statistics of BatchNorm cannot be re-estimated by "
                "it: make it follow stretch.rate, or give batches."
            )
        if not frozen and not changed:
            raise BillhookError(
                f"After {where} every weight is what it was: train must train the model that it is given, for at least "
                "one step of a stretch."
            )

    @torch.no_grad()
    def score(self) -> float | None:
        """What `evaluate` says of the model as it is, in evaluation mode; higher is better.

        Raises:
            BillhookError: it is not a finite number.
        """
        if self._evaluate is None:
            return None
        self.model.eval()
        found = self._evaluate(self.model)
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise BillhookError(
                f"evaluate returned {type(found).__name__}: it must return a number, higher for a better model."
            ) from None
        if not math.isfinite(value):
            raise BillhookError(
                f"evaluate returned {value}: it must return a finite number, higher for a better model."
            )
        return _of_main(value)

    def prune(self, round: int) -> None:
        """Nested masks with the number of weights of this round, by the magnitudes of the model as it is."""
        self.masks = fewer(self.weights, self.masks, {key: left[round] for key, left in self.counts.items()})
        apply_masks(self.model, self.masks)
        for name, mask in self.masks.items():
            if not bool(mask.any()):
                self.note(f"{name} has no weight left.")

    @property
    def rounds(self) -> int:
        """How often weights are removed."""
        return max((len(left) - 1 for left in self.counts.values()), default=0)

    @property
    def total(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def active(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def report(self, **more: Any) -> dict[str, Any]:
        """What was done and measured; written beside the parts too."""
        result = {
            "method": self.method.text(),
            "weights": self.total,
            "left": self.active,
            "sparsity": _sparsity(self.masks),
            "parts": self.parts,
            "notes": self.notes,
            **more,
        }
        self.store.conclude(result)
        return result

    # -- inside ---------------------------------------------------------------------------------------------

    def _done(self, record: dict[str, Any]) -> None:
        self.parts.append(record)
        score = record["score"]
        self._advance(record["part"] if score is None else f"{record['part']}: {score:.4g}")

    def _plan(self) -> dict[str, list[int]]:
        """Weights left after each round: of all layers together under "", or of each layer."""
        present, left = self.active, self.method.left(self.total)
        if left >= present and not self.total == present == left:
            raise BillhookError(
                f"The model is at sparsity {1 - present / self.total:.4g} already, and {self.method.sparsity:g} is not "
                "above that: ask for more, or give the dense model."
            )
        pools = {"": (present, self.total)}
        if self.method.scope == "layer":
            pools = {name: (int(mask.sum()), mask.numel()) for name, mask in self.masks.items()}
        plan: dict[str, list[int]] = {}
        for name, (there, total) in pools.items():
            left = min(self.method.left(total), there)
            if left < 1:
                raise BillhookError(
                    f"{name or 'The model'} has {total} prunable weights and would keep none at sparsity "
                    f"{self.method.sparsity:g}: lower the sparsity{', or exclude it' if name else ''}."
                )
            plan[name] = self.method.counts(there, total) if left < there else [there]
        longest = max(map(len, plan.values()))
        return {name: left + left[-1:] * (longest - len(left)) for name, left in plan.items()}

    def _refuse_unfit(self) -> None:
        for name, weight in self.weights.items():
            if not weight.requires_grad:
                raise BillhookError(f"{name} is frozen, so training cannot make up for what it loses: exclude it.")
        for name, tensor in snapshot(self.model).items():
            if tensor.is_floating_point() and not finite(tensor):
                raise BillhookError(f"{name} is not finite before any training: load or initialise the model again.")


# -- counts and masks ---------------------------------------------------------------------------------------


def proportional(present: int, left: int, fraction: float) -> list[int]:
    """Weights after each round that removes ⌈fraction · n⌉ of n, but never goes below `left`."""
    counts = [present]
    while counts[-1] > left:
        counts.append(max(counts[-1] - max(1, math.ceil(round(fraction * counts[-1], 6))), left))
    return counts


def in_rounds(present: int, left: int, rounds: int) -> list[int]:
    """Weights after each of `rounds` that all remove the same fraction of what is there."""
    if left == present:
        return [present]
    return [round(present * (1 - geometric(i, rounds, 1 - left / present))) for i in range(rounds)] + [left]


@torch.no_grad()
def fewer(weights: Mapping[str, Tensor], masks: Masks, left: Mapping[str, int]) -> Masks:
    """Nested masks of the largest |w|: `left[""]` of all layers together, or `left[name]` of each."""
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    if "" in left:
        return keep_globally(scores, masks, left[""])
    return {name: keep_in_layer(scores[name], mask, left[name]) for name, mask in masks.items()}


def present(weights: Mapping[str, Tensor]) -> Masks:
    """Weights that are there: not zero. A layer of zeros alone was not pruned but begins at zero."""
    masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    return {name: mask if bool(mask.any()) else torch.ones_like(mask) for name, mask in masks.items()}


def _sparsity(masks: Masks) -> float:
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


# -- the user's functions -----------------------------------------------------------------------------------


def _refuse_unusable(train: Any, evaluate: Any) -> None:
    for what, function, arguments in (("train", train, "model, stretch"), ("evaluate", evaluate, "model")):
        if function is None and what == "evaluate":
            continue
        try:
            inspect.signature(function).bind(*arguments.split(", "))
        except ValueError:
            continue  # a callable that does not say what it takes
        except TypeError:
            raise BillhookError(
                f"{what}={getattr(function, '__name__', function)!s} cannot be called as {what}({arguments}): give a "
                "function of that form."
            ) from None


@contextmanager
def _seeded(model: nn.Module, stretch: Stretch) -> Iterator[None]:
    """All global random numbers as a function of the stretch alone, so that a resumed run draws the same ones."""
    seed = int(np.random.SeedSequence([stretch.seed, round(stretch.start * 1e9)]).generate_state(1)[0])
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _crc(tensors: Any) -> int:
    here = 0
    for tensor in tensors:
        if tensor.numel():
            here = zlib.crc32(byte_view(tensor.detach().cpu().contiguous()), here)
    return here


def _checksum(model: nn.Module) -> int:
    """Changes if the value of any parameter does."""
    # "+ 0.0" turns -0, which masking makes and a step of length 0 unmakes, into +0
    return _crc(parameter.detach() + 0.0 for parameter in model.parameters())


def _of_main(value: float) -> float:
    """The first process's value, in every process, so that all decide alike."""
    if distributed.world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return float(box[0])


RUNS: Registry[SeveralRuns] = Registry("procedure")
procedure = RUNS.register
