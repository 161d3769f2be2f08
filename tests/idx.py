"""Writing images in the format of MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    head = bytes([0, 0, 8, tensor.ndim]) + struct.pack(f">{tensor.ndim}I", *tensor.shape)
    path.write_bytes(gzip.compress(head + tensor.numpy().tobytes(), mtime=0))
