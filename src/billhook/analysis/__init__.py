"""Measurements that decide what to prune and by how much, without pruning by themselves.

- `curve`: quality over any knob that removes more and more of a model; essential sparsity and its knees.
- `complexity`: how many features of a layer are left when equivalent ones count once.
- `masks`: how alike two masks are, and the near-zero weights of a model in pre-training.
"""

from billhook.analysis.complexity import feature_complexity
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
from billhook.sparsity.inequality import gini, pq_index

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
    "feature_complexity",
    "find_event",
    "gini",
    "hinge",
    "isotonic",
    "mask_similarity",
    "near_zero",
    "near_zero_thresholds",
    "pq_index",
]
