"""Sparse training: masks that change while an optimizer trains."""

from billhook.training.hold import apply_masks, held
from billhook.training.pruner import PRUNERS, Pruner, SparseTraining, pruner
from billhook.training.runs import RUNS, Outcome, SeveralRuns
from billhook.training.stretch import Stretch, Train
from billhook.training.trainer import PruneCallback

__all__ = [
    "PRUNERS",
    "RUNS",
    "Outcome",
    "PruneCallback",
    "Pruner",
    "SeveralRuns",
    "SparseTraining",
    "Stretch",
    "Train",
    "apply_masks",
    "held",
    "pruner",
]
