"""Where a module's weights are while it is not in use: in memory, or on disk until it is its turn."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.models.checkpoint import Checkpoint, Packed
from billhook.models.files import Stored
from billhook.system import finite


class Source(Protocol):
    """Brings the weights of one part of a model into memory and lets them go again."""

    streams: bool

    def load(self, module: nn.Module, name: str, device: torch.device) -> None:
        """Make all parameters of `module`, whose full name is `name`, real on `device`."""
        ...

    def release(self, module: nn.Module, name: str) -> None:
        """Give the memory back; edits that were not written elsewhere are gone."""
        ...

    def load_own(self, module: nn.Module, name: str, device: torch.device) -> None:
        """Like `load`, for the parameters and buffers that the module itself holds, not its children's."""
        ...

    def release_own(self, module: nn.Module, name: str) -> None:
        """Undo `load_own`."""
        ...


class Resident:
    """All weights are in memory; parts move to the compute device for their turn."""

    streams = False

    def __init__(self) -> None:
        self._home: dict[str, torch.device] = {}

    def load(self, module: nn.Module, name: str, device: torch.device) -> None:
        first = next(module.parameters(), None)
        if first is not None:
            self._home[name] = first.device
            check_finite(name, dict(module.named_parameters()))
        module.to(device)

    def release(self, module: nn.Module, name: str) -> None:
        if name in self._home:
            module.to(self._home.pop(name))

    def load_own(self, module: nn.Module, name: str, device: torch.device) -> None:
        tensors = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
        if tensors:
            self._home[name] = tensors[0].device
            _move_own(module, device)

    def release_own(self, module: nn.Module, name: str) -> None:
        if name in self._home:
            _move_own(module, self._home.pop(name))


class Streamed:
    """Weights are read from safetensors files when their module's turn comes, and dropped after it.

    Attributes:
        refs: full parameter name -> stored tensor.
        checkpoint: the folder that the model was opened from.
        keys: full parameter name -> its key in the checkpoint's files.
        dtype: floating tensors are cast to it as they are read.
    """

    streams = True

    def __init__(
        self,
        refs: Mapping[str, Stored | Packed],
        keys: Mapping[str, str],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
    ) -> None:
        self.refs = dict(refs)
        self.keys = dict(keys)
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.reshaped = False  # whether parameters are named and shaped unlike the checkpoint's

    def rename(self, names: Mapping[str, str]) -> None:
        """Know parameters under other names from now on: old full name -> new one."""
        self.refs = {names.get(old, old): ref for old, ref in self.refs.items()}
        self.keys = {names.get(old, old): key for old, key in self.keys.items()}
        self.reshaped = True

    def keep_blocks(self, before: Sequence[str], moved: Mapping[str, str]) -> None:
        """Forget the parameters of blocks that were removed; those of the others move to new places: old -> new."""
        names: dict[str, str] = {}
        for full in list(self.refs):
            owner = next((name for name in before if full.startswith(f"{name}.")), None)
            if owner is None:
                continue
            if owner in moved:
                names[full] = moved[owner] + full[len(owner) :]
            else:
                del self.refs[full]
                self.keys.pop(full, None)
        self.rename(names)

    def load(self, module: nn.Module, name: str, device: torch.device) -> None:
        for local, full in _names(module, name):
            tensor = self.read(full)
            check_finite(full, {"": tensor})
            _assign(module, local, tensor.to(device))

    def check_rest(self, blocks: str) -> None:
        """Refuse NaN or infinite values outside the blocks, whose path is `blocks`; reads piece by piece.

        Blocks are checked when they are loaded; embeddings and head are only mapped or never loaded at all.

        Raises:
            BillhookError: names the tensor.
        """
        for name, ref in self.refs.items():
            if name.startswith(f"{blocks}.") or not ref.dtype.is_floating_point:
                continue
            pieces = ref.chunks() if isinstance(ref, Stored) else [ref.read()]
            for piece in pieces:
                values = piece if isinstance(piece, Tensor) else torch.frombuffer(bytearray(piece), dtype=ref.dtype)
                check_finite(name, {"": values})

    def read(self, name: str) -> Tensor:
        """One parameter, in the dtype of the model."""
        tensor = self.refs[name].read()
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def release(self, module: nn.Module, name: str) -> None:
        for local, _ in _names(module, name):
            self._drop(module, local)

    def load_own(self, module: nn.Module, name: str, device: torch.device) -> None:
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                full = f"{name}.{leaf}" if name else leaf
                # An embedding may be the largest tensor of the model and only some rows of it are read.
                stored = self.refs[full]
                mapped = isinstance(stored, Stored) and stored.dtype == self.dtype and device.type == "cpu"
                tensor = stored.map() if mapped and isinstance(stored, Stored) else self.read(full)
                _assign(module, leaf, tensor.to(device))
        _move_buffers(module, device)

    def release_own(self, module: nn.Module, name: str) -> None:
        for leaf in list(module._parameters):
            self._drop(module, leaf)

    @staticmethod
    def _drop(module: nn.Module, local: str) -> None:
        owner, _, leaf = local.rpartition(".")
        parameter = module.get_submodule(owner)._parameters.get(leaf)
        if parameter is not None:
            _assign(module, local, torch.empty_like(parameter, device="meta"))


