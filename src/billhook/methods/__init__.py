"""One file per published method."""

from billhook.methods.base import Method, Paper, SparseMethod, method, methods, register
from billhook.methods.dotresize import DOTResize
from billhook.methods.fasp import FASP, MagnitudeWidths, RandomWidths, WandaWidths
from billhook.methods.icbs import ICBS
from billhook.methods.magnitude import Magnitude
from billhook.methods.modegpt import MoDeGPT
from billhook.methods.perp import PERP
from billhook.methods.ria import RIA
from billhook.methods.shortgpt import ShortGPT
from billhook.methods.slicegpt import DynamicSlicing, SliceGPT
from billhook.methods.sparsegpt import SparseGPT
from billhook.methods.structured import StructuredMethod
from billhook.methods.wanda import Wanda

__all__ = [
    "FASP",
    "ICBS",
    "PERP",
    "RIA",
    "DOTResize",
    "DynamicSlicing",
    "Magnitude",
    "MagnitudeWidths",
    "Method",
    "MoDeGPT",
    "Paper",
    "RandomWidths",
    "ShortGPT",
    "SliceGPT",
    "SparseGPT",
    "SparseMethod",
    "StructuredMethod",
    "Wanda",
    "WandaWidths",
    "method",
    "methods",
    "register",
]
