"""Recovery after pruning: training a small part of the parameters under a fixed mask.

The pieces of PERP (Zimmer, Andoni, Spiegel, Pokutta 2023, arXiv:2312.15230): adapters that merge without filling
zeros, the parameter groups that are worth training, one optimisation loop, and the reconstruction of one block.
"""

from billhook.recover.adapters import KINDS, Adapter, Kind, LowRank, attach
from billhook.recover.groups import (
    GROUPS,
    Group,
    adapter_parameters,
    bias_parameters,
    counts,
    head_module,
    head_parameters,
    norm_parameters,
    parameters_of,
)
from billhook.recover.reconstruct import mean_squared_error, reconstruct
from billhook.recover.train import Loop, linear_schedule

__all__ = [
    "GROUPS",
    "KINDS",
    "Adapter",
    "Group",
    "Kind",
    "Loop",
    "LowRank",
    "adapter_parameters",
    "attach",
    "bias_parameters",
    "counts",
    "head_module",
    "head_parameters",
    "linear_schedule",
    "mean_squared_error",
    "norm_parameters",
    "parameters_of",
    "reconstruct",
]
