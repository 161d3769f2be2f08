"""Pruning inside `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from billhook.errors import BillhookError
from billhook.training.pruner import Pruner, SparseTraining
from billhook.training.state import load_state, save_state

_FILE = "pruner.safetensors"


class PruneCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """A callback that prunes while a Trainer trains, and is saved and resumed with its checkpoints.

        Trainer(model, args, train_dataset=data, callbacks=[bh.PruneCallback(bh.GraNet(sparsity=0.9))]).train()

    Attributes:
        pruner: at work or finished; None before the training.
    """

    def __init__(self, method: SparseTraining) -> None:
        self.method = method
        self.pruner: Pruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pruner is not None:
            self.pruner.detach()
        saved = None
        if state.global_step:
            given = args.resume_from_checkpoint
            saved = load_state((Path(given) if isinstance(given, str) else _checkpoint(args, state)) / _FILE)
        self.pruner = self.method.attach(kwargs["model"], kwargs["optimizer"], state.max_steps, saved)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_work.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_state(self._at_work.state_dict(), _checkpoint(args, state) / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at_work.finalize(force=self._at_work.taken < self._at_work.total_steps)  # stopped early by the user

    @property
    def _at_work(self) -> Pruner:
        if self.pruner is None:
            raise BillhookError("The pruning callback was not there when the training began: give it to the Trainer.")
        return self.pruner


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
