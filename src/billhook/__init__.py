"""billhook: prune, slice and merge trained neural networks.

import billhook as bh

model, tokenizer = bh.load("demo")
batches = bh.calibration("demo", tokenizer, samples=32, length=512)
report = bh.prune(model, bh.SparseGPT(sparsity=0.5), batches)
bh.save(model, tokenizer, "out/x", report)
"""

from billhook.anatomy import MLP, Anatomy, Attention, declare
from billhook.calibrate import ColumnNorm, Gram, Statistic, Walk, calibration, evaluation
from billhook.calibrate.walk import walk
from billhook.errors import BillhookError
from billhook.export import save
from billhook.measure import perplexity
from billhook.methods import (
    FASP,
    ICBS,
    PERP,
    RIA,
    DOTResize,
    DynamicSlicing,
    Magnitude,
    Method,
    MoDeGPT,
    ShortGPT,
    SliceGPT,
    SparseGPT,
    Wanda,
    method,
    register,
)
from billhook.models.load import load
from billhook.record import Report
from billhook.run import prune
from billhook.sparsity.allocations import OWL, allocation
from billhook.sparsity.ecoflap import ECoFLaP
from billhook.sparsity.refiners import DSnoT

__version__ = "0.1.0"

__all__ = [
    "FASP",
    "ICBS",
    "MLP",
    "OWL",
    "PERP",
    "RIA",
    "Anatomy",
    "Attention",
    "BillhookError",
    "ColumnNorm",
    "DOTResize",
    "DSnoT",
    "DynamicSlicing",
    "ECoFLaP",
    "Gram",
    "Magnitude",
    "Method",
    "MoDeGPT",
    "Report",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "Statistic",
    "Walk",
    "Wanda",
    "allocation",
    "calibration",
    "declare",
    "evaluation",
    "load",
    "method",
    "perplexity",
    "prune",
    "register",
    "save",
    "walk",
]
