"""Pruners that step with an optimizer, in anyone's training loop.

    pruner = bh.GraNet(sparsity=0.95).attach(model, optimizer, total_steps=len(loader) * epochs)
    for x, y in batches:
        optimizer.zero_grad(); loss_fn(model(x), y).backward(); optimizer.step()
        pruner.step()
    pruner.finalize()

The module stays plain all the time: an absent weight is a zero in the parameter. Its gradient is cleared just before
the optimizer looks at it, so that momentum, moments and weight decay leave it at zero; only at an update, where a
method may want to know the gradient of absent weights, is it left, and what the optimizer made of it is cleared after.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from billhook.calibrate import distributed
from billhook.declared import Declared, Registry
from billhook.errors import BillhookError
from billhook.system import finite
from billhook.training import masks as _masks
from billhook.training.masks import Growth, Masks
from billhook.training.prunable import prunable

_owned = WeakTensorKeyDictionary()  # parameters that a pruner holds


class SparseTraining(Declared):
    """Base of all pruners that step with an optimizer: what is declared, and when the mask changes how.

    A method says what the mask is at first (`begin`), at which steps it changes (`due`) and how (`update`).
    """

    kind = "pruner"
    needs: ClassVar[str] = "training"
    needs_gradients: ClassVar[bool] = False  # whether `update` looks at gradients of absent weights
    stands_still: ClassVar[bool] = False  # whether the optimizer moves nothing at an update, which takes its step

    sparsity: float = Field(0.9, ge=0, lt=1, description="Fraction of the prunable weights that is removed at the end.")
    exclude: list[str] = Field(
        default_factory=list, description="Names of weights that stay dense, such as fc.* or *.downsample.*."
    )
    draw: int = Field(0, ge=0, description="Seed of what is random.")

    def attach(
        self, model: nn.Module, optimizer: Any, total_steps: int, state: Mapping[str, Any] | None = None
    ) -> Pruner:
        """Start pruning `model` while `optimizer` trains it.

        Args:
            model: any module, on its device; wrapped for data-parallel training or not.
            optimizer: a torch optimizer over its parameters, or a wrapper of one (Accelerate).
            total_steps: optimizer steps of the whole training.
            state: a `Pruner.state_dict` to go on from, where model and optimizer have theirs back already.

        Returns:
            The pruner, to be stepped after every step of the optimizer.

        Raises:
            BillhookError: nothing to prune, a weight that the optimizer does not train or another pruner holds, or a
                sparsity that a layer cannot reach.
        """
        return Pruner(self, model, optimizer, total_steps, state)

    def candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Which weights may be removed, by name."""
        return prunable(model, self.exclude)

    def begin(self, pruner: Pruner) -> None:
        """Set the mask before the first step. All weights are there, unless this changes it."""

    def before_first_step(self, pruner: Pruner) -> None:
        """Called once when the first gradients are there and the optimizer has not used them yet."""

    @abstractmethod
    def due(self, step: int, total_steps: int) -> bool:
        """Whether the mask changes after this step, counted from 1."""

    def update(self, pruner: Pruner) -> None:
        """Change the mask."""

    def between(self, pruner: Pruner) -> None:
        """Called after each step of the optimizer that no update belongs to."""

    def reached(self, pruner: Pruner) -> bool:
        """Whether the mask has the sparsity that was asked for, up to one weight per layer of rounding."""
        return pruner.active <= pruner.keep(self.sparsity) + len(pruner.masks)


