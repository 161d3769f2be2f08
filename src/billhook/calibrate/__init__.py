"""Calibration: data, the walk over the blocks, and what is gathered on the way."""

from billhook.calibrate.data import calibration, evaluation, fingerprint
from billhook.calibrate.gram import Gram, inverse_cholesky
from billhook.calibrate.journal import Journal
from billhook.calibrate.statistics import ColumnNorm, Statistic
from billhook.calibrate.walk import Block, Walk

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
]
