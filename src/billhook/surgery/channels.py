"""Removal of coupled channels from any network that torch.fx can trace: what is left stays a plain module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from billhook.errors import BillhookError
from billhook.surgery.coupling import ChannelGroup, Slot, Tracer, fetch, is_depthwise, owner_of

__all__ = ["ChannelGroup", "Slot", "channel_groups", "keep_all_", "keep_channels_"]


def channel_groups(model: nn.Module, example: Tensor | tuple[Any, ...]) -> list[ChannelGroup]:
    """All groups of coupled channels, in forward order; those that may not leave are marked `fixed`.

    Fixed are channels that reach the network's output or an operation that is not known to keep channels apart
    (GroupNorm, a split at a constant, a view with a constant width), and those that are tied to padding. Removed
    channels of a convolution in g > 1 groups leave each of its groups alike.

    Args:
        model: left as it is, in its mode. Stock convolutions, linear layers, norms, activations, pools; shared modules.
        example: an input, or a tuple of all inputs, of the shapes to trace with (batch of 1 will do).

    Raises:
        BillhookError: the model cannot be traced, or does not run on the example.
    """
    return Tracer(model, example).groups()


def keep_channels_(model: nn.Module, group: ChannelGroup, keep: Tensor) -> None:
    """Keep these channels of a group, [k] long; weights, biases, norm vectors and sizes of the modules shrink in place.

    Other groups in the same tensors have other positions afterwards: find the groups again, or use `keep_all_`.
    Parameters become new objects: make the optimizer afterwards.

    Raises:
        BillhookError: the group is fixed or not of this model's present shapes; nothing would be left.
    """
    keep_all_(model, [(group, keep)])


def keep_all_(model: nn.Module, choices: Iterable[tuple[ChannelGroup, Tensor]]) -> None:
    """As `keep_channels_`, for several groups of one call of `channel_groups` at once."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group, keep in choices:
        stay = _checked(group, keep)
        for slot in group.slots:
            tensor = fetch(model, slot.tensor)
            if tensor.shape[slot.axis] != slot.length:
                raise BillhookError(
                    f"{slot.tensor} has another shape than when the groups were found: call channel_groups again."
                )
            gone.setdefault((slot.tensor, slot.axis), []).append(slot.index[~stay].flatten())
    multiples = {name: _multiple(model.get_submodule(name)) for name in {owner_of(name) for name, _ in gone}}
    for (name, axis), positions in gone.items():
        _cut(model, name, axis, torch.cat(positions))
    for name, multiple in multiples.items():
        _sizes(model.get_submodule(name), multiple)


def _checked(group: ChannelGroup, keep: Tensor) -> Tensor:
    if group.fixed is not None:
        raise BillhookError(f"The channels of {group.name} cannot leave: they {group.fixed}.")
    if keep.numel() == 0:
        raise BillhookError(f"Nothing would be left of the {group.size} channels of {group.name}: keep at least one.")
    if keep.min() < 0 or keep.max() >= group.size or len(set(keep.tolist())) != keep.numel():
        raise BillhookError(f"Channels of {group.name} must be distinct and within 0 to {group.size - 1}.")
    stay = torch.zeros(group.size, dtype=torch.bool)
    stay[keep.cpu()] = True
    return stay


def _cut(model: nn.Module, name: str, axis: int, gone: Tensor) -> None:
    tensor = fetch(model, name)
    stay = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stay[gone] = False
    new = tensor.data.index_select(axis, stay.nonzero().flatten().to(tensor.device))
    owner, attribute = model.get_submodule(owner_of(name)), name.rpartition(".")[2]
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(owner, attribute, nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new)


def _multiple(module: nn.Module) -> int | None:
    """Output channels per input channel of a depthwise convolution."""
    return module.out_channels // module.groups if isinstance(module, _ConvNd) and is_depthwise(module) else None


def _sizes(module: Any, multiple: int | None) -> None:
    """Make the attributes of a stock module say what its tensors are."""
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[:2]
        if multiple is not None:
            module.groups = first // multiple
        inner = (first, second * module.groups)
        out_in = inner[::-1] if isinstance(module, _ConvTransposeNd) else inner
        module.out_channels, module.in_channels = out_in
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        vector = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(vector)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
