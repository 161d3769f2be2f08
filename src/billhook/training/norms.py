"""Statistics of BatchNorm, re-estimated by a training that leaves the weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from billhook.errors import BillhookError


def running_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The norms of a model that keep statistics of their inputs, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@contextmanager
def estimating(model: nn.Module) -> Iterator[None]:
    """While inside, running statistics start anew and become plain averages over the batches of forward passes.

    Raises:
        BillhookError: on leaving, if a norm has seen no batch.
    """
    norms = running_norms(model)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    for name, norm in norms.items():
        if norm.num_batches_tracked is not None and not int(norm.num_batches_tracked):
            raise BillhookError(
                f"No batch reached {name} while its statistics were re-estimated: raise `recalibrate`, or give batches."
            )
