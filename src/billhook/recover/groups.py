"""The parameter groups that a recovery may train: norm, bias, head, adapters.

Source of the groups: Zimmer et al., "PERP" (arXiv:2312.15230). Which parameters they hold is read off the modules'
structure; no family's name decides anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Literal, get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.anatomy.anatomy import families
from billhook.errors import BillhookError, nearest
from billhook.recover.adapters import LowRank

Group = Literal["norm", "bias", "head", "adapters"]
GROUPS: tuple[Group, ...] = get_args(Group)

Named = dict[str, nn.Parameter]

_TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_NOT_NORMS = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
_EPSILON = re.compile(r"(^|_)eps(ilon)?$")


def norm_parameters(module: nn.Module) -> Named:
    """Affine weights and biases of the normalisation layers in `module`, by their names.

    A normalisation layer is one of PyTorch's, or, as the RMSNorm classes of Transformers are, a module without
    children whose only parameters are a `weight` and perhaps a `bias` of its shape, and which carries an epsilon.
    Weights of more than one dimension count only where the class calls itself a norm.
    """
    return _collect(
        module,
        lambda owner, name: name in ("weight", "bias") and _is_norm(owner) and owner._parameters[name] is not None,
    )


def bias_parameters(module: nn.Module) -> Named:
    """Every parameter called `bias` or `..._bias`, by its name: of pruned layers, norms, the head, and all others."""
    return _collect(module, lambda owner, name: name == "bias" or name.endswith("_bias"))


def adapter_parameters(module: nn.Module) -> Named:
    """A and B of every adapter attached in `module`, but for one on the output head, by their names."""
    head = set(head_parameters(module))
    return {name: p for name, p in _adapters(module).items() if name not in head}


def head_parameters(module: nn.Module) -> Named:
    """A and B of the adapter attached to the output head of a model; empty where there is none."""
    head = _output_head(module)
    inside = {id(m) for m in head.modules()} if head is not None else set()
    return _collect(module, lambda owner, name: isinstance(owner, LowRank) and id(owner) in inside)


def head_module(model: nn.Module) -> nn.Linear | Conv1D:
    """The output head of a Transformers model, to attach an adapter to.

    It is not pruned, so attach kind "lora" with a `keep` that is True everywhere; the merge is then exact.

    Raises:
        BillhookError: the model has no linear head, or its weight is tied to another layer (the embedding), which a
            merge would change too.
    """
    head = _output_head(model)
    if not isinstance(head, nn.Linear | Conv1D):
        raise BillhookError(f"{type(model).__name__} has no linear output head: leave the group head out.")
    own = {id(p) for p in head.parameters()}
    inside = {id(m) for m in head.modules()}
    for name, other in model.named_modules():
        if id(other) not in inside and any(id(p) in own for p in other._parameters.values()):
            raise BillhookError(
                f"The output head of {type(model).__name__} is tied to {name!r}, which its merge would change too: "
                "leave the group head out, or untie them first."
            )
    return head


def parameters_of(module: nn.Module, groups: Collection[Group]) -> dict[Group, Named]:
    """The parameters of the chosen groups, each in one group only.

    Biases of norm layers go with "norm" if both groups are chosen.

    Args:
        module: a model or a block, with the adapters attached that are to be trained.
        groups: some of "norm", "bias", "head", "adapters".

    Returns:
        group -> (name in `module` -> parameter), in the order of `GROUPS`: a list of what is trained.

    Raises:
        BillhookError: a group is unknown or empty, or none is chosen.
    """
    for group in groups:
        if group not in GROUPS:
            raise BillhookError(f"Group {group!r} is not known{nearest(group, GROUPS)}: use {', '.join(GROUPS)}.")
    if not groups:
        raise BillhookError(f"No group of parameters is chosen: use some of {', '.join(GROUPS)}.")
    result: dict[Group, Named] = {}
    taken: set[int] = set()
    for group in GROUPS:
        if group not in groups:
            continue
        found = _FIND[group](module)
        if not found:
            present = [f"{name} ({count} parameters)" for name, count in counts(module).items() if count]
            hint = ", or attach adapters first" if group in ("head", "adapters") else ""
            raise BillhookError(
                f"{type(module).__name__} has no parameters in the group {group!r}: it has "
                f"{' and '.join(present) or 'none in any group'}, so choose among these{hint}."
            )
        result[group] = {name: p for name, p in found.items() if id(p) not in taken}
        taken |= {id(p) for p in found.values()}
    return result


def counts(module: nn.Module) -> dict[Group, int]:
    """How many numbers each group holds; biases of norm layers are in both "norm" and "bias"."""
    return {group: sum(p.numel() for p in _FIND[group](module).values()) for group in GROUPS}


_FIND: dict[Group, Callable[[nn.Module], Named]] = {
    "norm": norm_parameters,
    "bias": bias_parameters,
    "head": head_parameters,
    "adapters": adapter_parameters,
}


def _collect(module: nn.Module, wanted: Callable[[nn.Module, str], bool]) -> Named:
    """Parameters by full name, each once, for which `wanted(module that holds it, its own name)`."""
    result: Named = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen and wanted(owner, name):
                seen.add(id(parameter))
                result[f"{path}.{name}" if path else name] = parameter
    return result


def _adapters(module: nn.Module) -> Named:
    return _collect(module, lambda owner, name: isinstance(owner, LowRank))


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _TORCH_NORMS):
        return True
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if isinstance(module, _NOT_NORMS) or weight is None or not own.keys() <= {"weight", "bias"}:
        return False
    if next(module.children(), None) is not None or ("bias" in own and own["bias"].shape != weight.shape):
        return False
    if not any(_EPSILON.search(name) and isinstance(value, float) for name, value in vars(module).items()):
        return False
    return weight.ndim == 1 or "norm" in type(module).__name__.lower()


def _output_head(module: nn.Module) -> nn.Module | None:
    """The head by the declared anatomy, or what Transformers calls the output embeddings; None for a block."""
    anatomy = families().get(getattr(getattr(module, "config", None), "model_type", ""))
    if anatomy is not None and anatomy.head is not None:
        with suppress(AttributeError):
            return module.get_submodule(anatomy.head)
    getter = getattr(module, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None
