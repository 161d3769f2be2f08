"""The finished parts of a procedure of several training runs, in memory or in a folder, so that a killed one goes on.

A part is finished when its record is there; in a folder the record is written after the tensors, all atomically.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from billhook.calibrate import distributed
from billhook.errors import BillhookError
from billhook.models.files import Entry, Stored, read_index, write, write_atomically
from billhook.training.masks import Masks, pack, unpack

State = Mapping[str, Tensor]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once; the tensors are the model's own."""
    saved = model.state_dict().keys()
    found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def restore(model: nn.Module, state: State) -> None:
    """Overwrite a model in place by what `snapshot` saw, or a part of it.

    Raises:
        BillhookError: the model has no such tensor of that shape.
    """
    own = snapshot(model)
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise BillhookError(f"The model has no {name} of shape {list(tensor.shape)} as the saved state does.")
        own[name].copy_(tensor)


class Store:
    """Finished parts by name: tensors of a model, its masks, and a record of plain values."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BillhookError(f"out={folder} cannot be a folder: {error.strerror or error}.") from None

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Make sure that what the folder holds is of this very procedure.

        Raises:
            BillhookError: names the first fact that differs.
        """
        if self.folder is None:
            return
        path = self.folder / "run.json"
        if not path.is_file():
            self._write(path, facts)
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in facts.items():
            if there.get(key) != value:
                raise BillhookError(
                    f"{self.folder} holds a run with {key} = {there.get(key)}, and this one has {value}: begin with "
                    "the same to go on with it, or give another folder."
                )

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return name in self._memory or (self.folder is not None and self._path(name, ".json").is_file())

    def put(self, name: str, state: State, masks: Masks, record: Mapping[str, Any]) -> None:
        """Keep a finished part."""
        packed = {key: pack(mask) for key, mask in masks.items()}
        if self.folder is None:
            self._memory[name] = {k: t.to("cpu", copy=True) for k, t in state.items()}, packed, dict(record)
            return
        if distributed.is_main():
            write(self._path(name, ".safetensors"), [Entry.of(key, tensor) for key, tensor in state.items()])
            write(self._path(name, ".masks.safetensors"), [Entry.of(key, bits) for key, bits in packed.items()])
        self._write(self._path(name, ".json"), record)

    def state(self, name: str) -> State:
        """The tensors of a part; from a folder each is read when it is asked for.

        Raises:
            BillhookError: they were dropped.
        """
        found = self._memory[name][0] if self.folder is None else self._index(name, ".safetensors")
        if not found:
            raise BillhookError(f"The weights of {name} were not kept: run with keep=True.")
        return found

    def masks(self, name: str, like: Mapping[str, Tensor]) -> Masks:
        """The masks of a part, with shapes and devices of the weights `like`."""
        packed = self._memory[name][1] if self.folder is None else self._index(name, ".masks.safetensors")
        return {key: unpack(packed[key], weight.shape).to(weight.device) for key, weight in like.items()}

    def record(self, name: str) -> dict[str, Any]:
        """The plain values of a part."""
        if self.folder is None:
            return dict(self._memory[name][2])
        result: dict[str, Any] = json.loads(self._path(name, ".json").read_text(encoding="utf-8"))
        return result

    def drop(self, name: str) -> None:
        """Forget the tensors of a part, but not that it is finished, nor its masks and record."""
        if self.folder is None:
            self._memory[name][0].clear()
        elif distributed.is_main():
            self._path(name, ".safetensors").unlink(missing_ok=True)

    def conclude(self, report: Mapping[str, Any]) -> None:
        """Write the report beside the parts."""
        if self.folder is not None:
            self._write(self.folder / "report.json", report)

    def _path(self, name: str, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / (name + ending)

    def _index(self, name: str, ending: str) -> State:
        path = self._path(name, ending)
        return _OnDisk(read_index(path)[0] if path.is_file() else {})

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        if distributed.is_main():
            write_atomically(path, [json.dumps(dict(values), indent=1).encode()])
        distributed.barrier()


class _OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, read when they are asked for."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
