"""What a network is made of: one declaration per family, and what follows from it."""

from billhook.anatomy.anatomy import MLP, Anatomy, Attention, anatomy_of, declare, families
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
    "sites_of",
]
