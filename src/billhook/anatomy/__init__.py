"""What a network is made of: one declaration per family, and what follows from it."""

import billhook.anatomy.families  # noqa: F401  (declares the built-in ones; before the function of that name)
from billhook.anatomy.anatomy import MLP, Anatomy, Attention, anatomy_of, declare, families, fitted
from billhook.anatomy.sites import Site, block_names, find_blocks, sites_of

__all__ = [
    "MLP",
    "Anatomy",
    "Attention",
    "Site",
    "anatomy_of",
    "block_names",
    "declare",
    "families",
    "find_blocks",
    "fitted",
    "sites_of",
]
