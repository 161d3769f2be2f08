"""Calibration: data, the walk over the blocks, and what is gathered on the way."""

from billhook.calibration.data import calibration, evaluation, fingerprint
from billhook.calibration.gram import Gram, inverse_cholesky
from billhook.calibration.journal import Journal
from billhook.calibration.statistics import ColumnNorm, Statistic
from billhook.calibration.walk import Block, Walk, walk

__all__ = [
    "Block",
    "ColumnNorm",
    "Gram",
    "Journal",
    "Statistic",
    "Walk",
    "calibration",
    "evaluation",
    "fingerprint",
    "inverse_cholesky",
    "walk",
]