_SOURCES: weakref.WeakKeyDictionary[nn.Module, Source] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, source: Source) -> None:
    """Remember where the weights of `model` come from."""
    _SOURCES[model] = source


def source_of(model: nn.Module) -> Source:
    """The attached source; `Resident` for a model that is simply in memory."""
    return _SOURCES.get(model) or Resident()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights, in memory or streamed."""
    source = _SOURCES.get(model)
    return source.dtype if isinstance(source, Streamed) else next(model.parameters()).dtype


def match_keys(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Full parameter name -> key in the files; None where names do not correspond one to one.

    Checkpoints of a base model lack the prefix that the model with a head gives it, or the other way round;
    tied parameters are stored once and are found under the name of the other; some families are stored under
    older names than Transformers gives them in memory.
    """
    renamed = _renamed(model, checkpoint)
    if renamed is None:
        return None
    prefix = getattr(model, "base_model_prefix", "")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    keys: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names = [name, tied[name]] if name in tied else [name]
        spelled = (renamed.get(k, k) for n in names for k in _spellings(n, prefix))
        key = next((k for k in spelled if k in checkpoint.tensors), None)
        if key is None or tuple(checkpoint.tensors[key].shape) != tuple(parameter.shape):
            return None
        keys[name] = key
    return keys


def _renamed(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """Name in memory -> key on disk where Transformers renames it; None where it also changes what is stored."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if not isinstance(change, WeightRenaming)]
        renamed = {}
        for key in checkpoint.tensors:
            name, converted = rename_source_key(key, renamings, converters)
            if converted is not None:
                return None
            renamed[name] = key
    except (ImportError, AttributeError, TypeError):  # not a Transformers model, or a version without these
        return {}
    return renamed


def fill_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the buffers that are part of a model's weights (running means, for example)."""
    prefix = getattr(model, "base_model_prefix", "")
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        key = next((k for k in _spellings(name, prefix) if k in checkpoint.tensors), None)
        if key is not None and name in persistent and tuple(checkpoint.tensors[key].shape) == tuple(buffer.shape):
            buffer.copy_(checkpoint.tensors[key].read())


def _spellings(name: str, prefix: str) -> tuple[str, str, str]:
    """The keys that a name may have in a checkpoint."""
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        BillhookError: names the tensor.
    """
    for local, tensor in tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            where = f"{name}.{local}" if local else name
            raise BillhookError(f"Tensor {where!r} of the model has NaN or infinite values: the weights are damaged.")


def _move_own(module: nn.Module, device: torch.device) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    _move_buffers(module, device)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for leaf, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[leaf] = buffer.to(device)


def _names(module: nn.Module, name: str) -> Iterable[tuple[str, str]]:
    for local, _ in list(module.named_parameters(remove_duplicate=False)):
        yield local, f"{name}.{local}" if name else local


def _assign(module: nn.Module, local: str, tensor: Tensor) -> None:
    owner_name, _, leaf = local.rpartition(".")
    owner = module.get_submodule(owner_name)
    # As a model in memory has it; autocast keeps its rounded copy of such parameters only.
    owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
