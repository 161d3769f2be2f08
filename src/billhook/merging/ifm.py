"""Iterative feature merging: channels that read and write alike become one. No data, no training.

Source: Chen, Zhou & Yan, "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its
Interpretation Using Category Theory", ICLR 2024, arXiv:2310.06756. Ours: folded norms and biases in the distance (the
official code adds the norms' vectors up and leaves biases out), the mean/sum form, Ward's distance, the bound, a
threshold that does not grow while merging, widths instead of a threshold. The paper's and its code's own are
`form="sum_mean", distance="running", base="running", biases=False, bn="keep"`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from billhook.declared import Declared, Paper
from billhook.errors import BillhookError, nearest
from billhook.merging.features import Distance, Features, Form
from billhook.surgery.batchnorm import fold_norms_, pass_all_, unfold_norms_
from billhook.surgery.channels import ChannelGroup, Slot, channel_groups, keep_all_
from billhook.surgery.coupling import fetch, owner_of


@dataclass(frozen=True)
class Merge:
    """One merge: of original features `first` and `second` of a group, with all that were merged into them."""

    first: int
    second: int
    distance: float
    ratio: float  # distance / base: the smallest beta at which this merge happens


@dataclass
class GroupMerge:
    """What happened to one group."""

    name: str
    before: int  # features
    base: float  # what distances are compared with at the end
    merges: list[Merge] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)  # original features in each that is left

    @property
    def after(self) -> int:
        """Features left: the feature complexity at this beta."""
        return self.before - len(self.merges)

    def width(self, beta: float) -> int:
        """Features left if merging had stopped at the first distance over beta * base."""
        stop = next((k for k, merge in enumerate(self.merges) if merge.ratio > beta), len(self.merges))
        return self.before - stop


@dataclass
class MergeReport:
    """What was merged, and how many parameters that left."""

    groups: dict[str, GroupMerge]
    fixed: dict[str, str]  # group -> why its channels cannot be merged
    parameters: tuple[int, int]  # before (norms included), after


class IFM(Declared):
    kind = "merging"
    name = "ifm"
    title = "Iterative feature merging"
    paper = Paper(
        "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation Using "
        "Category Theory",
        "Y. Chen, Z. Zhou, J. Yan",
        "ICLR 2024",
        "2310.06756",
    )
    summary = (
        "Merges the two channels of a layer with the most similar incoming and outgoing weights, again and again, "
        "until the closest pair is farther apart than a fraction of the farthest."
    )
    when = (
        "When no data may be touched, as a probe for redundancy, or as a start before fine-tuning. Better than "
        "dropping channels at high ratios; little can be merged in networks trained without weight decay."
    )
    needs: ClassVar[str] = "nothing"

    beta: float = Field(0.05, ge=0, lt=1, description="Merging stops at a distance above this fraction of the base.")
    widths: float | dict[str, float] | None = Field(
        None,
        description="Instead of beta: the fraction of channels kept; or by group a fraction or (above 1) a count.",
    )
    form: Form = Field("mean_sum", description="Average producers and add consumers, or sum_mean, as in the paper.")
    distance: Distance = Field(
        "ward", description="Growth of the spread; between means of members; of the paper's stored tensors; a bound."
    )
    normalise: bool = Field(False, description="First scale every feature's incoming weights to length 1 (ReLU only).")
    bn: Literal["fold", "identity", "keep"] = Field(
        "fold",
        description="Fold norms and leave none; put identities back; or merge their vectors like the producers'.",
    )
    biases: bool = Field(True, description="Whether biases count in distances.")
    max_ratio: float = Field(
        0.9, gt=0, le=1, description="Most merges of a group under beta, as a fraction of its width."
    )
    base: Literal["initial", "running"] = Field(
        "initial", description="Compare with the largest distance at the start, or at present."
    )
    exclude: list[str] = Field([], description="Names of groups to leave alone; * stands for anything.")

    @field_validator("widths")
    @classmethod
    def _positive(cls, widths: float | dict[str, float] | None) -> float | dict[str, float] | None:
        if isinstance(widths, float) and not 0 < widths <= 1:
            raise ValueError("a fraction of the channels is above 0 and at most 1")
        if isinstance(widths, dict):
            for name, width in widths.items():
                if width <= 0 or (width > 1 and width != int(width)):
                    raise ValueError(
                        f"the width of {name} is neither a fraction up to 1 nor a whole number of channels"
                    )
        return widths

    def merge(self, model: nn.Module, example: Tensor | tuple[Any, ...]) -> tuple[nn.Module, MergeReport]:
        """A smaller copy of the model, in evaluation form, and the report.

        Args:
            model: that torch.fx can trace; left as it is.
            example: an input, or a tuple of all inputs; only its shapes matter.

        Raises:
            BillhookError: the model cannot be traced; a width names no group; an option does not suit the network.
        """
        before = sum(p.numel() for p in model.parameters())
        model = copy.deepcopy(model)
        folded = [] if self.bn == "keep" else fold_norms_(model, example)
        if self.bn == "identity":
            unfold_norms_(model, folded)
        neutral = {one.name for one in folded}  # norms that change nothing
        merged, fixed = self._chosen(channel_groups(model, example), neutral)
        tensors = {slot.tensor: fetch(model, slot.tensor).data.double().cpu() for g in merged for slot in g.slots}
        if self.normalise:
            for group in merged:
                self._normalise_(group, tensors)
        all_features = [
            Features(group, tensors, self.form, self.distance, self._compared(group, tensors, neutral))
            for group in merged
        ]
        reports = self._loop(all_features)
        for name, tensor in tensors.items():
            fetch(model, name).data.copy_(tensor)
        keep_all_(model, [(features.group, features.alive.nonzero().flatten()) for features in all_features])
        if self.bn == "identity":
            for name in neutral:
                pass_all_(model.get_submodule(name))  # type: ignore[arg-type]  # a norm that was put back
        self._run(model, example)
        after = sum(p.numel() for p in model.parameters())
        return model, MergeReport({report.name: report for report in reports}, fixed, (before, after))

    def _loop(self, all_features: list[Features]) -> list[GroupMerge]:
        """One merge per group and round, in forward order, until no group merges."""
        initial = [features.largest() for features in all_features]
        reports = [GroupMerge(f.group.name, f.group.size, base) for f, base in zip(all_features, initial, strict=True)]
        least = [self._least(features) for features in all_features]
        changed = True
        while changed:
            changed = False
            for features, report, smallest in zip(all_features, reports, least, strict=True):
                if features.left <= smallest:
                    continue
                distance, i, j = features.closest()
                if self.base == "running":
                    report.base = features.largest()
                if self.widths is None and distance > self.beta * report.base:
                    continue
                features.merge_(i, j, all_features)
                report.merges.append(Merge(i, j, distance, distance / report.base if report.base else 0.0))
                changed = True
        for features, report in zip(all_features, reports, strict=True):
            report.members = [sorted(features.members[i]) for i in features.alive.nonzero().flatten().tolist()]
        return reports

    def _compared(self, group: ChannelGroup, tensors: dict[str, Tensor], neutral: set[str]) -> list[Slot]:
        """What counts in distances: without the norms that change nothing, and those that the official code sums."""
        slots = [slot for slot in group.slots if self.biases or tensors[slot.tensor].ndim >= 2]
        return [s for s in slots if s.role != "norm" or (self.form == "mean_sum" and owner_of(s.tensor) not in neutral)]

    def _least(self, features: Features) -> int:
        size = features.group.size
        if self.widths is None:
            return max(1, size - math.floor(self.max_ratio * size + 1e-9))
        width = self.widths.get(features.group.name, 1.0) if isinstance(self.widths, Mapping) else self.widths
        return max(1, round(size * width)) if width <= 1 else min(size, int(width))

    def _chosen(self, groups: list[ChannelGroup], neutral: set[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
        """The groups to merge, and why the others are not."""
        fixed = {group.name: group.fixed for group in groups if group.fixed and group.producers}
        free = [group for group in groups if not group.fixed and group.producers and group.consumers]
        for pattern in self.exclude:
            found = [group.name for group in free if fnmatchcase(group.name, pattern)]
            if not found:
                raise BillhookError(
                    f"No group is named {pattern!r}, to be excluded{nearest(pattern, (g.name for g in free))}."
                )
            fixed |= dict.fromkeys(found, "are excluded")
        free = [group for group in free if group.name not in fixed]
        for name in self.widths if isinstance(self.widths, Mapping) else ():
            if name not in {group.name for group in free}:
                why = f": its channels {fixed[name]}" if name in fixed else nearest(name, (g.name for g in free))
                raise BillhookError(f"There is no group {name!r} to give a width{why}.")
        for group in free:
            norms = [slot for slot in group.of("norm") if owner_of(slot.tensor) not in neutral]
            if self.form == "sum_mean" and self.bn != "keep" and norms:
                raise BillhookError(
                    f"The channels of {group.name} pass a norm that cannot be folded, which form=sum_mean would "
                    "distort: use form=mean_sum, or exclude the group."
                )
            if self.normalise and (norms or not group.homogeneous):
                raise BillhookError(
                    f"The channels of {group.name} pass a norm or an activation that a factor does not pass "
                    "through: leave normalise out, or exclude the group."
                )
        return [group for group in free if group.size > 1], fixed

    def _normalise_(self, group: ChannelGroup, tensors: dict[str, Tensor]) -> None:
        """Scale incoming rows to length 1 and outgoing columns by what they had: the network computes the same.

        In forward order, so that a chain's later rows are scaled after their columns were.
        """
        made = [slot for slot in group.producers if self.biases or tensors[slot.tensor].ndim >= 2]
        length = sum((slot.rows(tensors[slot.tensor]).square().sum(1) for slot in made), torch.zeros(1).double()).sqrt()
        length[length == 0] = 1
        for slot in group.of("produce", "shift", "norm", "consume"):
            tensor = tensors[slot.tensor]
            factor = torch.ones(slot.length, dtype=torch.float64)
            factor[slot.index] = (length if slot.role == "consume" else 1 / length)[:, None].expand(slot.index.shape)
            tensor.mul_(factor.view([-1 if axis == slot.axis else 1 for axis in range(tensor.ndim)]))

    def _run(self, model: nn.Module, example: Tensor | tuple[Any, ...]) -> None:
        training = model.training
        try:
            with torch.no_grad():
                model.eval()(*(example if isinstance(example, tuple) else (example,)))
        except Exception as error:  # the model's own code
            raise BillhookError(
                f"The merged {type(model).__name__} does not run ({str(error).splitlines()[0]}): its code seems to "
                "hold widths as constants. Take them from the tensors, or exclude those groups."
            ) from None
        finally:
            model.train(training)


def merge_features(
    model: nn.Module, *, example: Tensor | tuple[Any, ...], **options: Any
) -> tuple[nn.Module, MergeReport]:
    """Merge functionally equivalent channels: `IFM(**options).merge(model, example)`.

    Raises:
        BillhookError: as `IFM.merge`; or no such option, or a value out of range.
    """
    return IFM(**options).merge(model, example)
