"""Parameters, nonzero parameters and bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from billhook.models.checkpoint import Checkpoint
from billhook.models.files import Stored
from billhook.record import Size


def folder_size(folder: Path) -> Size:
    """Counted over the weight files of a model folder, one tensor mapped into memory at a time."""
    checkpoint = Checkpoint.open(folder)
    parameters = nonzero = 0
    for tensor in checkpoint.tensors.values():
        value = tensor.map() if isinstance(tensor, Stored) else tensor.read()
        parameters += value.numel()
        nonzero += int(torch.count_nonzero(value))
    return Size(parameters=parameters, nonzero=nonzero, bytes=sum(f.stat().st_size for f in checkpoint.files))


def model_size(model: nn.Module) -> Size:
    """Counted over a model in memory; tied parameters once; bytes of the tensors."""
    tensors = [p.data for p in model.parameters()]
    return Size(
        parameters=sum(t.numel() for t in tensors),
        nonzero=sum(int(torch.count_nonzero(t)) for t in tensors),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
