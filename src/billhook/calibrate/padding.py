"""Padded sequences: which positions are tokens, so that padding is counted by no statistic and by no loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

IGNORED = -100  # what cross_entropy passes over


def real_tokens(batch: Tensor | Mapping[str, Tensor]) -> Tensor | None:
    """Which positions are tokens, bool [b, t]; None where none is padding."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    real = mask != 0
    return None if bool(real.all()) else real


def rows(x: Tensor, real: Tensor | None) -> Tensor:
    """The tokens of x, [b, t, width] or flattened, as rows [tokens, width] without padding.

    Where x has another number of rows, as what reaches a routed expert, its padding is not known.
    """
    if real is None or x.shape[:-1].numel() != real.numel():
        return x.reshape(-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1])[real.flatten().to(x.device)]


def sequences(x: Tensor, real: Tensor | None) -> Iterator[Tensor]:
    """The same as [sequences, tokens, width], those of a batch together unless their lengths differ."""
    if real is not None and x.shape[:-1].numel() == real.numel():
        for one, there in zip(x.reshape(*real.shape, x.shape[-1]), real.to(x.device), strict=True):
            yield one[there][None]
    else:
        yield x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def next_tokens(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What each position but the last should predict, [b, t - 1]; `IGNORED` beside padding.

    Args:
        ids: [b, t].
        mask: attention mask [b, t]; what follows a pad is predicted from nothing, so it is no target either.
    """
    targets = ids[:, 1:]
    if mask is None:
        return targets
    return targets.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED)
