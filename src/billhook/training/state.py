"""A pruner's state in one safetensors file: tensors, and the plain values as its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from billhook.errors import BillhookError
from billhook.models.files import write_atomically


def pack_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A `Pruner.state_dict` as tensors and plain values, which a safetensors file can hold."""
    tensors: dict[str, Tensor] = {"generator": state["generator"]}
    for group in ("masks", "memory"):
        tensors |= {f"{group}/{name}": tensor.contiguous() for name, tensor in state[group].items()}
    values = {key: value for key, value in state.items() if key not in ("generator", "masks", "memory")}
    return tensors, values


def unpack_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The state that `pack_state` was given."""
    state: dict[str, Any] = {**values, "generator": tensors["generator"], "masks": {}, "memory": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if rest:
            state[group][rest] = tensor
    return state


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a `Pruner.state_dict`."""
    tensors, values = pack_state(state)
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
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BillhookError(f"{path} is not a pruner's state ({error}).") from None
    return unpack_state(tensors, values)


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


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and plain values, which a safetensors file can hold."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}/{key}": torch.as_tensor(value)
        for index, moments in state["state"].items()
        for key, value in moments.items()
        if value is not None
    }
    return tensors, {"groups": state["param_groups"]}


def unpack_optimizer(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The `state_dict` of an optimizer that `pack_optimizer` was given."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition("/")
        moments.setdefault(int(index), {})[key] = tensor
    return {"state": moments, "param_groups": values["groups"]}
