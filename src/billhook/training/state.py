"""A pruner's state in one safetensors file: tensors, and the plain values as its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from billhook.errors import BillhookError
from billhook.models.files import write_atomically


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a `Pruner.state_dict`."""
    tensors: dict[str, Tensor] = {"generator": state["generator"]}
    for group in ("masks", "memory"):
        tensors |= {f"{group}/{name}": tensor.contiguous() for name, tensor in state[group].items()}
    values = {key: value for key, value in state.items() if key not in ("generator", "masks", "memory")}
    write_atomically(path, [save(tensors, {"values": json.dumps(values)})])


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        BillhookError: there is no such file, or it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except FileNotFoundError:
        raise BillhookError(f"There is no pruner state {path}: the checkpoint was saved without a pruner.") from None
    except Exception as error:
        raise BillhookError(f"{path} is not a pruner's state ({error}).") from None
    state: dict[str, Any] = {**values, "generator": tensors.pop("generator"), "masks": {}, "memory": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        state[group][rest] = tensor
    return state


def to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with every tensor in main memory."""
    return {
        key: {n: t.cpu() for n, t in value.items()}
        if isinstance(value, dict)
        else value.cpu()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in state.items()
    }
