"""SliceGPT: turn the residual stream onto its principal axes, place by place, and cut the least of them off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from billhook.calibrate.influence import block_influence
from billhook.calibrate.statistics import Covariance, Statistic
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.structured import Dims, Sharing, WidthMethod
from billhook.sparsity.structure import proportional
from billhook.surgery import rotate
from billhook.surgery.slim import dims_of

log = logging.getLogger("billhook")


@register("slicegpt")
class SliceGPT(WidthMethod):
    title = "SliceGPT"
    paper = Paper(
        "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        "S. Ashkboos, M. L. Croci, M. Gennari do Nascimento, T. Hoefler, J. Hensman",
        "ICLR 2024",
        "2401.15024",
    )
    summary = (
        "Rotates the residual stream at every place onto the principal axes of its calibration signal and keeps the "
        "first of them; each residual connection becomes a small matrix."
    )
    when = (
        "When the hidden width should shrink. Residual matrices, and an untied head, cost parameters: on a small model "
        "with tied embeddings the result can be larger than the original, and the run says so before it starts."
    )

    sparsity: float = Field(0.25, ge=0, lt=1, description="Fraction of the hidden width removed (not of parameters).")
    round: int = Field(8, ge=1, description="Widths are multiples of this, rounded down.")
    sharing: Sharing = Field("uniform", description="Same width everywhere, or by influence or redundancy of blocks.")
    signal: Literal["raw", "normed"] = Field("raw", description="What is analysed: the stream itself, or normalised.")

    @property
    def finishes_outside(self) -> bool:
        return True

    def prune(self, walk: Walk) -> None:
        anatomy, slim = walk.anatomy, walk.spec
        hidden = slim["hidden"]
        widths = self.widths(walk)
        # what LayerNorms subtract is taken out of the stream at its source, before anything is turned
        centre = torch.eye(hidden, dtype=torch.float64, device=walk.device)
        if anatomy.norm == "layer":
            centre -= 1.0 / hidden
        basis = self.basis(self.centred(walk.entering(self.statistic(walk)), centre), widths[0])
        walk.entry = first = centre @ basis
        walk.carry = {"basis": basis}
        like = torch.empty(0, dtype=walk.dtype, device=walk.device)

        for block in walk:
            module: Any = block.module
            before = walk.carry["basis"]
            after = widths[block.index + 1]
            last = block.index + 1 == len(walk.blocks)
            rotate.fuse_norms_(module, slim, anatomy)
            for place in ("attention", "mlp") if module.layout == "parallel" else ("attention",):
                for reader in rotate.readers(module, place):
                    rotate.rotate_input_(reader, before)
            self._reach(module, before, like)
            if module.layout == "parallel":
                out = self._turn(block.leaving(self.statistic(walk)), after, last, hidden)
                for writer in rotate.writers(module):
                    rotate.rotate_output_(writer, out)
                module.attention_adapter = rotate.adapter(before.T @ out, like)
                module.stream = (before.shape[1], out.shape[1], out.shape[1])
            else:
                output = self.site(block, "self_attn.o_proj")
                hold = [] if output is None else [output]
                middle = self.basis(block.between(self.statistic(walk), hold=hold), widths[block.index])
                if output is not None:
                    block.proceed_from(output, module.self_attn)
                if module.self_attn is not None:
                    rotate.rotate_output_(module.self_attn.o_proj, middle)
                for reader in rotate.readers(module, "mlp"):
                    rotate.rotate_input_(reader, middle)
                module.attention_adapter = rotate.adapter(before.T @ middle, like)
                module.mlp_adapter = rotate.adapter(middle.T, like)
                module.stream = (before.shape[1], middle.shape[1], hidden)
                out = self._turn(block.leaving(self.statistic(walk)), after, last, hidden)
                if module.mlp is not None:
                    rotate.rotate_output_(module.mlp.down_proj, out)
                module.mlp_adapter = rotate.adapter(middle.T @ out, like)
                module.stream = (before.shape[1], middle.shape[1], out.shape[1])
            block.turn(out)
            walk.carry = {"basis": out}

        with walk.outside([*anatomy.embeddings, str(anatomy.final_norm), str(anatomy.head)]):
            walk.edited(rotate.rotate_ends_(walk.model, anatomy, first, walk.carry["basis"]))

    def basis(self, signal: Tensor, width: int) -> Tensor:
        """The axes of the `width` largest eigenvalues of the signal's covariance, [hidden, width], float64."""
        axes: Tensor = torch.linalg.eigh(signal).eigenvectors.flip(1)
        return axes[:, :width].contiguous()

    def widths(self, walk: Walk) -> list[int]:
        """The stream's width before each block, and after the last, which stays whole."""
        return self._widths(walk, self.ratios(walk))

    def _widths(self, walk: Walk, ratios: Sequence[float]) -> list[int]:
        hidden, count = int(walk.spec["hidden"]), len(walk.blocks)
        cut = [self._width(hidden, ratio) for ratio in ratios]
        if walk.anatomy.same_ends:
            cut[0] = hidden
        return [*cut[:count], hidden]

    def _width(self, hidden: int, ratio: float) -> int:
        """The multiple of `round` at or below what stays."""
        return max(self.round, int((1 - ratio) * hidden + 1e-9) // self.round * self.round) if ratio > 0 else hidden

    def check(self, walk: Walk) -> None:
        if any(layer["fused"] for layer in walk.spec["layers"]):
            raise BillhookError("The residual stream of this model was rotated already: slice the original model.")
        rotate.check_rotatable(walk.model, walk.anatomy)
        hidden = int(walk.spec["hidden"])
        if self.round > hidden:
            raise BillhookError(f"round={self.round} is more than the hidden width {hidden}.")
        ratio = self.overall(walk)
        planned = self.planned(walk, self._widths(walk, [ratio] * len(walk.blocks)))
        present = sum(p.numel() for p in walk.model.parameters())
        if planned > present:
            log.warning(
                "Removing %.0f%% of the hidden width makes this model larger, from %s to %s parameters: residual "
                "matrices and an untied head cost more than the blocks save; use a larger ratio, or a method such as "
                "fasp.",
                100 * ratio,
                f"{present:,}",
                f"{planned:,}",
            )

    def overall(self, walk: Walk, shares: Callable[[float], Sequence[float]] | None = None) -> float:
        """The fraction of the hidden width to remove."""
        return self._ratio_for_size(walk, shares) if self.target_size is not None else super().overall(walk, shares)

    def shapes(self, walk: Walk, ratios: Sequence[float]) -> list[Dims | None]:
        widths = self._widths(walk, ratios)
        result: list[Dims | None] = []
        for block, before, after in zip(walk.blocks, widths, widths[1:], strict=False):
            parallel = walk.spec["layout"] == "parallel"
            dims = dims_of(block) | {"stream": [before, after if parallel else before, after], "fused": True}
            result.append(dims | {"adapters": [True, not parallel]})
        return result

    def planned(self, walk: Walk, widths: Sequence[int]) -> int:
        """Parameters of the model after slicing to these widths: before each block, and after the last."""
        offsets, total = walk.anatomy.norm == "layer", 0
        for block, before, after in zip(walk.blocks, widths, widths[1:], strict=False):
            module: Any = block
            parallel = module.layout == "parallel"
            middle = after if parallel else before
            for place, wide in (("attention", before), ("mlp", before if parallel else middle)):
                for linear in rotate.readers(module, place):
                    total += linear.out_features * (wide + int(offsets or linear.bias is not None))
            for owner, name, wide in ((module.self_attn, "o_proj", middle), (module.mlp, "down_proj", after)):
                if owner is not None:
                    linear = getattr(owner, name)
                    total += wide * (linear.in_features + int(linear.bias is not None))
            total += before * after if parallel else before * middle + middle * after
            total += sum(p.numel() for n, p in module.named_parameters() if "q_norm" in n or "k_norm" in n)
        for path in walk.anatomy.embeddings:
            table: Any = walk.model.get_submodule(path)
            total += table.num_embeddings * widths[0]
        head: Any = walk.model.get_submodule(str(walk.anatomy.head))
        return int(total + head.out_features * (widths[-1] + int(offsets or head.bias is not None)))

    def _ratio_for_size(self, walk: Walk, shares: Callable[[float], Sequence[float]] | None) -> float:
        """The smallest ratio, by width, whose model is within the target size."""
        assert self.target_size is not None
        goal = self.target_size * sum(p.numel() for p in walk.model.parameters())
        count, hidden = len(walk.blocks), int(walk.spec["hidden"])

        def size(ratio: float) -> int:
            return self.planned(walk, self._widths(walk, shares(ratio) if shares is not None else [ratio] * count))

        if shares is None or self.sharing == "uniform":
            candidates = [1 - width / hidden for width in range(hidden // self.round * self.round, 0, -self.round)]
            found = next((ratio for ratio in candidates if size(ratio) <= goal), None)
        else:
            low, high = 0.0, 1.0  # sizes fall with the mean, in steps
            for _ in range(30):
                mean = (low + high) / 2
                low, high = (low, mean) if size(mean) <= goal else (mean, high)
            found = high if high < 1 else None
        if found is None:
            raise BillhookError(
                f"A target size of {self.target_size:g} cannot be reached by slicing: even the smallest width leaves "
                "more, since the head keeps the whole hidden width."
            )
        return found

    def shares(self, walk: Walk, mean: float) -> list[float]:
        if self.sharing == "uniform" or mean == 0:
            return [mean] * len(walk.blocks)
        return self.shared(block_influence(walk), mean)

    def shared(self, influence: list[float], mean: float) -> list[float]:
        """A ratio per block from how much each changes its input."""
        return proportional([1 - s for s in influence], mean, base=mean * 2 / 3)

    def _turn(self, signal: Tensor, width: int, last: bool, hidden: int) -> Tensor:
        if last:  # the head reads the stream whole, so its basis is free: the original one
            return torch.eye(hidden, dtype=torch.float64, device=signal.device)
        return self.basis(signal, width)

    def _reach(self, module: Any, before: Tensor, like: Tensor) -> None:
        """While its outputs are not turned, the block leads from the sliced stream to the original basis."""
        hidden = len(before)
        module.attention_adapter = rotate.adapter(before.T, like)
        module.mlp_adapter = None
        module.stream = (before.shape[1], hidden, hidden)

    def centred(self, signal: Tensor, centre: Tensor) -> Tensor:
        """The signal of a stream that is multiplied by `centre`, which is symmetric."""
        return centre @ signal @ centre

    def statistic(self, walk: Walk) -> type[Statistic[Tensor]]:
        """What is gathered of the stream at each place: the signal that `basis` reads."""
        if self.signal == "raw":
            return Covariance
        return _normed(walk.spec["hidden"], centred=walk.anatomy.norm == "layer")


def _normed(hidden: int, centred: bool) -> type[Covariance]:
    class Normed(Covariance):
        """Of the stream as the norms pass it on: every token weighs the same."""

        def update(self, x: Tensor) -> None:
            wide = x.double()
            if centred:
                wide = wide - wide.mean(-1, keepdim=True)
            super().update(wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / hidden + 1e-12))

    return Normed


@register("dynamic-slicing")
class DynamicSlicing(SliceGPT):
    title = "Dynamic Slicing"
    paper = Paper(
        "Change Is the Only Constant: Dynamic LLM Slicing based on Layer Redundancy",
        "R.-G. Dumitru, P.-I. Clotan, V. Yadav, D. Peteleaza, M. Surdeanu",
        "Findings of EMNLP 2024",
        "2411.03513",
    )
    summary = "SliceGPT with more cut from blocks that change their input little, and the mean ratio kept."
    when = "As SliceGPT; the widths differ from block to block. Compare at equal numbers of parameters."

    sharing: Sharing = Field("redundancy", description="Same width everywhere, by influence, or by redundancy.")
    base: float | None = Field(None, ge=0, lt=1, description="What every block loses; 2/3 of the ratio if unset.")
    cap: float = Field(0.9, gt=0, lt=1, description="Largest ratio of a block.")

    def shared(self, influence: list[float], mean: float) -> list[float]:
        base = mean * 2 / 3 if self.base is None else min(self.base, mean)
        return proportional([1 - s for s in influence], mean, base=base, cap=self.cap)

    def check(self, walk: Walk) -> None:
        if self.target_size is None and self.target_flops is None:
            self._refuse_base_above(self.sparsity)
        super().check(walk)

    def ratios(self, walk: Walk) -> list[float]:
        result = super().ratios(walk)
        self._refuse_base_above(sum(result) / len(result))
        return result

    def _refuse_base_above(self, mean: float) -> None:
        if self.base is not None and self.base > mean + 1e-9:
            raise BillhookError(f"base={self.base:g} is more than the mean ratio {mean:.4g}: give at most that.")
