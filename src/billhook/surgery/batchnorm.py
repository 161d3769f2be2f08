"""BatchNorm: folded into the layer before it, put back as an identity, and its statistics counted anew."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from billhook.errors import BillhookError
from billhook.surgery.coupling import Tracer


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that went into the layer before it."""

    name: str  # where it was
    layer: str  # what it went into
    norm: _BatchNorm  # as it was


def fold_norms_(model: nn.Module, example: Tensor | tuple[Any, ...]) -> list[FoldedNorm]:
    """Fold every BatchNorm that follows a convolution or linear layer directly; `nn.Identity` takes its place.

    W' = γ/√(σ²+ε) · W and b' = β + γ/√(σ²+ε) · (b − μ), in float64: the model computes what it did in evaluation mode.
    Layers get a bias where they have none. Left as they are: norms without running statistics, norms of something
    else than a layer, and layers or norms that are used twice.

    Args:
        model: that torch.fx can trace.
        example: an input, or a tuple of all inputs.

    Returns:
        what was folded, in forward order; for `unfold_norms_`.

    Raises:
        BillhookError: the model cannot be traced, or does not run on the example.
    """
    tracer = Tracer(model, example)
    calls = _calls(model, tracer.traced.graph)
    folded = []
    for node in tracer.traced.graph.nodes:
        norm = _called(model, node)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
            continue
        before = node.args[0]
        layer = _called(model, before) if isinstance(before, fx.Node) else None
        if layer is None or is_parametrized(layer) or len(before.users) > 1 or calls[id(layer)] + calls[id(norm)] > 2:
            continue
        if _fold_(layer, norm, tracer.shapes[before]):
            folded.append(FoldedNorm(str(node.target), str(before.target), norm))
            _put(model, str(node.target), nn.Identity())
    return folded


def unfold_norms_(model: nn.Module, folded: Iterable[FoldedNorm]) -> None:
    """Put folded norms back such that they change nothing: γ and β as they were, with μ = β and σ² = γ² − ε.

    Counting their statistics anew (`recalibrate_norms`) then gives each channel back the mean β and deviation γ that it
    was trained with. γ becomes positive and at least √(2ε). Biases that layers got when folding stay.

    Raises:
        BillhookError: there is no longer an identity in the place of a norm, or its layer has another width.
    """
    for one in folded:
        layer: Any = model.get_submodule(one.layer)
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if not isinstance(model.get_submodule(one.name), nn.Identity) or width != one.norm.num_features:
            raise BillhookError(
                f"The norm {one.name} cannot be put back: there is a module in its place, or {one.layer} has another "
                "width than when it was folded. Put norms back before channels are removed."
            )
        norm = copy.deepcopy(one.norm)
        pass_all_(norm)
        _put(model, one.name, norm)


@torch.no_grad()
def pass_all_(norm: _BatchNorm) -> None:
    """Set the running statistics such that the norm is an identity in evaluation mode; γ becomes positive."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if norm.weight is not None:
        norm.weight.copy_(norm.weight.abs().clamp(min=(2 * norm.eps) ** 0.5))
    norm.running_mean.copy_(torch.zeros(()) if norm.bias is None else norm.bias)
    norm.running_var.copy_((torch.ones(()) if norm.weight is None else norm.weight.square()) - norm.eps)


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Count the running statistics of all BatchNorms anew, in place, as plain averages over the batches.

    Each norm normalises with the batch's statistics meanwhile, as in training; all other modules (dropout) are in
    evaluation mode. Modes and momenta are as before afterwards.

    Args:
        batches: inputs; of a tuple or list the first element (images of a loader of images and labels). On the CPU or
            where the model is.

    Raises:
        BillhookError: the model has no norm with running statistics, or there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise BillhookError(
            f"{type(model).__name__} has no BatchNorm with running statistics: there is nothing to count."
        )
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise BillhookError("There is no batch to count the statistics of norms on.")
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # an average over all batches instead of a decaying one
            norm.training = True
        for batch in chain([first], rest):
            model((batch[0] if isinstance(batch, (list, tuple)) else batch).to(device))
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _fold_(layer: Any, norm: _BatchNorm, shape: torch.Size) -> bool:
    """Fold, unless the norm's features are not what the layer puts out."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.data.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.data.double()
    bias = None if getattr(layer, "bias", None) is None else layer.bias.data.double()
    if isinstance(layer, nn.Linear) and len(shape) == 2:
        weight, shift = fuse_linear_bn_weights(layer.weight.data.double(), bias, mean, var, norm.eps, gamma, beta)
    elif isinstance(layer, _ConvNd) and not (isinstance(layer, _ConvTransposeNd) and layer.groups > 1):
        transposed = isinstance(layer, _ConvTransposeNd)
        weight, shift = fuse_conv_bn_weights(
            layer.weight.data.double(), bias, mean, var, norm.eps, gamma, beta, transposed
        )
    else:
        return False
    layer.weight.data.copy_(weight)
    new = shift.data.to(layer.weight.dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(new, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.data.copy_(new)
    return True


def _called(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _calls(model: nn.Module, graph: fx.Graph) -> dict[int, int]:
    counts: dict[int, int] = {}
    for node in graph.nodes:
        module = _called(model, node)
        if module is not None:
            counts[id(module)] = counts.get(id(module), 0) + 1
    return counts


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
