"""Training a classifier on images in memory, by Accelerate."""

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
from billhook.tasks.images import Images
from billhook.training import Pruner, SparseTraining, Stretch
from billhook.training.schedules import cosine
from billhook.training.state import pack_optimizer, pack_state, unpack_optimizer, unpack_state

_KEEP_SECONDS = 60.0


@dataclass(frozen=True)
class Training:
    """A recipe of training: SGD with Nesterov momentum on cross-entropy, and a cosine from `lr` to 0 after a warm-up.

    Called with a model and a stretch it is a training function for methods that own several runs.

    Attributes:
        images: what to train on.
        epochs, batch, lr, momentum, weight_decay: as usual.
        augment: shift images by up to an eighth and flip them.
        warmup: fraction of the training.
        clip: norm to which gradients are clipped, if any.
        label: what the progress bar says.
    """

    images: Images
    epochs: float = 10
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    warmup: float = 0.05
    clip: float | None = None
    label: str = "train"

    def steps(self, length: float = 1.0) -> int:
        """Optimizer steps of a training."""
        return max(1, round(length * self.epochs * len(self.images.train) / self.batch))

    def rate(self, progress: float) -> float:
        """Factor on the learning rate at a fraction of the training."""
        if progress < self.warmup:
            return progress / self.warmup
        return cosine(progress - self.warmup, 1 - self.warmup, 1.0)

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
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        pruner = None
        if method is not None:
            pruner = method.attach(model, optimizer, last - begin, saved and saved["pruner"])
        prepared, optimizer = accelerator.prepare(model, optimizer)
        prepared.train()
        images, labels = self.images.train.to(accelerator.device), self.images.train_labels.to(accelerator.device)
        rate = stretch.rate or self.rate
        share, rank = accelerator.num_processes, accelerator.process_index
        written = time.monotonic()
        with bar(self.label, last - begin) as advance:
            advance(advance=first - begin)
            for step in range(first, last):
                if keep is not None and accelerator.is_main_process and time.monotonic() - written > _KEEP_SECONDS:
                    _write(keep, step, model, optimizer, pruner)
                    written = time.monotonic()
                chosen, generator = self._batch(step, stretch.seed)
                chosen = chosen[rank::share]
                x = images[chosen.to(images.device)]
                if self.augment:
                    x = shifted_and_flipped(x, generator)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * rate(step / total)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(prepared(x), labels[chosen.to(labels.device)])
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

    def _batch(self, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
        """Which images a step sees: a function of seed and step alone."""
        per_epoch = max(1, len(self.images.train) // self.batch)
        epoch, place = divmod(step, per_epoch)
        order = _order(len(self.images.train), 1_000_003 * seed + epoch)
        draws = torch.Generator().manual_seed((1_000_003 * seed + step) * 2 + 1)
        return order[place * self.batch : (place + 1) * self.batch], draws

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Fraction of the test images that are named right."""
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        right = 0
        for x, y in zip(*(torch.split(t, 500) for t in (self.images.test, self.images.test_labels)), strict=True):
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        model.train(training)
        return right / len(self.images.test)


def shifted_and_flipped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size in both directions (zeros come in), and flipped or not."""
    n, _, height, width = x.shape
    reach = height // 8
    shift = torch.randint(0, 2 * reach + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    padded = nn.functional.pad(x, (reach,) * 4)
    rows = (torch.arange(height) + shift[0][:, None])[:, :, None]
    columns = torch.arange(width).expand(n, width)
    columns = (torch.where(flip[:, None], columns.flip(1), columns) + shift[1][:, None])[:, None, :]
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2).contiguous()


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
