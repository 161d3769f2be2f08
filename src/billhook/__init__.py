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
from billhook.merging import IFM, merge_features
from billhook.methods import (
    FASP,
    GMP,
    HYDRA,
    ICBS,
    IMP,
    ISSP,
    PERP,
    RIA,
    SAP,
    SET,
    SNIP,
    BiP,
    ConsensusGates,
    DispLLM,
    DOTResize,
    DynamicSlicing,
    GraNet,
    IMPRewind,
    Magnitude,
    Method,
    MoDeGPT,
    OneShot,
    PruneNet,
    RigL,
    ShortGPT,
    SliceGPT,
    SparseGPT,
    SparseModelSoup,
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
from billhook.sparsity.inequality import pq_index
from billhook.sparsity.pqi import PQI
from billhook.sparsity.refiners import DSnoT
from billhook.training import PruneCallback, SparseTraining, Stretch, held
from billhook.training.merge import merge_state_dicts

__version__ = "0.1.0"

__all__ = [
    "FASP",
    "GMP",
    "HYDRA",
    "ICBS",
    "IFM",
    "IMP",
    "ISSP",
    "MLP",
    "OWL",
    "PERP",
    "PQI",
    "RIA",
    "SAP",
    "SET",
    "SNIP",
    "Anatomy",
    "Attention",
    "BiP",
    "BillhookError",
    "ColumnNorm",
    "ConsensusGates",
    "DOTResize",
    "DSnoT",
    "DispLLM",
    "DynamicSlicing",
    "ECoFLaP",
    "GraNet",
    "Gram",
    "IMPRewind",
    "Magnitude",
    "Method",
    "MoDeGPT",
    "OneShot",
    "PruneCallback",
    "PruneNet",
    "Report",
    "RigL",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "SparseModelSoup",
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
    "merge_features",
    "merge_state_dicts",
    "method",
    "perplexity",
    "pq_index",
    "prune",
    "register",
    "save",
    "walk",
]
