"""Feature complexity: how many features of a layer are left when equivalent ones count once.

Source: Chen, Zhou & Yan, ICLR 2024, arXiv:2310.06756 (see `billhook.merging.ifm`). One run that merges everything
gives the width at every beta: it is read off the first merge whose distance is above beta times the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.merging.ifm import IFM


def feature_complexity(
    model: nn.Module, betas: Sequence[float], *, example: Tensor | tuple[Any, ...], **options: Any
) -> dict[str, list[int]]:
    """Features left of each group at every beta; needs no data.

    Exact for a network with one group. With several, groups merge here that would have stopped already at a smaller
    beta, which changes the distances in their neighbours: an approximation.

    Args:
        model: as `IFM.merge`; left as it is.
        betas: thresholds, each in [0, 1), any order.
        options: of `IFM`, but for beta, widths and max_ratio.

    Returns:
        group -> features at each of `betas`, in their order.

    Raises:
        BillhookError: a beta is out of range; otherwise as `IFM.merge`.
    """
    if {"beta", "widths", "max_ratio"} & options.keys():
        raise BillhookError("feature_complexity takes betas instead of beta, widths and max_ratio: leave those out.")
    for beta in betas:
        IFM(beta=beta, **options)  # its sentence says what is out of range
    groups = {group.name: group for group in _all_merges(model, example, options)}
    return {name: [group.width(beta) for beta in betas] for name, group in groups.items()}


def _all_merges(model: nn.Module, example: Tensor | tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    everything = IFM(widths=1e-9, **options)
    return list(everything.merge(model, example)[1].groups.values())
