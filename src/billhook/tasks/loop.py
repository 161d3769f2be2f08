"""Training a classifier on images in memory, by Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.progress import bar
from billhook.tasks.images import Images
from billhook.training import Pruner, SparseTraining, Stretch
from billhook.training.schedules import cosine


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
    after_step: Callable[[int, nn.Module], None] | None = field(default=None, compare=False)

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

    def prune(self, model: nn.Module, method: SparseTraining, seed: int = 0, length: float = 1.0) -> Pruner:
        """Train with a pruner; returns it finalized."""
        found: list[Pruner] = []

        def attach(optimizer: Any) -> Callable[[], None]:
            found.append(method.attach(model, optimizer, self.steps(length)))
            return found[0].step

        self.run(model, Stretch(seed=seed, length=length), attach)
        found[0].finalize()
        return found[0]

    def run(
        self, model: nn.Module, stretch: Stretch, attach: Callable[[Any], Callable[[], None]] | None = None
    ) -> None:
        """Train; `attach(optimizer)` returns what is called after every step.

        Raises:
            BillhookError: the loss is not finite.
        """
        accelerator = Accelerator()
        total = self.steps(stretch.length)
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )
        after = attach(optimizer) if attach is not None else None
        prepared, optimizer = accelerator.prepare(model, optimizer)
        prepared.train()
        images, labels = self.images.train.to(accelerator.device), self.images.train_labels.to(accelerator.device)
        rate = stretch.rate or self.rate
        share, rank = accelerator.num_processes, accelerator.process_index
        first, last = stretch.steps(total)
        with bar(self.label, last - first) as advance:
            for step in range(first, last):
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
                if after is not None:
                    after()
                if self.after_step is not None:
                    self.after_step(step, model)
                advance()

    def _batch(self, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
        """Which images a step sees: a function of seed and step alone."""
        per_epoch = max(1, len(self.images.train) // self.batch)
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(
            len(self.images.train), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)
        )
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
