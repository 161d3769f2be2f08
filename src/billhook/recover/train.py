"""One small optimisation loop for every recovery: AdamW on a few parameters, everything else frozen."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.calibrate import distributed
from billhook.errors import BillhookError
from billhook.system import finite

_FIRST_SCALE = 2.0**16


def linear_schedule(step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate at `step` (from 0): up in a line to 1 at `warmup_steps`, then down to 0 at `steps`.

    No step has the factor 0, so each of them is of use.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (steps - step) / (steps - warmup_steps)


@dataclass(frozen=True)
class _Trainable:
    """A parameter and what the optimizer steps on: itself, or its float32 master."""

    name: str
    parameter: nn.Parameter
    master: nn.Parameter

    def gather(self) -> None:
        """Move the parameter's gradient to its master, added to what is there."""
        gradient = self.parameter.grad
        if self.master is self.parameter or gradient is None:
            return
        wide = gradient.to(self.master.dtype)
        self.master.grad = wide if self.master.grad is None else self.master.grad.add_(wide)
        self.parameter.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Round the master into the parameter."""
        if self.master is not self.parameter:
            self.parameter.copy_(self.master)


class Loop:
    """AdamW, linear warm-up and decay unless told otherwise, on chosen parameters of a module.

    Parameters stored in bfloat16 or float16 have a float32 master that the optimizer steps on (small updates would
    vanish otherwise); after each step it is rounded into the parameter, so that the module is plain and up to date
    whenever the loop is not running. If the module holds float16 parameters, the loss is scaled before the backward
    pass; where gradients overflow, the scale is halved and the step is taken again, with the same draws.

    A loop that is killed goes on from its `state_dict` with the same bits as one that was not, if `loss` depends on
    nothing but its argument, the parameters and `generator`. The module's mode is left as it is: dropout draws from
    the global generator, which is not saved.

    Args:
        module: what is frozen, but for the trained parameters, while steps are taken. Flags are restored after.
        groups: group -> (name -> parameter), as `parameters_of` gives them; no parameter twice.
        lr: peak learning rate, one for all groups or one for each.
        loss: the mean loss of micro-batch i, a scalar; i counts from 0 to steps · accumulate − 1. Called with
            gradients enabled.
        steps: optimizer steps in all.
        warmup: share of the steps that warms up.
        accumulate: micro-batches per step; their mean loss is what is minimised.
        autocast: compute the loss under bfloat16 autocast.
        generator: what `loss` draws from, saved and restored with the rest.
        weight_decay: of all parameters, decoupled.
        clip: largest norm of the gradient of all parameters together; None: none.
        constant: keep the learning rate at its peak from the first step on.

    Attributes:
        step: optimizer steps taken.
        losses: the loss of each of them, before its update.

    Raises:
        BillhookError: nothing to train, a parameter twice, or a value out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Mapping[Any, Mapping[str, nn.Parameter]],
        lr: float | Mapping[Any, float],
        loss: Callable[[int], Tensor],
        steps: int,
        *,
        warmup: float = 0.1,
        accumulate: int = 1,
        autocast: bool = False,
        generator: torch.Generator | None = None,
        weight_decay: float = 0.0,
        clip: float | None = None,
        constant: bool = False,
    ) -> None:
        if steps < 0 or accumulate < 1 or not 0 <= warmup <= 1:
            raise BillhookError(
                f"steps={steps}, accumulate={accumulate}, warmup={warmup} do not describe a training: use steps >= 0, "
                "accumulate >= 1 and a warmup between 0 and 1."
            )
        self.module = module
        self.loss = loss
        self.steps = steps
        self.accumulate = accumulate
        self.autocast = autocast
        self.generator = generator
        self.clip = clip
        self.constant = constant
        self.step = 0
        self.losses: list[float] = []
        self._warmup_steps = round(warmup * steps)
        self._trainables: list[_Trainable] = []
        self._rates: list[float] = []
        optimized = []
        for group, parameters in groups.items():
            members = [_trainable(f"{group}/{name}", parameter) for name, parameter in parameters.items()]
            if members:
                self._trainables += members
                self._rates.append(_rate(lr, group))
                optimized.append({"params": [member.master for member in members], "lr": self._rates[-1]})
        if not self._trainables:
            raise BillhookError("There is nothing to train: all groups of parameters are empty.")
        if len({id(t.parameter) for t in self._trainables}) < len(self._trainables):
            raise BillhookError("A parameter is in two groups, or twice in one: list each parameter once.")
        self._device = self._trainables[0].parameter.device.type
        half = any(p.dtype == torch.float16 for p in module.parameters())
        self._scale = _FIRST_SCALE if half else 1.0
        self._optimizer = torch.optim.AdamW(optimized, weight_decay=weight_decay)

    def run(self, until: int | None = None) -> list[float]:
        """Take steps until `until` of them are done (all, by default); returns the losses of all steps so far.

        Raises:
            BillhookError: the loss or its gradients are not finite, or the loss depends on nothing that is trained.
        """
        end = self.steps if until is None else min(until, self.steps)
        with self._others_frozen(), torch.enable_grad():
            while self.step < end:
                self._take_step()
        return list(self.losses)

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that a resume needs: of tensors and plain values, for `torch.save`."""
        state = {
            "step": self.step,
            "steps": self.steps,
            "losses": self.losses,
            "scale": self._scale,
            "optimizer": self._optimizer.state_dict(),
            "parameters": {t.name: t.master.detach() for t in self._trainables},
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        return copy.deepcopy(state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a loop over the same parameters; writes them into the module.

        Raises:
            BillhookError: the state is of another training.
        """
        shapes = {t.name: t.master.shape for t in self._trainables}
        saved = {name: tensor.shape for name, tensor in state["parameters"].items()}
        if saved != shapes or state["steps"] != self.steps or (state["generator"] is None) != (self.generator is None):
            raise BillhookError(
                f"The saved state is of another training ({state['steps']} steps on {len(saved)} parameters, here "
                f"{self.steps} on {len(shapes)}): resume with the settings it was saved with."
            )
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for trainable in self._trainables:
            trainable.master.copy_(state["parameters"][trainable.name])
            trainable.write()
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.losses = list(state["losses"])
        self._scale = state["scale"]

    def _take_step(self) -> None:
        draws = None if self.generator is None else self.generator.get_state()
        while True:
            value = self._gradients()
            gradients = [t.master.grad for t in self._trainables if t.master.grad is not None]
            value = _mean_over_processes(value, gradients)
            if all(finite(gradient) for gradient in gradients):
                break
            if self._scale <= 1:
                raise BillhookError(
                    f"The gradients are not finite at step {self.step}: lower the learning rate, or use a wider "
                    "--dtype."
                )
            self._scale /= 2
            if self.generator is not None and draws is not None:
                self.generator.set_state(draws)
        if self._scale != 1:
            for gradient in gradients:
                gradient.div_(self._scale)
        if self.clip is not None:
            nn.utils.clip_grad_norm_([t.master for t in self._trainables], self.clip)
        factor = 1.0 if self.constant else linear_schedule(self.step, self.steps, self._warmup_steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        for trainable in self._trainables:
            trainable.write()
        self.losses.append(value)
        self.step += 1

    def _gradients(self) -> float:
        """Accumulate the scaled gradients of one step in the masters; returns its loss."""
        total = 0.0
        for trainable in self._trainables:
            trainable.parameter.grad = trainable.master.grad = None
        for index in range(self.step * self.accumulate, (self.step + 1) * self.accumulate):
            with torch.autocast(self._device, torch.bfloat16, enabled=self.autocast):
                loss = self.loss(index)
            if not loss.requires_grad:
                raise BillhookError(
                    "The loss depends on none of the trained parameters: check the groups, and that it is computed "
                    "with gradients."
                )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise BillhookError(
                    f"The loss is not finite at step {self.step}: lower the learning rate, or use a wider --dtype."
                )
            wide = loss.to(torch.promote_types(loss.dtype, torch.float32))  # a scaled float16 would overflow
            (wide * (self._scale / self.accumulate)).backward()  # type: ignore[no-untyped-call]
            for trainable in self._trainables:
                trainable.gather()
            total += value / self.accumulate
        return total

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        trained = {id(t.parameter): t.parameter for t in self._trainables}
        touched = {**{id(p): p for p in self.module.parameters()}, **trained}
        before = {key: p.requires_grad for key, p in touched.items()}
        try:
            for key, parameter in touched.items():
                parameter.requires_grad_(key in trained)
            yield
        finally:
            for key, parameter in touched.items():
                parameter.requires_grad_(before[key])
            for trainable in self._trainables:
                trainable.parameter.grad = trainable.master.grad = None


def packed(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A `state_dict` of a loop as tensors and plain values, which a safetensors file can hold."""
    tensors = {f"parameters/{name}": tensor for name, tensor in state["parameters"].items()}
    for index, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    if state["generator"] is not None:
        tensors["generator"] = state["generator"]
    values = {key: state[key] for key in ("step", "steps", "losses", "scale")}
    return tensors, {**values, "groups": state["optimizer"]["param_groups"]}


def unpacked(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The `state_dict` that `packed` was given."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = tensor
    parameters = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith("parameters/")}
    state = {key: values[key] for key in ("step", "steps", "losses", "scale")}
    optimizer = {"state": moments, "param_groups": values["groups"]}
    return {**state, "optimizer": optimizer, "parameters": parameters, "generator": tensors.get("generator")}


def _trainable(name: str, parameter: nn.Parameter) -> _Trainable:
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return _Trainable(name, parameter, parameter)
    return _Trainable(name, parameter, nn.Parameter(parameter.detach().float()))


def _rate(lr: float | Mapping[Any, float], group: Any) -> float:
    if isinstance(lr, Mapping) and group not in lr:
        raise BillhookError(f"No learning rate is given for the group {group!r}: add it to lr.")
    rate = float(lr[group] if isinstance(lr, Mapping) else lr)
    if not (math.isfinite(rate) and rate >= 0):
        raise BillhookError(f"The learning rate of the group {group!r} is {rate}: use a number from 0 up.")
    return rate


def _mean_over_processes(value: float, gradients: list[Tensor]) -> float:
    """Average loss and gradients, these in place: every process has data of its own."""
    world = distributed.world()
    if world == 1:
        return value
    total = gradients[0].new_tensor([value], dtype=torch.float32)
    distributed.sum_([total, *gradients])
    for gradient in gradients:
        gradient.div_(world)
    return float(total) / world
