"""Forward passes that halt in the middle: one per batch, side by side, so that a block is computed only once.

A pass over a block as it is, to gather statistics, and another one as it became, to go on from, compute most
products twice. Here the pass of every batch runs up to where the next sites read their input, and halts; once all
have arrived the sites are edited, and the same passes go on with the edited weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from itertools import pairwise
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.anatomy import Site
from billhook.errors import BillhookError

Hook = Callable[[nn.Module, tuple[Any, ...]], None]


class Halting:
    """Passes of all batches through one block that halt before each stage of its sites.

    All run in the thread that made them, each with a stack of its own. Contexts that PyTorch keeps per thread
    (gradient mode, autocast) therefore belong around `arrive` and `finish`, not into `forward`: nothing that is
    entered before a halt may be left after it.

    Args:
        forward: the block's output for batch i, computed.
        count: how many batches there are.
        stages: the sites in the order in which they are called; those of a stage read the same tensor.
    """

    def __init__(self, forward: Callable[[int], Tensor], count: int, stages: Sequence[Sequence[Site]]) -> None:
        self._passes = [greenlet(forward) for _ in range(count)]
        for one in self._passes:
            one.gr_context = copy_context()
        self._halts: list[tuple[int, Tensor] | None] = [None] * count  # at which stage, with which input
        self._outputs: dict[int, Tensor] = {}  # of passes that ended without a halt
        self._running = -1
        self._handles = _listen(stages, self._hook)

    def arrive(self, number: int, batch: int) -> Tensor | None:
        """Run a batch's pass up to a stage: the input that the stage reads; None if the pass does not come by it."""
        at = self._halts[batch]
        if batch not in self._outputs and (at is None or at[0] < number):
            self._run(batch)
            at = self._halts[batch]
        return at[1] if at is not None and at[0] == number else None

    def finish(self, batch: int) -> Tensor:
        """Run a batch's pass to its end: the block's output. Once per batch, after the last stage."""
        if batch not in self._outputs:
            self._run(batch)
        return self._outputs.pop(batch)

    def close(self) -> None:
        """End the passes that have not ended, and free what they hold."""
        for one in self._passes:
            if one:  # begun and not ended
                one.throw()
        for handle in self._handles:
            handle.remove()
        self._passes, self._halts, self._handles = [], [], []

    def _run(self, batch: int) -> None:
        self._running = batch
        one = self._passes[batch]
        result = one.switch() if self._halts[batch] else one.switch(batch)
        if one.dead:
            self._halts[batch] = None
            self._outputs[batch] = result

    def _hook(self, number: int, site: Site) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            at = self._halts[self._running]
            if at is not None and at[0] == number and at[1] is args[0]:
                return  # another site of the stage that has been edited
            if at is not None and at[0] >= number:
                raise BillhookError(
                    f"{site.name} is called in another order for some batches than for the first: use "
                    "true_sequential=false."
                )
            self._halts[self._running] = number, args[0]
            hub = self._passes[self._running].parent
            assert hub is not None
            hub.switch()

        return hook


class Rehearsal:
    """Listens to one pass, and says whether passes can halt: each stage is called once, in order, with one input."""

    def __init__(self, stages: Sequence[Sequence[Site]]) -> None:
        self._calls: list[tuple[int, Site, Tensor]] = []
        self._modes: list[tuple[bool, ...]] = [_modes()]
        self._handles = _listen(stages, self._hook)

    def _hook(self, number: int, site: Site) -> Hook:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._calls.append((number, site, args[0]))
            self._modes.append(_modes())

        return hook

    def end(self) -> tuple[bool, bool]:
        """Stop listening: whether passes can halt, and whether a site was called more than once."""
        for handle in self._handles:
            handle.remove()
        calls, self._calls = self._calls, []
        repeats = len({id(site) for _, site, _ in calls}) < len(calls)
        in_order = all(a[0] <= b[0] for a, b in pairwise(calls))
        one_input = all(a[2] is b[2] for a, b in pairwise(calls) if a[0] == b[0])
        return not repeats and in_order and one_input and len(set(self._modes)) == 1, repeats


def _listen(stages: Sequence[Sequence[Site]], make: Callable[[int, Site], Hook]) -> list[RemovableHandle]:
    """Call `make(number of the stage, site)` before each site reads its input."""
    return [
        site.module.register_forward_pre_hook(make(number, site))
        for number, stage in enumerate(stages)
        for site in stage
    ]


def _modes() -> tuple[bool, ...]:
    """What PyTorch keeps per thread and a block may change around a call."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in devices),
    )
