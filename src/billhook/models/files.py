"""Reading and writing safetensors files tensor by tensor, so that no file is ever in memory as a whole."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from billhook.errors import BillhookError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 16 << 20


class DiskFull(BillhookError):
    """The disk is full; what was finished stays and the same command resumes."""


_AGAIN = "run the same command again; what was finished is kept"


@contextmanager
def room(folder: Path, advice: str = _AGAIN) -> Iterator[None]:
    """Turn the errors by which libraries report a full disk into one sentence.

    Raises:
        DiskFull: there is no room in `folder`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno in (28, 122) if isinstance(error, OSError) else re.search(r"os error (28|122)\b", str(error))
        if full:  # ENOSPC, EDQUOT
            raise DiskFull(f"The disk that holds {folder} is full: free some room and {advice}.") from None
        raise


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file: where its bytes are and what they mean."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # absolute byte offsets in the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self) -> Tensor:
        """The tensor, in memory of its own (no mapping of the file stays behind)."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.begin)
            view = byte_view(tensor) if tensor.numel() else memoryview(b"")
            if tensor.numel() and file.readinto(view) != self.nbytes:
                raise BillhookError(f"{self.file} is truncated at tensor {self.key!r}: fetch the file again.")
        return tensor

    def map(self) -> Tensor:
        """The tensor mapped into memory: pages are read as they are used. Writing to it changes no file."""
        if not self.nbytes:  # nothing to map
            return torch.empty(self.shape, dtype=self.dtype)
        raw = np.memmap(self.file, dtype=np.uint8, mode="c", offset=self.begin, shape=(self.nbytes,))
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, piece by piece."""
        with self.file.open("rb") as file:
            file.seek(self.begin)
            left = self.nbytes
            while left:
                piece = file.read(min(_CHUNK, left))
                if not piece:
                    raise BillhookError(f"{self.file} is truncated at tensor {self.key!r}: fetch the file again.")
                left -= len(piece)
                yield piece


def read_index(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by key, and its metadata; reads the header only.

    Raises:
        BillhookError: the file is missing, truncated or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= size - 8:
                raise BillhookError(f"{file} is not a whole safetensors file: fetch it again.")
            header: dict[str, Any] = json.loads(stream.read(length))
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        tensors = {key: _stored(file, key, entry, 8 + length) for key, entry in header.items()}
    except FileNotFoundError:
        raise BillhookError(f"{file} is missing: fetch the model again.") from None
    except OSError as error:
        raise BillhookError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BillhookError(f"{file} has a damaged safetensors header: fetch it again.") from None
    for key, tensor in tensors.items():
        if tensor.end > size:
            raise BillhookError(
                f"{file} is truncated: tensor {key!r} ends at byte {tensor.end}, the file at {size}; fetch it again."
            )
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end < size:
        raise BillhookError(f"{file} has {size - end} bytes behind its last tensor, so it is damaged: fetch it again.")
    return tensors, metadata


def _stored(file: Path, key: str, entry: dict[str, Any], start: int) -> Stored:
    """One entry of a header whose data begin at byte `start`; any exception means that the header is damaged."""
    if entry["dtype"] not in _DTYPES:
        raise BillhookError(f"{file}: tensor {key!r} has dtype {entry['dtype']}, which is not supported.")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("offsets do not fit the shape")
    return Stored(file, key, dtype, shape, start + begin, start + end)


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its description, and a function that yields its bytes when they are due."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @staticmethod
    def of(key: str, tensor: Tensor) -> Entry:
        """An entry for a tensor in memory."""
        return Entry(key, tensor.dtype, tuple(tensor.shape), lambda: _bytes(tensor))

    @staticmethod
    def copy(stored: Stored, key: str | None = None) -> Entry:
        """An entry that copies a stored tensor's bytes."""
        return Entry(key or stored.key, stored.dtype, stored.shape, stored.chunks)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(file: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically: to a temporary name, synced, then renamed.

    Raises:
        DiskFull: there is no room; nothing is left under `file`.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def body() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text))
        yield text
        for entry in entries:
            yield from entry.chunks()

    write_atomically(file, body())


def write_atomically(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write bytes to `file` so that after a crash it is there whole or not at all.

    Raises:
        DiskFull: there is no room.
    """
    part = file.with_name(file.name + ".part")
    try:
        with room(file.parent):
            with part.open("wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory, without a copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous()
        yield byte_view(flat)
