"""What surrounds the blocks: the inputs they get from the model's beginning, and the model's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from billhook.anatomy import Anatomy, block_names, find_blocks
from billhook.errors import BillhookError
from billhook.models.source import Source

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stop(Exception):
    """Ends a forward pass early."""


def feed(model: nn.Module, anatomy: Anatomy, batch: Batch, device: torch.device) -> Any:
    """Call the model on one batch."""
    if isinstance(batch, Tensor):
        if anatomy.input is None:
            return model(batch.to(device))
        return model(**{anatomy.input: batch.to(device)})
    return model(**{key: value.to(device) for key, value in batch.items()})


@contextmanager
def surroundings(model: nn.Module, anatomy: Anatomy, source: Source, device: torch.device) -> Iterator[None]:
    """While inside, modules outside the blocks have their weights on `device` from their first use on."""
    inside = {id(module) for block in find_blocks(model, anatomy) for module in block.modules()}
    handles = []
    loaded: list[tuple[nn.Module, str]] = []

    def use(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not any(m is module for m, _ in loaded):
                source.load_own(module, name, device)
                loaded.append((module, name))

        return hook

    for name, module in model.named_modules():
        own = module._parameters or module._buffers
        if id(module) not in inside and own:
            handles.append(module.register_forward_pre_hook(use(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, name in loaded:
            source.release_own(module, name)


@contextmanager
def replaced(blocks: list[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """While inside, block i's forward is `make(i)`."""
    for index, block in enumerate(blocks):
        block.forward = make(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no key-value cache."""
    training = model.training
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    if training:  # walking over all modules of a large model takes milliseconds
        model.eval()
    if config is not None and cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if training:
            model.train()
        if config is not None and cache is not None:
            config.use_cache = cache


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no key-value cache."""
    with quiet(model), torch.no_grad():
        yield


class Capture:
    """Runs the model's beginning on every batch and keeps what each block is called with.

    The blocks are not run: each is replaced by a recorder, so families whose blocks get different arguments
    (sliding and full attention, local and global rotary embeddings) need no code of their own.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, source: Source, device: torch.device, batches: list[Batch]
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.source = source
        self.device = device
        self.batches = batches
        self.blocks = find_blocks(model, anatomy)
        self.calls: list[list[Call]] = []  # [batch][block]
        self._seen: dict[tuple[Any, ...], list[Tensor]] = {}

    def run(self, receive: Callable[[int, Tensor], None]) -> None:
        """Capture all batches; `receive(i, hidden)` gets the first block's input of batch i."""
        with inference(self.model), surroundings(self.model, self.anatomy, self.source, self.device):
            for index, batch in enumerate(self.batches):
                calls: list[Call] = []
                first: list[Tensor] = []
                recorders = replaced(self.blocks, lambda i, c=calls, f=first: self._recorder(i, c, f))  # type: ignore[misc]
                with recorders, suppress(Stop):
                    feed(self.model, self.anatomy, batch, self.device)
                if len(calls) != len(self.blocks):
                    names = block_names(self.model, self.anatomy)
                    raise BillhookError(
                        f"Block {names[len(calls)]} was not reached in a forward pass: the anatomy's blocks "
                        f"{self.anatomy.blocks!r} are not run one after the other."
                    )
                self.calls.append(calls)
                receive(index, first[0])

    def _recorder(self, index: int, calls: list[Call], first: list[Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            if not first:
                first.append(hidden)
            calls.append(Call(self._keep(args), self._keep(kwargs)))
            if index == len(self.blocks) - 1:
                raise Stop
            # what is returned is never used, but has the shape of a hidden state for code that looks at it
            return first[0]

        return forward

    def _keep(self, value: Any) -> Any:
        return tree_map(self._intern, value)

    def _intern(self, leaf: Any) -> Any:
        """One copy of equal tensors: masks and rotary tables are the same for every block and batch."""
        if not isinstance(leaf, Tensor):
            return leaf
        seen = self._seen.setdefault((leaf.shape, leaf.dtype), [])
        for other in seen:
            if other is leaf or torch.equal(other, leaf):
                return other
        if len(seen) < 16:
            seen.append(leaf)
        return leaf

    def finish(self, index: int, hidden: Tensor, as_tuple: bool) -> Any:
        """The model's output for batch `index`, given the hidden state that left the last block."""
        returned = (hidden,) if as_tuple else hidden
        with inference(self.model), replaced(self.blocks, lambda i: lambda *args, **kwargs: returned):
            return feed(self.model, self.anatomy, self.batches[index], self.device)
