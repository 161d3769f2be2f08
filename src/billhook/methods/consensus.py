"""Consensus gates: gates that look at each input are trained until all inputs agree, then closed parts are removed.

    gates = bh.ConsensusGates(keep=0.5).attach(model, optimizer, total_steps=steps, example=x[:1])
    for x, y in batches:
        optimizer.zero_grad()
        (loss_fn(model(x), y) + gates.loss()).backward()
        optimizer.step()
        gates.step()
    print(gates.consensus(clean_batches))
    model = gates.finalize()

Attach before a learning-rate scheduler is made; evaluate under `torch.no_grad()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
from pydantic import Field
from torch import Tensor, nn

from billhook.calibrate import distributed
from billhook.declared import Declared, Paper
from billhook.errors import BillhookError
from billhook.training.gateable import Units, call, find_units
from billhook.training.gating import Cost, Factor, GateInput, Hooks, PooledGate, budget, polarisation, share_of

DECIDED = 0.98  # a gate is decided where this share of the inputs agrees
SLACK = 0.05  # how much more than `keep` may stay without asking

_gated: WeakSet[nn.Module] = WeakSet()


class ConsensusGates(Declared):
    kind = "gating"
    name = "consensus"
    title = "Consensus gates"
    paper = Paper(
        "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
        "X. Zhi, V. Babbar, R. Liu, P. Sun, F. Silavong, R. Shi, S. Moran",
        "arXiv 2023",
        "2302.10798",
    )
    summary = (
        "Trains a small gate per block, channel, head or neuron together with the weights, drives the mean of its "
        "decisions over a batch to 0 or 1, and removes what every input leaves closed."
    )
    when = (
        "When a network is trained or fine-tuned for long anyway, and should be narrower or shallower at the end. The "
        "training itself is not faster."
    )
    needs: ClassVar[str] = "training"

    units: Units = Field("channel", description="What carries gates: block, channel, neuron or head.")
    keep: float = Field(0.5, gt=0, le=1, description="Share of the cost of all gated parts that stays.")
    cost: Literal["gates", "flops"] = Field("gates", description="What is counted: gates, or their FLOPs.")
    lam_pol: float = Field(2.0, ge=0, description="Weight of the disagreement between inputs.")
    lam_act: float = Field(10.0, ge=0, description="Weight of the squared distance from `keep`.")
    ramp: float = Field(0.3, ge=0, le=1, description="Part of the training in which lam_pol rises from 0.")
    freeze: float = Field(0.15, ge=0, lt=1, description="Part of the training at its end with constant gates.")
    gate_input: GateInput = Field(
        "mean",
        description="What a gate sees: the mean over space or tokens, the first token, or nothing (a learned mask).",
    )
    stop_gradient: bool = Field(False, description="Whether gates do not train the features that they look at.")
    hidden: int | None = Field(None, ge=1, description="Hidden width of a gate; max(8, a quarter of what it sees).")
    bias: float = Field(1.0, gt=0, description="Logit of all gates at first.")
    inputs: int = Field(2048, ge=1, description="How many inputs the consensus is read from.")
    repair: bool = Field(False, description="Whether doubtful gates are flipped until the cost is `keep`.")
    draw: int = Field(0, ge=0, description="Seed of the gates' first weights.")

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, example: Any) -> Gates:
        """Put gates on `model` and their parameters into a new group of `optimizer`, without weight decay.

        Args:
            model: any module, on its device.
            optimizer: of its parameters; the gates get the learning rate of its first group.
            total_steps: optimizer steps of the whole training.
            example: an input to find the units and count FLOPs with: a tensor, a tuple of all inputs, or a mapping of
                keyword arguments. A batch of one will do.

        Raises:
            BillhookError: the model has no such units, gates already or several processes; a scheduler holds the
                optimizer; gates of a language model would see the tokens that it predicts.
        """
        return Gates(self, model, optimizer, total_steps, example)


@dataclass(frozen=True)
class Consensus:
    """What the gates decide over a set of inputs.

    Attributes:
        inputs: how many.
        means: name of the unit -> share of the inputs for which each gate is open, [gates].
        opened: name of the unit -> what stays, bool [gates].
        agreement: name of the unit -> share of the inputs that decide as `opened` does, [gates].
        share: cost of what stays, over that of all gated parts.
        guarded: units that every input would close, of which one part stays because the network would not run.
    """

    inputs: int
    means: dict[str, Tensor]
    opened: dict[str, Tensor]
    agreement: dict[str, Tensor]
    share: float
    guarded: list[str]

    @property
    def least(self) -> float:
        return min(float(a.min()) for a in self.agreement.values())

    @property
    def mean(self) -> float:
        return float(torch.cat(list(self.agreement.values())).mean())

    @property
    def undecided(self) -> float:
        """Share of the gates on which fewer than 98% of the inputs agree."""
        return float((torch.cat(list(self.agreement.values())) < DECIDED).float().mean())

    def __str__(self) -> str:
        stay = sum(int(o.sum()) for o in self.opened.values())
        return (
            f"{stay} of {sum(len(o) for o in self.opened.values())} gates stay open ({self.share:.1%} of the cost); "
            f"agreement over {self.inputs} inputs: {self.mean:.4f} on average, {self.least:.4f} at least, "
            f"{self.undecided:.1%} of the gates undecided"
        )


class Gates:
    """Gates at work on one model; made by `ConsensusGates.attach`.

    Attributes:
        method: what is declared.
        units: what carries gates; gates: the module of each.
        taken: steps so far; total_steps: all of them.
        opened: what stays, a bool tensor [gates] per unit, once there is a consensus.
        frozen: whether that is what the forward pass uses, for all inputs.
    """

    def __init__(
        self,
        method: ConsensusGates,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        example: Any,
    ) -> None:
        if total_steps < 1:
            raise BillhookError(f"total_steps={total_steps} is not a training: give the number of optimizer steps.")
        _refuse(method, model, optimizer)
        self.method, self.model, self.optimizer, self.total_steps = method, model, optimizer, total_steps
        found = find_units(method.units, model, example)
        self.units, self._remove, self._flops, self._flop_costs = found.units, found.remove, found.flops, found.costs
        self.costs = found.costs if method.cost == "flops" else _each_alike([unit.gates for unit in self.units])
        generator = torch.Generator().manual_seed(method.draw)
        device = next(model.parameters()).device
        reads = method.gate_input != "none"
        self.gates = nn.ModuleList(
            PooledGate(unit.channels if reads else None, unit.gates, method.hidden, method.bias, generator).to(device)
            for unit in self.units
        )
        self.taken = 0
        self.opened: list[Tensor] | None = None
        self._running: list[Tensor] | None = None  # means over about the last `inputs` training inputs
        self._finished = False
        self._hooks = Hooks(model, self.units, list(self.gates), method.gate_input)  # type: ignore[arg-type]
        self._hooks.stop_gradient = method.stop_gradient
        rate = optimizer.param_groups[0]["lr"]
        optimizer.add_param_group({"params": list(self.gates.parameters()), "weight_decay": 0.0, "lr": rate})
        _gated.add(model)

    @property
    def frozen(self) -> bool:
        return self._hooks.static is not None

    # the loop

    def loss(self) -> Tensor:
        """What is added to the loss of the task, a scalar: lam_act (share - keep)² + lam_pol mean m (1 - m).

        For the last forward pass, once; zero when the gates are frozen.

        Raises:
            BillhookError: no forward pass with gradients since the last loss, or of a single input.
        """
        self._refuse_finished()
        if self.frozen:
            return torch.zeros((), device=next(self.gates.parameters()).device)
        decisions = self._hooks.taken()
        if len(decisions[0]) == 1 and self.method.gate_input != "none":
            raise BillhookError(
                "A batch of one input always agrees with itself, so its gates cannot be polarised: train with batches "
                "of several inputs, better 64 or more."
            )
        means = [z.mean(0) for z in decisions]
        # without input every decision is the gate's own: there is nothing to average
        weight = min(1.0, len(decisions[0]) / self.method.inputs) if self.method.gate_input != "none" else 1.0
        with torch.no_grad():
            before = self._running or means
            self._running = [old + (new - old) * weight for old, new in zip(before, means, strict=True)]
        method = self.method
        loss = method.lam_act * budget(share_of(self.costs, means), method.keep)
        return loss.to(means[0].dtype) + self._polarisation_weight() * polarisation(means)

    def step(self) -> None:
        """After `optimizer.step()`: near the end of the training the consensus of the last batches becomes constant.

        Raises:
            BillhookError: past `total_steps`.
        """
        self._refuse_finished()
        if self.taken >= self.total_steps:
            raise BillhookError(
                f"The gates were attached for {self.total_steps} steps, and this is one more: give attach the number "
                "of optimizer steps of the whole training."
            )
        self.taken += 1
        last = round(self.method.freeze * self.total_steps)
        if last and self.taken >= self.total_steps - last and not self.frozen:
            self.freeze()

    def freeze(self, loader: Iterable[Any] | None = None) -> None:
        """Make the consensus constant for all inputs; the weights train on with it.

        Args:
            loader: as in `consensus`; the latest training batches unless given.

        Raises:
            BillhookError: nothing was trained yet, and no loader is given.
        """
        self._refuse_finished()
        if self.frozen:
            return
        if loader is not None:
            self.consensus(loader)
        elif self._running is None:
            raise BillhookError("The gates have decided nothing yet: train with gates.loss(), or freeze(loader).")
        else:
            self.opened, _ = self._decided(self._running)
        self._make_static()

    # the end

    @torch.no_grad()
    def consensus(self, loader: Iterable[Any]) -> Consensus:
        """Ask the gates about inputs, in evaluation mode; what stays follows from it unless it is frozen.

        Args:
            loader: shuffled batches of clean inputs (no augmentation), of which about `inputs` are read. A batch is an
                input (tensor, or mapping of keyword arguments), or a tuple or list with the input first.

        Raises:
            BillhookError: there is no batch.
        """
        self._refuse_finished()
        static, self._hooks.static = self._hooks.static, None
        modes = [(module, module.training) for module in self.model.modules()]
        sums, count = [torch.zeros(u.gates, dtype=torch.float64) for u in self.units], 0
        try:
            self.model.eval()
            for batch in loader:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                call(self.model, inputs)
                size = _batch_size(inputs)
                for total, z in zip(sums, self._hooks.seen, strict=True):
                    assert z is not None
                    total += z.double().mean(0).cpu() * size
                count += size
                if count >= self.method.inputs:
                    break
        finally:
            self._hooks.static = static
            for module, mode in modes:
                module.training = mode
        if count == 0:
            raise BillhookError("There is no batch to read the consensus from: give a loader with inputs.")
        means = [total / count for total in sums]
        guarded: list[str] = []
        if not self.frozen:
            self.opened, guarded = self._decided(means)
        assert self.opened is not None
        opened = [o.cpu() for o in self.opened]
        names = [unit.name for unit in self.units]
        agree = [torch.where(o, m, 1 - m) for o, m in zip(opened, means, strict=True)]
        return Consensus(
            count,
            dict(zip(names, means, strict=True)),
            dict(zip(names, opened, strict=True)),
            dict(zip(names, agree, strict=True)),
            float(share_of(self.costs, [o.double() for o in opened])),
            guarded,
        )

    def flops(self) -> int:
        """Floating-point operations on the example of the network that is left.

        Raises:
            BillhookError: there is no consensus yet.
        """
        opened = self._agreed()
        share = float(share_of(self._flop_costs, [o.double() for o in opened]))
        removable = sum(cost.whole for cost in self._flop_costs)
        return round(self._flops - (1 - share) * removable)

    def finalize(self, force: bool = False) -> nn.Module:
        """Remove gates and closed parts, in place, and return the model: a narrower plain module.

        Its parameters are new objects: make a new optimizer to train on.

        Args:
            force: also if more stays than `keep` says.

        Raises:
            BillhookError: there is no consensus yet, or by it more than 5% of the cost too much would stay.
        """
        self._refuse_finished()
        opened = self._agreed()
        share = float(share_of(self.costs, [o.double() for o in opened]))
        if share > self.method.keep + SLACK and not force:
            raise BillhookError(
                f"The parts that stay cost {share:.1%} and keep={self.method.keep:g} was asked for: train longer, use "
                "repair=True, or finalize(force=True)."
            )
        self.detach()
        self._remove(opened)
        return self.model

    def detach(self) -> None:
        """Let go of model and optimizer as they are, without gates."""
        self._hooks.remove()
        self._finished = True
        _gated.discard(self.model)
        first = next(self.gates.parameters())
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if not any(p is first for p in group["params"])]
        for parameter in self.gates.parameters():
            self.optimizer.state.pop(parameter, None)

    # state

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the states of model and optimizer: tensors and plain values."""
        return {
            "method": self.method.text(),
            "taken": self.taken,
            "total_steps": self.total_steps,
            "gates": {name: tensor.clone() for name, tensor in self.gates.state_dict().items()},
            "running": None if self._running is None else [m.clone() for m in self._running],
            "opened": None if self.opened is None else [o.clone() for o in self.opened],
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, after the model's and the optimizer's.

        Raises:
            BillhookError: the state is of another model or method.
        """
        if state["method"] != self.method.text() or state["total_steps"] != self.total_steps:
            raise BillhookError(
                f"The saved state is of {state['method']} over {state['total_steps']} steps, not of "
                f"{self.method.text()} over {self.total_steps}: resume with the settings it was saved with."
            )
        own = {name: tensor.shape for name, tensor in self.gates.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in state["gates"].items()}:
            raise BillhookError("The saved state is of another model: resume with the model that it was saved with.")
        device = next(self.gates.parameters()).device
        self.gates.load_state_dict(state["gates"])
        self.taken = state["taken"]
        self._running = None if state["running"] is None else [m.clone().to(device) for m in state["running"]]
        self.opened = None if state["opened"] is None else [o.clone().to(device) for o in state["opened"]]
        self._hooks.static = None
        if state["frozen"]:
            self._make_static()

    # inside

    def _polarisation_weight(self) -> float:
        rising = self.method.ramp * self.total_steps
        return self.method.lam_pol * (min(1.0, self.taken / rising) if rising else 1.0)

    def _decided(self, means: Sequence[Tensor]) -> tuple[list[Tensor], list[str]]:
        """What stays, from the means of all units; and the units of which one part stays only so that they run.

        Without repair a gate stays where most inputs open it. With repair gates are opened in the order of their means
        as long as that brings the cost nearer to `keep`: the most doubtful ones are flipped.
        """
        ranks = [m.detach().double().clone() for m in means]
        guarded = []
        for unit, rank in zip(self.units, ranks, strict=True):
            if unit.one_stays:
                if not bool((rank >= 0.5).any()):
                    guarded.append(unit.name)
                rank[int(rank.argmax())] += 2  # before all others
        if not self.method.repair:
            return [rank >= 0.5 for rank in ranks], guarded
        order = torch.cat(ranks).argsort(descending=True, stable=True)
        sizes = [len(rank) for rank in ranks]

        def open_first(count: int) -> list[Tensor]:
            flat = torch.zeros(len(order), dtype=torch.bool, device=order.device)
            flat[order[:count]] = True
            return list(torch.split(flat, sizes))

        def excess(count: int) -> float:
            return float(share_of(self.costs, [o.double() for o in open_first(count)])) - self.method.keep

        low, high = sum(unit.one_stays for unit in self.units), len(order)
        while high - low > 1:  # the cost grows with the count
            middle = (low + high) // 2
            low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
        return open_first(min((low, high), key=lambda count: abs(excess(count)))), guarded

    def _make_static(self) -> None:
        assert self.opened is not None
        device = next(self.gates.parameters()).device
        self._hooks.static = [o.float().to(device) for o in self.opened]
        for parameter in self.gates.parameters():
            parameter.grad = None  # momentum must not move what no longer decides

    def _agreed(self) -> list[Tensor]:
        if self.opened is None:
            raise BillhookError("There is no consensus yet: call gates.consensus(loader), or gates.freeze(), first.")
        return [o.cpu() for o in self.opened]

    def _refuse_finished(self) -> None:
        if self._finished:
            raise BillhookError("The gates have been finalized: attach new ones to go on.")


def _each_alike(sizes: Sequence[int]) -> list[Cost]:
    """Every gate of all units costs the same."""
    return [Cost(float(size), (Factor(0.0, ((unit, 1 / size),)),)) for unit, size in enumerate(sizes)]


def _batch_size(inputs: Any) -> int:
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return len(inputs)


def _refuse(method: ConsensusGates, model: nn.Module, optimizer: Any) -> None:
    if model in _gated:
        raise BillhookError(f"{type(model).__name__} carries gates already: finalize or detach those first.")
    if distributed.world() > 1 or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise BillhookError("Gates are trained in one process on one device: give the model itself, unwrapped.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise BillhookError(f"{type(optimizer).__name__} is not a torch optimizer: give the one that trains the model.")
    if "initial_lr" in optimizer.param_groups[0]:
        raise BillhookError(
            "A learning-rate scheduler holds the optimizer already and would leave the gates out: attach the gates "
            "first, then make the scheduler."
        )
    generates = getattr(model, "can_generate", None)
    if method.gate_input == "mean" and callable(generates) and generates():
        raise BillhookError(
            f"{type(model).__name__} predicts tokens, and gates with gate_input=mean would see them: use "
            "gate_input=first or gate_input=none."
        )
