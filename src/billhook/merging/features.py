"""One group of features while it merges: multiplicities, distances, and the merge of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from billhook.surgery.coupling import ChannelGroup, Role, Slot

Form = Literal["mean_sum", "sum_mean"]
Distance = Literal["ward", "centroid", "running", "bound"]
Side = Literal["in", "same", "out"]


def side_of(slot: Slot) -> Side:
    """in: what makes a feature; out: what reads it; same: what acts on it and is averaged in either form."""
    sides: dict[Role, Side] = {"consume": "out", "scale": "same", "norm": "same"}
    return sides.get(slot.role, "in")


class Features:
    """The features of one group in shared tensors, where those merged away are zeros.

    Gram matrices are kept per side and brought up to date at each merge: the new row, and where a tensor's other axis
    belongs to another group too, a correction of low rank there.

    Args:
        group: its channels.
        tensors: all weights by name, float64; shared by the groups and edited in place.
        form: mean_sum averages what makes a feature and adds what reads it; sum_mean is the paper's other way round.
        distance: see `distances`.
        compared: the slots that count in distances; all are merged.
    """

    def __init__(
        self,
        group: ChannelGroup,
        tensors: dict[str, Tensor],
        form: Form = "mean_sum",
        distance: Distance = "ward",
        compared: Sequence[Slot] | None = None,
    ) -> None:
        self.group, self.form, self.distance = group, form, distance
        self.count = torch.ones(group.size, dtype=torch.float64)  # k: how many original features each stands for
        self.members = [[i] for i in range(group.size)]
        self.alive = torch.ones(group.size, dtype=torch.bool)
        self._tensors = tensors
        self._compared = group.slots if compared is None else compared
        self.grams: dict[Side, Tensor] = {}
        for slot in self._compared:
            rows = slot.rows(tensors[slot.tensor])
            self.grams[side_of(slot)] = self.grams.get(side_of(slot), 0) + rows @ rows.T

    @property
    def left(self) -> int:
        return int(self.alive.sum())

    def distances(self) -> Tensor:
        """D_ij of all pairs i < j that are left, [n, n]; infinite elsewhere.

        centroid: ‖w_i − w_j‖² + ‖c_i − c_j‖² of the means over the members, so that equal features stay at 0.
        ward: the same times k_i k_j/(k_i + k_j), which is how much a merge adds to the squared distances of all
            members from their means: features that stand for many become dear.
        running: the centroid's of k·w and the mean of c, the tensors that the paper's sum/mean form stores.
        bound: k_i k_j/(k_i + k_j) (‖c̄‖ + ‖c_i − c_j‖) ‖w_i − w_j‖ of means, which bounds what a merge changes in a
            ReLU network (c̄: mean weighted by k).
        """
        k, one = self.count, torch.ones_like(self.count)
        stored_mean = self.form == "mean_sum"  # of what makes a feature; what reads it is stored as the sum then
        inside = (k if stored_mean else one) if self.distance == "running" else (one if stored_mean else 1 / k)
        scales: dict[Side, Tensor] = {"in": inside, "same": one, "out": 1 / k if stored_mean else one}
        grams = {side: scales[side][:, None] * gram * scales[side] for side, gram in self.grams.items()}
        apart = {side: _squared(gram) for side, gram in grams.items()}
        if self.distance == "bound":
            made = sum((apart[s] for s in ("in", "same") if s in apart), torch.zeros(len(k), len(k)).double())
            result = made.sqrt()
            if "out" in grams:
                length = grams["out"].diagonal()
                mean = k[:, None] ** 2 * length[:, None] + 2 * k[:, None] * k * grams["out"] + k**2 * length
                result = result * (mean.clamp(min=0).sqrt() / (k[:, None] + k) + apart["out"].sqrt())
        else:
            result = sum(apart.values(), torch.zeros(len(k), len(k)).double())
        if self.distance in ("ward", "bound"):
            result = result * k[:, None] * k / (k[:, None] + k)
        pairs = torch.ones_like(result, dtype=torch.bool).triu(1) & self.alive & self.alive[:, None]
        return result.masked_fill(~pairs, torch.inf)

    def closest(self) -> tuple[float, int, int]:
        """The smallest distance and its pair i < j: the first of equals in order of i, then j."""
        distances = self.distances()
        flat = int(distances.argmin())
        i, j = divmod(flat, len(distances))
        return float(distances[i, j]), i, j

    def largest(self) -> float:
        """The largest distance of a pair that is left; 0 without a pair."""
        distances = self.distances()
        finite = distances[distances.isfinite()]
        return float(finite.max()) if finite.numel() else 0.0

    def merge_(self, i: int, j: int, others: list[Features]) -> None:
        """Replace features i and j by one, in the place of i; tell the other groups of what changed for them."""
        k_i, k_j = float(self.count[i]), float(self.count[j])
        for slot in self.group.slots:
            tensor = self._tensors[slot.tensor]
            where = slot.index[[i, j]]  # [2, slots]
            old = tensor.index_select(slot.axis, where.flatten())
            first, second = torch.split(old, where.shape[1], slot.axis)
            added = slot.role == "consume" if self.form == "mean_sum" else slot.role in ("produce", "shift", "norm")
            merged = first + second if added else (k_i * first + k_j * second) / (k_i + k_j)
            new = torch.cat([merged, torch.zeros_like(merged)], slot.axis)
            for features in others:
                features._change(slot, old, new)
            tensor.index_copy_(slot.axis, where.flatten(), new)
        self.count[i] = k_i + k_j
        self.members[i] += self.members[j]
        self.alive[j] = False
        self._refresh(i, j)

    def _refresh(self, i: int, j: int) -> None:
        """Row and column i of the Gram matrices from the tensors as they are; those of j are zero."""
        fresh: dict[Side, Tensor] = {}
        for slot in self._compared:
            rows = slot.rows(self._tensors[slot.tensor])
            fresh[side_of(slot)] = fresh.get(side_of(slot), 0) + rows @ rows[i]
        for side, gram in self.grams.items():
            gram[j, :] = gram[:, j] = 0
            gram[i, :] = gram[:, i] = fresh[side]

    def _change(self, changed: Slot, old: Tensor, new: Tensor) -> None:
        """Positions along one axis of a tensor change from `old` to `new`: correct the Gram of the rows across."""
        for slot in self._compared:
            if slot.tensor == changed.tensor and slot.axis != changed.axis:
                before, after = slot.rows(old), slot.rows(new)
                self.grams[side_of(slot)] += after @ after.T - before @ before.T


def _squared(gram: Tensor) -> Tensor:
    """Squared distances between rows from their Gram matrix; rounding must not make them negative."""
    length = gram.diagonal()
    return (length[:, None] + length - 2 * gram).clamp(min=0)
