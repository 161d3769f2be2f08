"""Masks of a network in training: which weights are there, by exact counts.

A mask is a bool tensor of its weight's shape, True where the weight is; masks of a network are a dict by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.sparsity.select import global_cut, keep_largest

Masks = dict[str, Tensor]
Growth = Literal["gradient", "random"]

_TINY = torch.finfo(torch.float32).tiny


def among_active(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (non-negative) with absent weights below every present one, however small."""
    return torch.where(mask, scores.float().clamp_min(_TINY), 0.0)


def keep_globally(scores: Mapping[str, Tensor], masks: Masks, keep: int) -> Masks:
    """Keep the `keep` largest scores of all layers together, among the weights that are there.

    One threshold is selected over all layers, nothing is sorted, and one layer's ranking is in memory at a time.

    Args:
        scores: name -> non-negative scores, shaped like the weight.
        masks: the present masks; the result is nested in them.
        keep: how many weights stay in all.
    """
    total = sum(mask.numel() for mask in masks.values())

    def rankings() -> Iterator[tuple[str, Tensor]]:
        return ((name, among_active(scores[name], masks[name]).flatten()) for name in masks)

    cut = global_cut(rankings, total - keep)
    return {
        name: keep_largest(ranking[None], cut.counts[name], cut.threshold).view(masks[name].shape) & masks[name]
        for name, ranking in rankings()
    }


def keep_in_layer(scores: Tensor, mask: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores of a layer, among the weights that are there (all, if fewer are)."""
    ranking = among_active(scores, mask).reshape(1, -1)
    return keep_largest(ranking, max(mask.numel() - keep, 0)).view(mask.shape) & mask


def exchange(
    weight: Tensor, mask: Tensor, count: int, growth: Growth, signal: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Drop the `count` smallest weights of a layer, then grow as many, so that the number does not change.

    A weight that was just dropped may grow again.

    Args:
        weight: the weights; absent ones are not looked at.
        mask: which are there.
        count: how many to exchange.
        growth: gradient: where |signal| is largest among the absent; random: anywhere among them.
        signal: gradient of all weights, absent ones too, for the first.
        generator: of the random choice, on the CPU so that it is the same on every device.

    Source: Evci et al. (1911.11134), algorithm 1; Mocanu et al. (1707.04780) with random growth.
    """
    left = keep_in_layer(weight.detach().abs(), mask, int(mask.sum()) - count)
    if growth == "random":
        scores = torch.rand(mask.numel(), generator=generator).view(mask.shape).to(mask.device)
    else:
        assert signal is not None
        scores = signal.detach().abs().float()
    candidates = torch.where(left, -1.0, scores).reshape(1, -1)
    return left | keep_largest(candidates, mask.numel() - count).view(mask.shape)


def random_mask(shape: torch.Size, keep: int, generator: torch.Generator) -> Tensor:
    """A mask with exactly `keep` weights at random places."""
    scores = torch.rand(1, shape.numel(), generator=generator)
    return keep_largest(scores, shape.numel() - keep).view(shape)


def pack(mask: Tensor) -> Tensor:
    """One bit per weight, uint8 [ceil(n / 8)]."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `pack` was given."""
    flat = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(flat.astype(bool)).view(shape)


def refuse_unequal(first: Masks, second: Masks, what: str) -> None:
    """Raise unless two networks have the same mask.

    Raises:
        BillhookError: names the first layer that differs.
    """
    for name in first:
        if name not in second or not torch.equal(first[name].cpu(), second[name].cpu()):
            raise BillhookError(f"{what}: the masks of {name} differ; only networks of one mask have a common average.")
