"""A Hugging Face folder on disk: its configuration, and where each of its tensors lies."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.models import bitmask
from billhook.models.files import Stored, read_index

COMPRESSED = "model.billhook.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Packed:
    """A tensor in bitmask storage."""

    mask: Stored
    values: Stored
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.values.nbytes

    def read(self) -> Tensor:
        mask, values = self.mask.read(), self.values.read()
        try:
            return bitmask.unpack(mask, values, self.shape)
        except (RuntimeError, IndexError):
            raise BillhookError(
                f"{self.mask.file} is damaged at tensor {self.values.key[:-7]!r}: make it again."
            ) from None


@dataclass
class Checkpoint:
    """The weight files of a model folder, opened but not read.

    Attributes:
        folder: the Hugging Face folder.
        tensors: key in the files -> where it is.
        files: the weight files.
    """

    folder: Path
    tensors: dict[str, Stored | Packed] = field(repr=False)
    files: list[Path] = field(repr=False)

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Read the index and every header; checks that all shards are there and whole.

        Raises:
            BillhookError: no configuration, no safetensors weights, a missing or truncated shard, or weights
                that are only there as a pickle.
        """
        if not (folder / "config.json").is_file():
            raise BillhookError(f"{folder} is not a Hugging Face model folder: it has no config.json.")
        index = folder / "model.safetensors.index.json"
        listed: dict[str, str] = {}
        if (folder / COMPRESSED).is_file():
            files = [folder / COMPRESSED]
        elif index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [folder / name for name in sorted(set(listed.values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BillhookError(f"{index} is damaged: fetch the model again.") from None
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise BillhookError(
                    f"{folder} lacks {len(missing)} of {len(files)} weight shards, the first is {missing[0]}: "
                    "fetch the model again."
                )
        else:
            files = [folder / "model.safetensors"]
            if not files[0].is_file():
                pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
                if pickles:
                    raise BillhookError(
                        f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is "
                        "loaded and is refused: save the model as safetensors first."
                    )
                raise BillhookError(f"{folder} has no weights: model.safetensors is missing.")
        tensors: dict[str, Stored | Packed] = {}
        for file in files:
            stored, metadata = read_index(file)
            tensors.update(_packed(file, stored, metadata) if "billhook_storage" in metadata else stored)
        lost = [key for key in listed if key not in tensors]
        if lost:
            raise BillhookError(f"{folder}: tensor {lost[0]!r} is in the index but in no shard: fetch it again.")
        return Checkpoint(folder, tensors, files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def config(self) -> dict[str, Any]:
        """config.json as written."""
        result: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return result


def _packed(file: Path, stored: dict[str, Stored], metadata: dict[str, str]) -> dict[str, Stored | Packed]:
    if metadata["billhook_storage"] != bitmask.MARK:
        raise BillhookError(
            f"The weights are in billhook storage {metadata['billhook_storage']!r}, which this version does not "
            "know: install a newer billhook."
        )
    result: dict[str, Stored | Packed] = {}
    for key, entry in stored.items():
        if key.endswith(".bitmask") and f"{key[:-8]}.values" in stored:
            name = key[:-8]
            try:
                shape = tuple(json.loads(metadata[f"{name}.shape"]))
            except (KeyError, ValueError, TypeError):
                raise BillhookError(f"{file} is damaged: it does not tell the shape of {name!r}.") from None
            result[name] = Packed(entry, stored[f"{name}.values"], shape)
        elif not (key.endswith(".values") and f"{key[:-7]}.bitmask" in stored):
            result[key] = entry
    return result
