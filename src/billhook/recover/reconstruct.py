"""Reconstruction of one block: train a few of its parameters until it computes what it did before pruning.

Source: Zimmer et al., "PERP" (arXiv:2312.15230), block-wise reconstruction. The targets are the outputs of the
unpruned block on the inputs that it really gets, which come from blocks that are pruned and reconstructed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from billhook.errors import BillhookError
from billhook.recover.train import Loop


def mean_squared_error(forward: Callable[[int], Tensor], targets: Sequence[Tensor], *, autocast: bool = False) -> float:
    """Mean of (forward(i) − targets[i])² over all entries of all batches; squares in float32, sums in float64.

    Args:
        forward: the output for batch i, of the shape of `targets[i]`. Called without gradients.
        targets: one tensor per batch, of any float dtype.
        autocast: call `forward` under bfloat16 autocast.

    Raises:
        BillhookError: there are no batches, or shapes differ.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(len(targets)):
            target = targets[index]
            with torch.autocast(target.device.type, torch.bfloat16, enabled=autocast):
                output = forward(index)
            _check_shape(index, output, target)
            total += float((output.float() - target.float()).square().sum(dtype=torch.float64))
            count += target.numel()
    if count == 0:
        raise BillhookError("There is nothing to reconstruct: no targets are given.")
    return total / count


def reconstruct(
    forward: Callable[[int], Tensor],
    module: nn.Module,
    groups: Mapping[Any, Mapping[str, nn.Parameter]],
    targets: Sequence[Tensor],
    steps: int,
    lr: float | Mapping[Any, float],
    *,
    warmup: float = 0.1,
    accumulate: int = 1,
    autocast: bool = False,
) -> tuple[float, float]:
    """Train the chosen parameters of one block to lower the mean squared error of its output.

    Micro-batch i is batch i modulo their number: a fixed order, cycled. Any window works that `forward` computes:
    a block, its attention or feed-forward half, a single layer. Adapters are left attached; merge them afterwards.

    Args:
        forward: the block's output for batch i, of the shape of `targets[i]`; computed from inputs that do not
            change. It is called with gradients enabled for the steps, without for the errors.
        module: the block; what is not in `groups` is frozen meanwhile.
        groups: group -> (name -> parameter), as `parameters_of` gives them.
        targets: what to reach, one tensor per batch, of any float dtype; read again in every cycle.
        steps, lr, warmup, accumulate, autocast: as in `Loop`.

    Returns:
        (error before, error after): mean squared errors over all batches.

    Raises:
        BillhookError: no targets, shapes that differ, or what `Loop` refuses.
    """

    def loss(index: int) -> Tensor:
        batch = index % len(targets)
        output, target = forward(batch), targets[batch]
        _check_shape(batch, output, target)  # a target that broadcasts would be a wrong one
        return functional.mse_loss(output.float(), target.float())

    loop = Loop(module, groups, lr, loss, steps, warmup=warmup, accumulate=accumulate, autocast=autocast)
    before = mean_squared_error(forward, targets, autocast=autocast)
    if steps == 0:
        return before, before
    loop.run()
    return before, mean_squared_error(forward, targets, autocast=autocast)


def _check_shape(index: int, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise BillhookError(
            f"Batch {index} of the block's output is {list(output.shape)} but its target is {list(target.shape)}: give "
            "targets computed on the same inputs."
        )
