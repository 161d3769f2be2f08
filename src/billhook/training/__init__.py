"""Sparse training: masks that change while an optimizer trains."""

from billhook.training.hold import apply_masks, held
from billhook.training.pruner import PRUNERS, Pruner, SparseTraining, pruner
from billhook.training.stretch import Stretch, Train

__all__ = ["PRUNERS", "Pruner", "SparseTraining", "Stretch", "Train", "apply_masks", "held", "pruner"]
