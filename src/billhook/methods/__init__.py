"""One file per published method."""

from billhook.methods.base import Method, Paper, SparseMethod, method, methods, register
from billhook.methods.bip import HYDRA, BiP
from billhook.methods.consensus import Consensus, ConsensusGates, Gates
from billhook.methods.disp_llm import DispLLM
from billhook.methods.dotresize import DOTResize
from billhook.methods.fasp import FASP, MagnitudeWidths, RandomWidths, WandaWidths
from billhook.methods.gmp import GMP
from billhook.methods.granet import GraNet
from billhook.methods.icbs import ICBS
from billhook.methods.imp_rewind import IMPRewind, Ticket
from billhook.methods.iss_p import ISSP
from billhook.methods.magnitude import Magnitude
from billhook.methods.modegpt import MoDeGPT
from billhook.methods.perp import PERP
from billhook.methods.prunenet import PruneNet
from billhook.methods.ria import RIA
from billhook.methods.rigl import SET, RigL, StaticMask
from billhook.methods.sap import SAP
from billhook.methods.shortgpt import ShortGPT
from billhook.methods.slicegpt import DynamicSlicing, SliceGPT
from billhook.methods.snip import SNIP, OneShot
from billhook.methods.soups import IMP, SparseModelSoup
from billhook.methods.sparsegpt import SparseGPT
from billhook.methods.structured import StructuredMethod
from billhook.methods.wanda import Wanda

__all__ = [
    "FASP",
    "GMP",
    "HYDRA",
    "ICBS",
    "IMP",
    "ISSP",
    "PERP",
    "RIA",
    "SAP",
    "SET",
    "SNIP",
    "BiP",
    "Consensus",
    "ConsensusGates",
    "DOTResize",
    "DispLLM",
    "DynamicSlicing",
    "Gates",
    "GraNet",
    "IMPRewind",
    "Magnitude",
    "MagnitudeWidths",
    "Method",
    "MoDeGPT",
    "OneShot",
    "Paper",
    "PruneNet",
    "RandomWidths",
    "RigL",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "SparseMethod",
    "SparseModelSoup",
    "StaticMask",
    "StructuredMethod",
    "Ticket",
    "Wanda",
    "WandaWidths",
    "method",
    "methods",
    "register",
]
