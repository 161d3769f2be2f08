"""Transforms of a module that merge what is alike in it: no data, no walk, a plain smaller module comes out."""

from billhook.merging.ifm import IFM, GroupMerge, Merge, MergeReport, merge_features

__all__ = ["IFM", "GroupMerge", "Merge", "MergeReport", "merge_features"]
