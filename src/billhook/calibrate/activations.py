"""The hidden states between two blocks: in memory, or on disk past a limit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from billhook.models.files import byte_view, write_atomically

_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


class Activations:
    """One tensor per calibration batch, replaced batch by batch as the walk passes a block.

    With a folder the tensors live in files of raw bytes, each read whole when it is asked for: what is not in
    use takes no resident memory. The folder is whole once `seal` has written its list of shapes.
    """

    def __init__(self, count: int, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        self.folder = folder
        self._memory: list[Tensor | None] = [None] * count
        self._meta: list[tuple[tuple[int, ...], torch.dtype]] = [((), torch.float32)] * count
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "shapes.json").unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._meta)

    def __getitem__(self, index: int) -> Tensor:
        if self.folder is None:
            tensor = self._memory[index]
            assert tensor is not None
            return tensor
        shape, dtype = self._meta[index]
        raw = bytearray(self._file(index).read_bytes())
        return torch.frombuffer(raw, dtype=dtype).view(shape).to(self.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._meta[index] = (tuple(value.shape), value.dtype)
        if self.folder is None:
            self._memory[index] = value
        else:
            write_atomically(self._file(index), [byte_view(value.detach().cpu().contiguous())])

    def positions(self) -> int:
        """How many positions, tokens and padding alike, all tensors have."""
        return sum(math.prod(shape[:-1]) for shape, _ in self._meta)

    def seal(self) -> None:
        """Declare the folder whole."""
        assert self.folder is not None
        shapes = [[list(shape), str(dtype)] for shape, dtype in self._meta]
        write_atomically(self.folder / "shapes.json", [json.dumps(shapes).encode()])

    def save(self, folder: Path) -> None:
        """Copy all tensors to a sealed folder."""
        copy = Activations(len(self), self.device, folder)
        for index in range(len(self)):
            copy[index] = self[index]
        copy.seal()

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Whether `folder` was sealed."""
        return (folder / "shapes.json").is_file()

    @staticmethod
    def open(folder: Path, device: torch.device) -> Activations:
        """The activations of a sealed folder."""
        shapes = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        result = Activations(len(shapes), device)
        result.folder = folder
        result._meta = [(tuple(shape), _DTYPES[dtype]) for shape, dtype in shapes]
        return result

    def in_memory(self) -> Activations:
        """The same, with every tensor in memory."""
        result = Activations(len(self), self.device)
        for index in range(len(self)):
            result[index] = self[index]
        return result

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:06d}.bin"
