"""One file per published method."""

from billhook.methods.base import Method, Paper, SparseMethod, method, methods, register
from billhook.methods.icbs import ICBS
from billhook.methods.magnitude import Magnitude
from billhook.methods.perp import PERP
from billhook.methods.ria import RIA
from billhook.methods.sparsegpt import SparseGPT
from billhook.methods.wanda import Wanda

__all__ = [
    "ICBS",
    "PERP",
    "RIA",
    "Magnitude",
    "Method",
    "Paper",
    "SparseGPT",
    "SparseMethod",
    "Wanda",
    "method",
    "methods",
    "register",
]
