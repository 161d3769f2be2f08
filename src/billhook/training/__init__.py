"""Sparse training: masks that change while an optimizer trains."""

from billhook.training.hold import apply_masks, held
from billhook.training.pruner import PRUNERS, Pruner, SparseTraining, pruner

__all__ = ["PRUNERS", "Pruner", "SparseTraining", "apply_masks", "held", "pruner"]