class Pruner:
    """A method at work on one model; made by `SparseTraining.attach`.

    Attributes:
        method: what is declared.
        weights: name -> parameter that may lose weights.
        masks: name -> bool tensor, True where a weight is there.
        taken: steps so far; total_steps: all of them.
        generator: what the method draws from; the same on every process.
        memory: tensors that a method keeps between updates, by name; saved with the state.
        notes: what the user should know of how it went.
    """

    def __init__(
        self,
        method: SparseTraining,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if total_steps < 1:
            raise BillhookError(f"total_steps={total_steps} is not a training: give the number of optimizer steps.")
        self.method = method
        self.model: nn.Module = getattr(model, "module", model) if _is_wrapped(model) else model
        self.optimizer: torch.optim.Optimizer = _innermost(optimizer)
        self.total_steps = total_steps
        self.taken = 0
        self.weights = method.candidates(self.model)
        self.generator = torch.Generator().manual_seed(method.draw)
        self.memory: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._begun = False  # whether the optimizer has seen gradients
        self._overdue = False
        self._optimizer_stepped = False
        self._withheld: dict[str, Tensor | None] = {}  # gradients that the optimizer did not get to see
        self._finished = False
        self._refuse_unheld()
        self.masks: Masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
        for weight in self.weights.values():
            _owned[weight] = method.name
        self._hook = self.optimizer.register_step_pre_hook(self._before_optimizer)
        try:
            if state is None:
                method.begin(self)
                self._enforce(moments=True)
            else:
                self.load_state_dict(state)
        except BaseException:
            self.detach()
            raise

    # -- the loop -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """After `optimizer.step()` and before gradients are cleared: the mask's own step.

        Raises:
            BillhookError: past `total_steps`; or the method needs gradients, and they are not there or not finite.
        """
        if self._finished:
            raise BillhookError("The pruner has been finalized: attach a new one to go on pruning.")
        if self.taken >= self.total_steps:
            raise BillhookError(
                f"The pruner was attached for {self.total_steps} steps, and this is one more: give attach the number "
                "of optimizer steps of the whole training."
            )
        self.taken += 1
        due, stepped = self._due(self.taken), self._optimizer_stepped
        if due and not stepped:
            # a loss scaler skipped the step because gradients overflowed: there is nothing to rank by
            self._overdue, due = True, False
        self._optimizer_stepped = False
        self._enforce(moments=due)
        if not due:
            if stepped:
                self.method.between(self)
            return
        self._overdue = False
        self.method.update(self)
        self._withheld.clear()
        self._enforce(moments=True)
        self._refuse_unequal()

    def finalize(self, force: bool = False) -> dict[str, float]:
        """Let go of the model, which keeps its zeros.

        Args:
            force: also before the sparsity that was asked for is reached.

        Returns:
            name -> sparsity reached.

        Raises:
            BillhookError: the training ended before its sparsity was reached.
        """
        if not force and not self._finished and not self.method.reached(self):
            raise BillhookError(
                f"The training ended after {self.taken} of {self.total_steps} steps at sparsity {self.sparsity:.4f}, "
                f"and {self.method.sparsity:g} was asked for: go on, or finalize(force=True) to keep what there is."
            )
        self._enforce(moments=False)
        self.detach()
        return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in self.masks.items()}

    def detach(self) -> None:
        """Let go of model and optimizer as they are."""
        self._hook.remove()
        self._finished = True
        for weight in self.weights.values():
            if weight in _owned:
                del _owned[weight]

    # -- what a method reads and does -----------------------------------------------------------------------

    @property
    def total(self) -> int:
        """How many weights may be removed."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def active(self) -> int:
        """How many weights are there."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is absent now."""
        return 1 - self.active / self.total

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.weights.items()}

    def keep(self, sparsity: float) -> int:
        """How many weights a sparsity leaves of all."""
        return round((1 - sparsity) * self.total)

    def magnitudes(self) -> Mapping[str, Tensor]:
        """name -> |w|, one layer at a time."""
        return _Lazy(self.weights, lambda weight: weight.detach().abs())

    def gradient(self, name: str) -> Tensor:
        """The gradient of the last step for all of a weight, absent positions too.

        Raises:
            BillhookError: it is not there or not finite.
        """
        found = self._withheld[name] if name in self._withheld else self.weights[name].grad
        if found is None:
            raise BillhookError(
                f"{name} has no gradient at step {self.taken}, and {self.method.name} ranks by it: call pruner.step() "
                "after optimizer.step() and before zero_grad(), and exclude weights that the loss does not reach."
            )
        if not finite(found):
            raise BillhookError(
                f"The gradient of {name} is not finite at step {self.taken}, so nothing can be ranked by it: lower the "
                "learning rate or clip gradients."
            )
        return found

    def set_masks(self, masks: Masks) -> None:
        """Take over masks; says so where a layer has no weight left."""
        for name, mask in masks.items():
            if not bool(mask.any()) and bool(self.masks[name].any()):
                self.notes.append(f"{name} lost its last weight at step {self.taken}.")
            self.masks[name] = mask.to(self.weights[name].device)

    def prune_globally(self, sparsity: float, scores: Mapping[str, Tensor] | None = None) -> None:
        """Keep the largest scores (|w| by default) of all layers together; `sparsity` of the weights is then absent."""
        keep = min(self.keep(sparsity), self.active)
        self.set_masks(_masks.keep_globally(self.magnitudes() if scores is None else scores, self.masks, keep))

    def prune_layers(self, keep: Mapping[str, int], scores: Mapping[str, Tensor] | None = None) -> None:
        """Keep the given number of largest scores (|w| by default) of each layer."""
        scores = self.magnitudes() if scores is None else scores
        self.set_masks({n: _masks.keep_in_layer(scores[n], mask, keep[n]) for n, mask in self.masks.items()})

    def start_from(self, counts: Mapping[str, int]) -> None:
        """A random mask with the given number of weights in each layer.

        Raises:
            BillhookError: a layer would have none.
        """
        empty = next((name for name, count in counts.items() if count < 1), None)
        if empty is not None:
            raise BillhookError(
                f"{empty} has {self.weights[empty].numel()} weights and would keep none at sparsity "
                f"{self.method.sparsity:g}: lower the sparsity, or exclude it."
            )
        shapes = self.shapes
        self.set_masks({n: _masks.random_mask(shapes[n], count, self.generator) for n, count in counts.items()})

    def exchange(self, fraction: float, growth: Growth) -> None:
        """In every layer, drop this fraction of its weights (the smallest) and grow as many."""
        for name, mask in self.masks.items():
            count = math.ceil(round(fraction * int(mask.sum()), 6))
            if count:
                signal = self.gradient(name) if growth == "gradient" else None
                self.masks[name] = _masks.exchange(self.weights[name], mask, count, growth, signal, self.generator)

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the states of model and optimizer: tensors and plain values."""
        return {
            "method": self.method.text(),
            "taken": self.taken,
            "total_steps": self.total_steps,
            "begun": self._begun,
            "overdue": self._overdue,
            "notes": list(self.notes),
            "generator": self.generator.get_state(),
            "masks": {name: _masks.pack(mask) for name, mask in self.masks.items()},
            "memory": {name: tensor.clone() for name, tensor in self.memory.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        A pruner that was attached without a state may have removed weights already: load the states of model and
        optimizer after it was attached, or give this one to `attach`.

        Raises:
            BillhookError: the state is of another model or method.
        """
        sizes = {name: (weight.numel() + 7) // 8 for name, weight in self.weights.items()}
        if {name: len(bits) for name, bits in state["masks"].items()} != sizes:
            raise BillhookError(
                f"The saved state is of another model ({len(state['masks'])} prunable weights, here {len(sizes)}, or "
                "of other shapes): resume with the model that it was saved with."
            )
        if state["method"] != self.method.text() or state["total_steps"] != self.total_steps:
            raise BillhookError(
                f"The saved state is of {state['method']} over {state['total_steps']} steps, not of "
                f"{self.method.text()} over {self.total_steps}: resume with the settings it was saved with."
            )
        self.taken, self._begun, self._overdue = state["taken"], state["begun"], state["overdue"]
        self.notes = list(state["notes"])
        self.generator.set_state(state["generator"].cpu())
        self.memory = {name: tensor.clone() for name, tensor in state["memory"].items()}
        self.masks = {
            name: _masks.unpack(state["masks"][name], weight.shape).to(weight.device)
            for name, weight in self.weights.items()
        }
        self._enforce(moments=True)

    # -- inside ---------------------------------------------------------------------------------------------

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._begun:
            self._begun = True
            self.method.before_first_step(self)
            self._enforce(moments=False)
        # a fused optimizer skips the step of an overflow by itself
        self._optimizer_stepped = not bool(getattr(optimizer, "found_inf", None))
        if not (self.method.needs_gradients and self._due(self.taken + 1)):
            self._clear_gradients()
        elif self.method.stands_still:
            self._withhold_gradients()

    def _due(self, step: int) -> bool:
        return self._overdue or self.method.due(step, self.total_steps)

    def _withhold_gradients(self) -> None:
        """Keep the gradients for the update; an optimizer moves no parameter without one, by momentum neither."""
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer undoes a loss scaler's by itself
        self._withheld = {
            name: weight.grad if scale is None or weight.grad is None else weight.grad / scale
            for name, weight in self.weights.items()
        }
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def _clear_gradients(self) -> None:
        pairs = [(w.grad, self.masks[n]) for n, w in self.weights.items() if w.grad is not None]
        if pairs:
            torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    @torch.no_grad()
    def _enforce(self, moments: bool) -> None:
        """Zero absent weights and, where the mask changed or the optimizer saw their gradients, their moments."""
        tensors, masks = [], []
        for name, weight in self.weights.items():
            tensors.append(weight.data)
            masks.append(self.masks[name])
            for value in self.optimizer.state.get(weight, {}).values() if moments else ():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                    tensors.append(value)
                    masks.append(self.masks[name])
        torch._foreach_mul_(tensors, masks)

    def _refuse_unheld(self) -> None:
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, weight in self.weights.items():
            if id(weight) not in trained:
                raise BillhookError(
                    f"The optimizer does not train {name}: make it from the model's present parameters, or exclude "
                    "that weight."
                )
            if weight in _owned:
                raise BillhookError(
                    f"{name} belongs to another pruner ({_owned[weight]}) already: finalize or detach that one first."
                )

    def _refuse_unequal(self) -> None:
        """Processes that disagree about the mask would drift apart unnoticed."""
        if distributed.world() == 1:
            return
        seen = [0] * distributed.world()
        here = 0
        for mask in self.masks.values():
            here = zlib.crc32(_masks.pack(mask).numpy().tobytes(), here)
        dist.all_gather_object(seen, here)
        if len(set(seen)) > 1:
            raise BillhookError(
                f"The processes disagree about the mask at step {self.taken}: their weights or gradients differ; wrap "
                "the model for data-parallel training, and give every process the same weights."
            )


class _Lazy(Mapping[str, Tensor]):
    """A value per weight, computed when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        self._weights, self._make = weights, make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(self._weights[name])

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _is_wrapped(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise BillhookError(
                f"{type(optimizer).__name__} is not a torch optimizer: give the one that trains the model."
            )
        optimizer = inner
    return optimizer


PRUNERS: Registry[SparseTraining] = Registry("pruner")
pruner = PRUNERS.register
