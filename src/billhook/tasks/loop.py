"""Training a network on a task in memory, by Accelerate."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.models.files import write_atomically
from billhook.progress import bar
from billhook.tasks.task import Task
from billhook.training import Pruner, SparseTraining, Stretch
from billhook.training.schedules import cosine
from billhook.training.state import pack_optimizer, pack_state, unpack_optimizer, unpack_state

_KEEP_SECONDS = 60.0


_OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True)
class Training:
    """A recipe of training: a warm-up to `lr`, a while at it, and a cosine from there to 0.

    Called with a model and a stretch it is a training function for methods that own several runs.

    Attributes:
        task: what to learn, on which data.
        epochs: of the training part.
        batch, lr, optimizer, weight_decay: examples per step, peak rate, sgd, adam or adamw, and decay; the task's own
            if not given.
        momentum: of sgd, Nesterov's.
        warmup, hold: fractions of the training that the rate rises, and that it then stays at `lr`.
        clip: norm to which gradients are clipped, if any.
        label: what the progress bar says.
    """

    task: Task
    epochs: float = 10
    batch: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    warmup: float = 0.05
    hold: float = 0.0
    clip: float | None = None
    label: str = "train"

    def __post_init__(self) -> None:
        if self.warmup + self.hold >= 1:
            raise BillhookError(
                f"warmup={self.warmup:g} and hold={self.hold:g} leave nothing of the training for the rate to fall in: "
                "their sum must be less than 1."
            )
        if self.of_optimizer not in _OPTIMIZERS:
            raise BillhookError(f"No optimizer {self.optimizer!r}: there are {', '.join(_OPTIMIZERS)}.")

    @property
    def per_step(self) -> int:
        """Examples of a step."""
        return min(self.batch or self.task.batch, self.task.examples)

    @property
    def peak(self) -> float:
        """The largest learning rate."""
        return self.task.lr if self.lr is None else self.lr

    @property
    def of_optimizer(self) -> str:
        return self.optimizer or self.task.optimizer

    def steps(self, length: float = 1.0) -> int:
        """Optimizer steps of a training."""
        return max(1, round(length * self.epochs * self.task.examples / self.per_step))

    def rate(self, progress: float) -> float:
        """Factor on the learning rate at a fraction of the training."""
        if progress < self.warmup:
            return progress / self.warmup
        begin = self.warmup + self.hold
        return 1.0 if progress < begin else cosine(progress - begin, 1 - begin, 1.0)

    def __call__(self, model: nn.Module, stretch: Stretch | None = None) -> None:
        """Train over a stretch (everything by default)."""
        self.run(model, stretch or Stretch())

    def prune(
        self, model: nn.Module, method: SparseTraining, seed: int = 0, length: float = 1.0, keep: Path | None = None
    ) -> Pruner:
        """Train with a pruner; returns it finalized. `keep` is as in `run`."""
        found = self.run(model, Stretch(seed=seed, length=length), method, keep)
        assert found is not None
        found.finalize()
        return found

    def run(
        self, model: nn.Module, stretch: Stretch, method: SparseTraining | None = None, keep: Path | None = None
    ) -> Pruner | None:
        """Train, with a pruner if a method is given; returns it at the end of its work.

        Args:
            model: in place.
            stretch: which part of the training.
            method: what prunes.
            keep: a file that the state is written to every minute; where it is there, the training goes on from it, to
                the same bits.

        Raises:
            BillhookError: the loss is not finite.
        """
        accelerator = Accelerator()
        total = self.steps(stretch.length)
        begin, last = stretch.steps(total)
        first = begin
        saved = _read(keep) if keep is not None and keep.is_file() else None
        if saved is not None:
            model.load_state_dict(saved["model"])
        optimizer: Any = self._optimizer(model)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        pruner = None
        if method is not None:
            pruner = method.attach(model, optimizer, last - begin, saved and saved["pruner"])
        prepared, optimizer = accelerator.prepare(model, optimizer)
        prepared.train()
        rate = stretch.rate or self.rate
        share, rank = accelerator.num_processes, accelerator.process_index
        written = time.monotonic()
        with bar(self.label, last - begin) as advance:
            advance(advance=first - begin)
            for step in range(first, last):
                if keep is not None and accelerator.is_main_process and time.monotonic() - written > _KEEP_SECONDS:
                    _write(keep, step, model, optimizer, pruner)
                    written = time.monotonic()
                chosen, draws = self._batch(step, stretch.seed)
                for group in optimizer.param_groups:
                    group["lr"] = self.peak * rate(step / total)
                optimizer.zero_grad()
                loss = self.task.loss(prepared, chosen[rank::share], draws)
                if not bool(torch.isfinite(loss)):
                    raise BillhookError(
                        f"The loss is not finite at step {step} of {total}: lower the learning rate, or clip gradients."
                    )
                accelerator.backward(loss)
                if self.clip is not None:
                    accelerator.clip_grad_norm_(prepared.parameters(), self.clip)
                optimizer.step()
                if pruner is not None:
                    pruner.step()
                advance()
        return pruner

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = model.parameters()
        decay = self.task.weight_decay if self.weight_decay is None else self.weight_decay
        if self.of_optimizer == "sgd":
            return torch.optim.SGD(parameters, self.peak, self.momentum, weight_decay=decay, nesterov=self.momentum > 0)
        kind = torch.optim.AdamW if self.of_optimizer == "adamw" else torch.optim.Adam
        return kind(parameters, self.peak, weight_decay=decay)

    def _batch(self, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
        """Which examples a step sees: a function of seed and step alone."""
        per_epoch = max(1, self.task.examples // self.per_step)
        epoch, place = divmod(step, per_epoch)
        order = _order(self.task.examples, 1_000_003 * seed + epoch)
        draws = torch.Generator().manual_seed((1_000_003 * seed + step) * 2 + 1)
        return order[place * self.per_step : (place + 1) * self.per_step], draws

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """The task's metric on its test part."""
        training = model.training
        model.eval()
        try:
            return self.task.measure(model)
        finally:
            model.train(training)

    def score(self, model: nn.Module) -> float:
        """The same with a sign by which more is better, as methods that compare runs ask for it."""
        value = self.measure(model)
        return value if self.task.higher else -value

    @torch.no_grad()
    def try_out(self, model: nn.Module) -> None:
        """See whether the network takes the task's data, before work starts.

        Raises:
            BillhookError: it does not.
        """
        training = model.training
        model.eval()
        try:
            self.task.loss(model, torch.arange(min(2, self.task.examples)), torch.Generator().manual_seed(0))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BillhookError(
                f"The network does not take this data ({reason}): its options must fit sizes, channels and classes."
            ) from None
        finally:
            model.train(training)


@lru_cache(maxsize=1)  # a step of the same epoch asks for the same
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _write(path: Path, step: int, model: nn.Module, optimizer: Any, pruner: Pruner | None) -> None:
    moments, groups = pack_optimizer(getattr(optimizer, "optimizer", optimizer))
    tensors = {f"model/{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor.contiguous() for name, tensor in moments.items()}
    values: dict[str, Any] = {"step": step, "optimizer": groups}
    if pruner is not None:
        masks, values["pruner"] = pack_state(pruner.state_dict())
        tensors |= {f"pruner/{name}": tensor for name, tensor in masks.items()}
    write_atomically(path, [save(tensors, {"values": json.dumps(values)})])


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["values"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "pruner": {}}
        for name in file.keys():  # noqa: SIM118 -- not a mapping
            group, _, rest = name.partition("/")
            parts[group][rest] = file.get_tensor(name)
    pruner = unpack_state(parts["pruner"], values["pruner"]) if "pruner" in values else None
    optimizer = unpack_optimizer(parts["optimizer"], values["optimizer"])
    return {"step": values["step"], "model": parts["model"], "optimizer": optimizer, "pruner": pruner}
