"""DOTResize: merge the coordinates of the residual stream into fewer ones by optimal transport."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from billhook.calibrate.statistics import Statistic, Tokens
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.slicegpt import SliceGPT


@register("dotresize")
class DOTResize(SliceGPT):
    title = "DOTResize"
    paper = Paper(
        "DOTResize: Reducing LLM Width via Discrete Optimal Transport-based Neuron Merging",
        "N. Verma, K. Murray, K. Duh",
        "2025",
        "2507.04517",
    )
    summary = (
        "Keeps the coordinates of the residual stream with the most energy and transports the signal of the others to "
        "them by entropic optimal transport; the map is made orthogonal by QR, as it passes norms."
    )
    when = (
        "Experimental: the paper's cost, masses and regularisation are not confirmed here. At equal width the "
        "principal axes of slicegpt lose less of the signal by construction."
    )

    target: Literal["energy", "pca"] = Field(
        "energy", description="What stays: the coordinates of most energy, or the first principal axes."
    )
    # the paper's setting is not known; on three models soft plans of squared distances lose least (docs/benchmarks.md)
    cost: Literal["l1", "sqeuclidean"] = Field(
        "sqeuclidean", description="Distance between two coordinates' activations."
    )
    entropy: float = Field(1.0, gt=0, description="Weight of the entropy, in units of the largest cost.")
    merge: bool = Field(True, description="False deletes the coordinates that do not stay: the control.")
    iterations: int = Field(500, ge=1, description="Sinkhorn iterations at most.")

    def statistic(self, walk: Walk) -> type[Statistic[Tensor]]:
        return Tokens

    def centred(self, signal: Tensor, centre: Tensor) -> Tensor:
        return signal @ centre

    def basis(self, signal: Tensor, width: int) -> Tensor:
        """orth(T) for the transport plan T from all coordinates to the kept ones; [hidden, width], float64."""
        if self.target == "pca":
            axes = super().basis(signal.T @ signal, signal.shape[1])
            return axes @ self._merged(signal @ axes, torch.arange(width, device=signal.device))
        kept = signal.square().sum(0).argsort(descending=True, stable=True)[:width].sort().values
        return self._merged(signal, kept)

    def check(self, walk: Walk) -> None:
        super().check(walk)
        _transport()

    def _merged(self, signal: Tensor, kept: Tensor) -> Tensor:
        if not self.merge:
            return torch.eye(signal.shape[1], dtype=signal.dtype, device=signal.device)[:, kept]
        plan = transport_plan(signal, kept, self.cost, self.entropy, self.iterations)
        return orthonormal(plan, signal.square().sum(0))


def transport_plan(signal: Tensor, kept: Tensor, cost: str, entropy: float, iterations: int) -> Tensor:
    """The entropic plan between all coordinates and the kept ones, uniform masses, [hidden, kept], float64.

    Args:
        signal: activations, [tokens, hidden] float64.
        kept: indices of the target coordinates.
        cost: "l1" or "sqeuclidean", between the coordinates' columns.
        entropy: in units of the largest cost.
        iterations: of Sinkhorn's algorithm in the logarithmic domain, at most.
    """
    columns = signal.T
    distance = torch.cdist(columns, columns[kept], p=1.0 if cost == "l1" else 2.0)
    distance = distance if cost == "l1" else distance.square()
    distance = distance / distance.max().clamp_min(1e-300)
    rows, targets = distance.shape
    from_all = torch.full((rows,), 1.0 / rows, dtype=torch.float64, device=signal.device)
    to_kept = torch.full((targets,), 1.0 / targets, dtype=torch.float64, device=signal.device)
    with warnings.catch_warnings():  # an unfinished plan still spans what it spans
        warnings.simplefilter("ignore")
        plan: Tensor = _transport().sinkhorn(
            from_all, to_kept, distance, entropy, method="sinkhorn_log", numItermax=iterations, stopThr=1e-9
        )
    return plan


def orthonormal(plan: Tensor, energy: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `plan`, refilled with coordinates of most energy where they depend.

    Only the column space of a plan matters: a map through a norm has to be orthogonal, and what QR leaves aside is
    undone before the norm and again behind it. (The paper takes QR; any orthonormal basis does the same.)
    """
    rows, width = plan.shape
    order = energy.argsort(descending=True, stable=True)
    spare = torch.eye(rows, dtype=plan.dtype, device=plan.device)[:, order]
    scaled = plan / plan.norm(dim=0).clamp_min(1e-300)
    basis, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    found: Tensor = basis[:, values > 1e-10 * values.max()]
    for column in spare.T:
        if found.shape[1] == width:
            break
        rest = column - found @ (found.T @ column)
        rest = rest - found @ (found.T @ rest)
        if rest.norm() > 1e-6:
            found = torch.cat([found, (rest / rest.norm())[:, None]], dim=1)
    return found


def _transport() -> Any:
    try:
        import ot
    except ImportError:
        raise BillhookError(
            "dotresize needs the optimal transport library POT: install it with pip install 'billhook[transport]'."
        ) from None
    return ot
