"""Measurements that decide what to prune and by how much, without pruning by themselves.

- `curve`: quality over any knob that removes more and more of a model; essential sparsity and its knees.
- `masks`: how alike two masks are, and the near-zero weights of a model in pre-training.
"""

from billhook.analysis.curve import Curve, Hinge, Point, chord, essential_sparsity, hinge, isotonic
from billhook.analysis.masks import (
    Event,
    MaskSimilarity,
    corrected_cosine,
    cosine,
    find_event,
    mask_similarity,
    near_zero,
    near_zero_thresholds,
)

__all__ = [
    "Curve",
    "Event",
    "Hinge",
    "MaskSimilarity",
    "Point",
    "chord",
    "corrected_cosine",
    "cosine",
    "essential_sparsity",
    "find_event",
    "hinge",
    "isotonic",
    "mask_similarity",
    "near_zero",
    "near_zero_thresholds",
]
