"""Patterns: where zeros may stand in a weight matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.sparsity.select import budget, keep_largest, keep_n_of_m

Scope = Literal["row", "layer"]


class Pattern(Protocol):
    """Chooses what stays of a matrix of scores."""

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """bool mask [out, in]: True where the weight stays. `scores`: [out, in], larger is kept."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; weights compete within an output row ("row") or the whole matrix ("layer").

    Removes exactly floor(in · s) weights of each row, or floor(out · in · s) of the matrix.
    """

    scope: Scope = "row"

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        if self.scope == "row":
            return keep_largest(scores, budget(scores.shape[1], sparsity))
        flat = scores.reshape(1, -1)
        return keep_largest(flat, budget(flat.shape[1], sparsity)).view(scores.shape)


@dataclass(frozen=True)
class NM:
    """N of every M consecutive inputs of a row are kept (N:M as hardware means it: 2:4 keeps two)."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        if scores.shape[1] % self.m:
            raise BillhookError(
                f"{self.n}:{self.m} does not divide a width of {scores.shape[1]}: use an M that does, or an "
                "unstructured pattern."
            )
        return keep_n_of_m(scores, self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_pattern(text: str) -> NM | None:
    """`NM` for "N:M", `None` for "unstructured".

    Raises:
        BillhookError: anything else.
    """
    if text == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match:
        n, m = int(match[1]), int(match[2])
        if 0 < n <= m:
            return NM(n, m)
        raise BillhookError(f"Pattern {text!r}: N weights are kept of every M, so 1 <= N <= M is needed.")
    raise BillhookError(f"Pattern {text!r} is not known: use unstructured, or N:M such as 2:4 (two kept of four).")


def zero_fraction(weight: Tensor) -> float:
    """Fraction of exact zeros in a weight."""
    return 1.0 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
