"""One file per published method."""

from billhook.methods.base import Method, Paper, SparseMethod, method, methods, register
from billhook.methods.magnitude import Magnitude
from billhook.methods.ria import RIA
from billhook.methods.sparsegpt import SparseGPT
from billhook.methods.wanda import Wanda

__all__ = [
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
