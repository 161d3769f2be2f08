"""Processes: the few collective operations of the walk, and nothing when there is only one process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Join the process group of torchrun, if this process was started by it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def sum_(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_main_(tensors: list[Tensor]) -> None:
    """Overwrite each tensor by the first process's, in place."""
    if world() > 1:
        for tensor in tensors:
            # a transposed or sliced view cannot be received into directly
            buffer = tensor.contiguous()
            dist.broadcast(buffer, src=0)
            if buffer.data_ptr() != tensor.data_ptr():
                tensor.copy_(buffer)


def agree(value: int) -> int:
    """The first process's value, in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return int(box[0])


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def agree_min(value: int) -> int:
    """The smallest value of all processes, in every process."""
    if world() == 1:
        return value
    boxes: list[int] = [0] * world()
    dist.all_gather_object(boxes, value)
    return min(boxes)
