"""Perplexity, by the protocol of the pruning papers.

Text tokenized once, cut into non-overlapping windows of a stated length; the mean token negative
log-likelihood over all windows (each predicts length − 1 tokens from nothing before it), exponentiated.
Logits are taken to float32 before the log-softmax. Models that are streamed from disk are evaluated block by
block, with the same arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy, anatomy_of
from billhook.calibrate import distributed
from billhook.calibrate.capture import feed, inference
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.models.source import source_of
from billhook.progress import Bar, bar
from billhook.record import Evaluation

_TOKENS_AT_ONCE = 2048


def has_perplexity(model: nn.Module) -> bool:
    """Whether a model predicts the next token: encoders and classifiers do not."""
    can = getattr(model, "can_generate", None)
    return bool(can()) if callable(can) else True


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    anatomy: Anatomy | None = None,
    device: torch.device | str | None = None,
    batch: int | None = None,
    max_memory: int | None = None,
    label: str = "perplexity",
) -> float:
    """exp of the mean token negative log-likelihood.

    Args:
        model: a causal language model, in memory or streamed.
        windows: token ids, int64 [windows, length].
        batch: windows per forward pass; by default about 2048 tokens' worth.

    Returns:
        The perplexity; inf where it exceeds float range, nan if a logit is nan.

    Raises:
        BillhookError: the windows hold nothing to predict.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise BillhookError(
            f"Windows of shape {list(windows.shape)} hold nothing to predict: give token ids as [windows, length] with "
            "a length of at least 2."
        )
    size = batch or max(1, _TOKENS_AT_ONCE // windows.shape[1])
    size = min(size, max(1, windows.shape[0] // distributed.world()))  # every process gets a batch
    batches = list(torch.split(windows, size))
    total = torch.zeros((), dtype=torch.float64)
    if source_of(model).streams or device is not None:
        walk = Walk(
            model,
            batches,
            anatomy=anatomy,
            device=device,
            precision="highest",
            needs="forward",
            max_memory=max_memory,
            label=label,
        )
        for _ in walk:
            pass
        own = [b for b in walk.batches if isinstance(b, Tensor)]  # this process's share
        with walk.outputs() as outputs, bar("logits", len(own)) as step:
            total += _sum_of_losses(outputs, own, step)
        distributed.sum_([total])
    else:
        home = next(model.parameters()).device
        family = anatomy_of(model, anatomy)
        with inference(model), bar(label, len(batches)) as step:
            total += _sum_of_losses((feed(model, family, b, home) for b in batches), batches, step)
    mean = float(total) / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else (math.inf if not math.isnan(mean) else math.nan)


def _sum_of_losses(outputs: Iterable[object], batches: list[Tensor], step: Bar) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for output, ids in zip(outputs, batches, strict=True):
            logits: Tensor = getattr(output, "logits", output)  # type: ignore[arg-type]
            for row, target in zip(logits[:, :-1], ids[:, 1:].to(logits.device), strict=True):
                # one window at a time: vocabulary-sized float32 copies are the largest tensors here
                total += nn.functional.cross_entropy(row.float(), target, reduction="sum").double().cpu()
            step()
    return total


def evaluate(
    model: nn.Module,
    windows: Tensor,
    data: str,
    *,
    device: torch.device | str | None = None,
    max_memory: int | None = None,
    label: str = "perplexity",
) -> Evaluation:
    """Perplexity with the protocol it was measured by."""
    start = time.perf_counter()
    value = perplexity(model, windows, device=device, max_memory=max_memory, label=label)
    source = source_of(model)
    dtype = getattr(source, "dtype", None) or next(model.parameters()).dtype
    return Evaluation(
        perplexity=value,
        data=data,
        length=windows.shape[1],
        windows=windows.shape[0],
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        dtype=str(dtype).removeprefix("torch."),
        seconds=time.perf_counter() - start,
    )
