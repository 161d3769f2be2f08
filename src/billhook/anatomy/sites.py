"""Sites: the prunable weight matrices of a model, block by block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.anatomy.anatomy import Anatomy, join
from billhook.errors import BillhookError

Role = Literal["attention", "mlp", "other"]


@dataclass(eq=False)
class Site:
    """One prunable weight matrix in a block.

    Attributes:
        name: full module name, e.g. "model.layers.0.self_attn.q_proj".
        block: index of the block.
        projection: name inside the block, e.g. "self_attn.q_proj".
        module: the `nn.Linear` or Transformers `Conv1D` that holds the weight.
        role: what it belongs to, by the anatomy; "other" where that does not say.
    """

    name: str
    block: int
    projection: str
    module: nn.Module = field(repr=False)
    role: Role = "other"

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in], whatever the layer's own layout: a view, writing to it writes the model."""
        weight = self.module.weight.data
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def numel(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def write(self, weight: Tensor) -> None:
        """Replace the weight by `weight`, [out, in] of any float dtype, in place.

        Raises:
            BillhookError: a value is not finite in the model's dtype.
        """
        new = weight.to(self.weight.dtype)
        if not torch.isfinite(new).all():
            raise BillhookError(
                f"The new weight of {self.name} has NaN or infinite values in {new.dtype}: use more calibration "
                "data, stronger damping, or a wider --dtype."
            )
        self.weight.copy_(new)

    def mask(self, keep: Tensor) -> None:
        """Set the weights outside `keep` (bool, [out, in]) to exactly +0."""
        self.weight.masked_fill_(~keep, 0.0)


def find_blocks(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The blocks in order."""
    return [model.get_submodule(name) for name in block_names(model, anatomy)]


def block_names(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Full module names of the blocks, in order."""
    names = [name for name, _ in model.get_submodule(anatomy.blocks).named_children()]
    return [join(anatomy.blocks, name) for name in names]


def sites_of(model: nn.Module, anatomy: Anatomy) -> list[list[Site]]:
    """All sites, one list per block, in the order of execution.

    Raises:
        BillhookError: the blocks hold no linear layer.
    """
    result = []
    for index, name in enumerate(block_names(model, anatomy)):
        block = model.get_submodule(name)
        paths = [path for stage in anatomy.stages for path in stage] or [
            path for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
        ]
        result.append(
            [
                Site(join(name, path), index, path, block.get_submodule(path), _role(anatomy, path))
                for path in paths
                if _has(block, path)
            ]
        )
    if not any(result):
        raise BillhookError(f"The blocks {anatomy.blocks!r} of {type(model).__name__} hold no linear layer to prune.")
    return result


def stages_of(sites: list[Site], anatomy: Anatomy) -> list[list[Site]]:
    """The sites of one block grouped by the input they share, in the order of execution."""
    if not anatomy.stages:
        return [[site] for site in sites]
    groups = [[site for site in sites if site.projection in stage] for stage in anatomy.stages]
    return [group for group in groups if group]


def _role(anatomy: Anatomy, path: str) -> Role:
    if anatomy.attention and path in (*anatomy.attention.inputs, anatomy.attention.output):
        return "attention"
    if anatomy.mlp and path in (*anatomy.mlp.inputs, anatomy.mlp.output):
        return "mlp"
    return "other"


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
