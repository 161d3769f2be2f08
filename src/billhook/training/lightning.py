"""Pruning inside Lightning. Import it as `billhook.training.lightning`; it needs the package lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from billhook.errors import BillhookError

    raise BillhookError("The Lightning callback needs Lightning: pip install 'billhook[lightning]'.") from None

from billhook.errors import BillhookError
from billhook.training.pruner import Pruner, SparseTraining
from billhook.training.state import to_cpu


class PruneCallback(Callback):  # type: ignore[misc, unused-ignore]
    """A callback that prunes while a Lightning Trainer trains, and is saved and resumed with its checkpoints.

        Trainer(max_epochs=10, callbacks=[PruneCallback(bh.GraNet(sparsity=0.9))]).fit(module, loader)

    Attributes:
        pruner: at work or finished; None before the training.
    """

    def __init__(self, method: SparseTraining) -> None:
        self.method = method
        self.pruner: Pruner | None = None
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise BillhookError(
                f"The module has {len(trainer.optimizers)} optimizers, and a pruner steps with one: use the plain "
                "loop, with a pruner for each."
            )
        total = trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise BillhookError("The training has no known end: give the Trainer max_steps or max_epochs.")
        self.pruner = self.method.attach(pl_module, trainer.optimizers[0], int(total), self._saved)
        self._saved = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        # with accumulation, not every batch is a step
        if self.pruner is not None and trainer.global_step > self.pruner.taken:
            self.pruner.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.pruner is not None:
            self.pruner.finalize(force=self.pruner.taken < self.pruner.total_steps)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else to_cpu(self.pruner.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
