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
    GMP,
    ICBS,
    PERP,
    RIA,
    SET,
    SNIP,
    DOTResize,
    DynamicSlicing,
    GraNet,
    Magnitude,
    Method,
    MoDeGPT,
    PruneNet,
    ShortGPT,
    SliceGPT,
    SparseGPT,
    StaticMask,
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
from billhook.training import SparseTraining, Stretch, held

__version__ = "0.1.0"

__all__ = [
    "FASP",
    "GMP",
    "ICBS",
    "MLP",
    "OWL",
    "PERP",
    "RIA",
    "SET",
    "SNIP",
    "Anatomy",
    "Attention",
    "BillhookError",
    "ColumnNorm",
    "DOTResize",
    "DSnoT",
    "DynamicSlicing",
    "ECoFLaP",
    "GraNet",
    "Gram",
    "Magnitude",
    "Method",
    "MoDeGPT",
    "OneShot",
    "PruneNet",
    "Report",
    "RigL",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "SparseTraining",
    "StaticMask",
    "Statistic",
    "Stretch",
    "Walk",
    "Wanda",
    "allocation",
    "calibration",
    "declare",
    "evaluation",
    "held",
    "load",
    "method",
    "perplexity",
    "prune",
    "register",
    "save",
    "walk",
]
