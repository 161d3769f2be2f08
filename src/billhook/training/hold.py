"""Keeping absent weights absent in a training loop that knows nothing of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the weights that are absent from `masks` (name of the parameter -> bool)."""
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


@contextmanager
def held(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, absent weights stay zero whatever trains the model.

    Their gradients are cleared as soon as they are there. An optimizer that is made inside then has nothing to move
    them by: not gradient, not momentum, not weight decay. For one that mixes the entries of a gradient the masks are
    applied once more at the end.
    """

    def clearing(mask: Tensor) -> Callable[[Tensor], None]:
        def clear(weight: Tensor) -> None:
            if weight.grad is not None:
                weight.grad.mul_(mask)

        return clear

    apply_masks(model, masks)
    hooks = []
    for name, mask in masks.items():
        weight: Any = model.get_parameter(name)
        hooks.append(weight.register_post_accumulate_grad_hook(clearing(mask)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        apply_masks(model, masks)
