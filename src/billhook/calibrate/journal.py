"""The journal of a walk: each finished block's weights and record on disk, so that a killed run goes on.

A block is finished when its record file is there; the record is written after the weights, both atomically.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from billhook.calibrate.activations import Activations
from billhook.models.files import Entry, Stored, read_index, write, write_atomically


class Journal:
    """A folder that a walk writes its finished blocks to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def finished(self) -> int:
        """How many blocks, from the first on, are done."""
        count = 0
        while self._record(count).is_file() and self.weights(count).is_file():
            count += 1
        return count

    def weights(self, block: int) -> Path:
        """The safetensors file of a finished block."""
        return self.folder / f"block-{block:05d}.safetensors"

    def commit(self, block: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Stored]:
        """Write a finished block: parameters by full name, and its record. Returns where they lie now."""
        write(self.weights(block), [Entry.of(name, tensor) for name, tensor in tensors.items()])
        write_atomically(self._record(block), [json.dumps(record).encode()])
        return self.stored(block)

    def stored(self, block: int) -> dict[str, Stored]:
        """Where a finished block's parameters lie."""
        return read_index(self.weights(block))[0]

    def record(self, block: int) -> dict[str, Any]:
        """The record of a finished block."""
        result: dict[str, Any] = json.loads(self._record(block).read_text(encoding="utf-8"))
        return result

    def commit_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Write edited parameters outside the blocks, by full name."""
        write(self.folder / "rest.safetensors", [Entry.of(name, tensor) for name, tensor in tensors.items()])

    def rest(self) -> dict[str, Stored]:
        """Where the edited parameters outside the blocks lie."""
        path = self.folder / "rest.safetensors"
        return read_index(path)[0] if path.is_file() else {}

    def keep_carry(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a method hands to the block after `block`.

        That of the block before stays: it is needed again if this block's own record is not written.
        """
        entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
        write(self.folder / f"carry-{block:05d}.safetensors", entries)
        (self.folder / f"carry-{block - 2:05d}.safetensors").unlink(missing_ok=True)

    def carried(self, block: int) -> dict[str, Tensor] | None:
        """What `keep_carry` kept with this block, if it is still there."""
        path = self.folder / f"carry-{block:05d}.safetensors"
        return {name: ref.read() for name, ref in read_index(path)[0].items()} if path.is_file() else None

    def keep_state(self, rank: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Keep what one process of a long step needs to go on, in place of what it kept before."""
        entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
        write(self.folder / f"state-{rank}.safetensors", entries, {"values": json.dumps(dict(values))})

    def state(self, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep_state` kept last, if anything."""
        path = self.folder / f"state-{rank}.safetensors"
        if not path.is_file():
            return None
        stored, metadata = read_index(path)
        return {name: ref.read() for name, ref in stored.items()}, json.loads(metadata["values"])

    def note(self, name: str) -> dict[str, Any] | None:
        """What `keep_note` kept under `name`, if anything."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def keep_note(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep plain values that a resumed run must find as they are."""
        write_atomically(self.folder / f"{name}.json", [json.dumps(dict(values)).encode()])

    def _record(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def inputs(self, block: int, rank: int, world: int) -> Path:
        """The folder for the hidden states that enter `block`, of one process."""
        return self.folder / f"inputs-{block:05d}-{rank}of{world}"

    def latest_inputs(self, limit: int, rank: int, world: int) -> tuple[int, Path] | None:
        """The last block up to `limit` whose input hidden states were saved whole, and where."""
        for block in range(limit, 0, -1):
            folder = self.inputs(block, rank, world)
            if Activations.is_whole(folder):
                return block, folder
        return None

    def forget_inputs(self, keep: int, rank: int, world: int) -> None:
        """Delete this process's saved hidden states but those of block `keep`."""
        for folder in self.folder.glob(f"inputs-*-{rank}of{world}"):
            if folder != self.inputs(keep, rank, world):
                shutil.rmtree(folder, ignore_errors=True)


def block_tensors(name: str, module: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters of a block by full name."""
    return {f"{name}.{local}": p.data for local, p in module.named_parameters()}
