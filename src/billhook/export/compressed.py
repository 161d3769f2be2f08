"""Compressed storage of a model folder, and back; see `billhook.models.bitmask` for the layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.models import bitmask
from billhook.models.checkpoint import COMPRESSED, Checkpoint, Packed
from billhook.models.files import Entry, Stored, write
from billhook.progress import bar


def compress(folder: Path) -> None:
    """Replace the weight files of a model folder by one file in bitmask storage.

    Tensors that would not become smaller stay as they are. The new file is read back and compared bit for bit
    before the old ones are deleted.

    Raises:
        BillhookError: what was read back differs.
        DiskFull: there is no room; the folder is unchanged.
    """
    dense = Checkpoint.open(folder)
    entries: list[Entry] = []
    metadata = {"billhook_storage": bitmask.MARK}
    with bar("compress", len(dense.tensors)) as step:
        for key, stored in dense.tensors.items():
            assert isinstance(stored, Stored)
            tensor = stored.read()
            nonzero = len(bitmask.pack(tensor)[1]) if tensor.is_floating_point() else tensor.numel()
            step(key)
            if bitmask.packed_bytes(tensor.numel(), nonzero, tensor.element_size()) >= stored.nbytes:
                entries.append(Entry.copy(stored, key))
                continue
            metadata[f"{key}.shape"] = json.dumps(list(stored.shape))
            bits = -(-tensor.numel() // 8)
            entries.append(Entry(f"{key}.bitmask", torch.uint8, (bits,), _Lazy(stored, 0)))
            entries.append(Entry(f"{key}.values", stored.dtype, (nonzero,), _Lazy(stored, 1)))
    write(folder / COMPRESSED, entries, metadata)
    try:
        _verify(dense, Checkpoint.open(folder))
    except BaseException:
        (folder / COMPRESSED).unlink()
        raise
    for file in dense.files:
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def expand(folder: Path, target: Path) -> None:
    """Write the weights of a model folder as plain safetensors, `target/model.safetensors`, bit for bit."""
    packed = Checkpoint.open(folder)
    entries = []
    for key, tensor in packed.tensors.items():
        if isinstance(tensor, Packed):
            entries.append(Entry(key, tensor.dtype, tensor.shape, _Unpack(tensor)))
        else:
            entries.append(Entry.copy(tensor, key))
    write(target / "model.safetensors", entries)


class _Lazy:
    """Bytes of a stored tensor's bitmask (part 0) or values (part 1), made when they are written."""

    def __init__(self, stored: Stored, part: int) -> None:
        self.stored = stored
        self.part = part

    def __call__(self) -> Iterator[bytes | memoryview]:
        return iter(Entry.of("", bitmask.pack(self.stored.read())[self.part]).chunks())


class _Unpack:
    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __call__(self) -> Iterator[bytes | memoryview]:
        return iter(Entry.of("", self.packed.read()).chunks())


def _verify(dense: Checkpoint, packed: Checkpoint) -> None:
    for key, stored in dense.tensors.items():
        if not _same_bits(stored.read(), packed.tensors[key].read()):
            raise BillhookError(f"Compressed storage of {key!r} does not give the same bits back; nothing was changed.")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
