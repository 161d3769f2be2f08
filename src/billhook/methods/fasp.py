"""FASP: remove inner channels of pairs of consecutive matrices, and refit the second on what stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from billhook.anatomy import Site
from billhook.calibrate.gram import Gram
from billhook.calibrate.walk import Block, Needs, Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.structured import Dims, WidthMethod, random_scores
from billhook.sparsity.refit import refit
from billhook.sparsity.structure import column_scores, rounded, strongest
from billhook.surgery.shrink import fold_value_bias_, keep_kv_heads_, keep_neurons_, keep_values_, owners, value_slices
from billhook.surgery.slim import dims_of, heads_may_leave


@register("fasp")
class FASP(WidthMethod):
    title = "FASP"
    paper: ClassVar[Paper | None] = Paper(
        "FASP: Fast and Accurate Structured Pruning of Large Language Models",
        "H. Hu, P. Zhao, P. Li, Y. Zheng, Z. Wang, X. Yuan",
        "2025",
        "2501.09412",
    )
    summary = (
        "Removes the neurons and value channels whose column in the matrix that reads them has the smallest summed "
        "Wanda score, and refits that matrix by least squares; queries and keys stay."
    )
    when = (
        "The first choice for making a model smaller and faster: minutes, no gradients, no adapters. "
        "uniform=true gives a stock configuration that every runtime loads."
    )

    score: Literal["wanda", "magnitude", "random"] = Field("wanda", description="What ranks channels.")
    restore: bool = Field(True, description="Refit the second matrix of each pair on the channels that stay.")
    norm: Literal["l1", "l2"] = Field("l1", description="Norm over a column.")
    damping: float = Field(1e-3, ge=0, description="Of the refit, in units of the mean diagonal of the Gram matrix.")
    attention: Literal["values", "groups", "skip"] = Field(
        "values", description="Remove value channels, as many per head; whole KV groups with their queries; or nothing."
    )
    uniform: bool = Field(
        False,
        description="Same widths in every layer, such as a stock configuration has: neurons, and KV groups if asked.",
    )

    draw: int = Field(0, ge=0, description="Seed of score=random.")

    @model_validator(mode="after")
    def _same_everywhere(self) -> FASP:
        if self.uniform and self.sharing != "uniform":
            raise ValueError("uniform=true wants the same widths in every layer: leave sharing at uniform")
        return self

    @property
    def requires(self) -> Needs:
        return "calibration" if self._needs_data or self.sharing != "uniform" else "nothing"

    def prune(self, walk: Walk) -> None:
        mode = self._mode(walk)
        widths = [self._widths(b, r, mode) for b, r in zip(walk.blocks, self.ratios(walk), strict=True)]
        for block in walk:
            width, module = widths[block.index], _slim(block)
            attention, mlp = module.self_attn, module.mlp
            values, output = width.get("values"), self.site(block, "self_attn.o_proj")
            groups, down = width.get("groups"), self.site(block, "mlp.down_proj")
            whole: list[Site] = []
            if output is not None and values and values < attention.v:
                fold_value_bias_(attention)  # before the inputs are looked at: what it moves away is in them
                columns = self._cut_values(block, self._gram(block, output), values)
                block.proceed_from(output, attention, columns)
            elif output is not None and groups and groups < attention.kv_heads:
                columns = self._cut_groups(block, self._gram(block, output), groups)
                block.proceed_from(output, attention, columns)
            elif output is not None:
                whole.append(output)
            if down is not None and width["neurons"] < mlp.down_proj.in_features:
                columns = self._cut_neurons(block, self._gram(block, down, whole), width["neurons"])
                block.proceed_from(down, mlp, columns)
                for site in whole:
                    block.proceed_from(site, attention)

    def _gram(self, block: Block, site: Site, beside: Sequence[Site] = ()) -> Tensor | None:
        return block.collect(Gram, [site], hold=[site, *beside])[site].matrix if self._needs_data else None

    @property
    def _needs_data(self) -> bool:
        return self.restore or self.score == "wanda"

    def check(self, walk: Walk) -> None:
        ratio, mode = self.overall(walk), self._mode(walk)
        for block in walk.blocks:
            self._widths(block, ratio, mode)

    def _mode(self, walk: Walk) -> str:
        """What leaves of the attention. Where it has to be uniform, only what a stock configuration can say."""
        if not self.uniform:
            return self.attention
        # no stock class has fewer value channels; on the demo model leaving them whole costs less than whole groups
        return "groups" if self.attention == "groups" and heads_may_leave(walk.model) else "skip"

    def _widths(self, block: Any, ratio: float, mode: str) -> dict[str, int]:
        """How many value channels per head or KV groups, and how many neurons stay, to remove `ratio` of the block.

        Raises:
            BillhookError: what may be removed is less than what is asked.
        """
        attention, mlp = block.self_attn, block.mlp
        result: dict[str, int] = {}
        if attention is None:
            mode = "skip"
            if mlp is None:
                return result
        total, pair, neuron = _removable(block, mode)
        budget = ratio * total
        share = budget / max(neuron + pair, 1)  # s' = s·P_block / P_prunable: what stays whole counts too
        if share >= 1:
            raise BillhookError(
                f"{ratio:.0%} of a block cannot be removed when only {(neuron + pair) / total:.0%} of it may be: lower "
                "the sparsity, or let the method remove more kinds of parts."
            )
        if mode == "values":
            step = min(self.round, 8)
            result["values"] = rounded(attention.v * (1 - share), step, attention.v)
            while pair * (1 - result["values"] / attention.v) > budget:  # rounded down by more than neurons make up
                result["values"] = min(result["values"] + step, attention.v)
            budget -= pair * (1 - result["values"] / attention.v)
        elif mode == "groups":
            result["groups"] = max(1, round(attention.kv_heads * (1 - share)))
            while pair * (1 - result["groups"] / attention.kv_heads) > budget:
                result["groups"] += 1
            budget -= pair * (1 - result["groups"] / attention.kv_heads)
        if mlp is not None:
            size = mlp.down_proj.in_features
            left = size * (1 - budget / neuron)
            if left < 0.5:
                raise BillhookError(f"{ratio:.0%} of a block would leave no neurons: lower the sparsity.")
            result["neurons"] = rounded(left, self.round, size)
        return result

    def shapes(self, walk: Walk, ratios: Sequence[float]) -> list[Dims | None]:
        mode = self._mode(walk)
        result: list[Dims | None] = []
        for block, ratio in zip(walk.blocks, ratios, strict=True):
            width, dims = self._widths(block, ratio, mode), dims_of(block)
            attention, mlp = dims["attention"], dims["mlp"]
            if "values" in width:
                attention["v"] = width["values"]
            if "groups" in width:
                if attention["kv_of_head"]:
                    raise BillhookError(
                        "KV groups of different sizes leave no known number of FLOPs: give target_size."
                    )
                attention["heads"] = attention["heads"] // attention["kv_heads"] * width["groups"]
                attention["kv_heads"] = width["groups"]
            if "neurons" in width:
                mlp["width"] = width["neurons"]
            result.append(dims)
        return result

    def most(self, walk: Walk) -> float:
        mode = self._mode(walk)
        shares = []
        for block in walk.blocks:
            total, pair, neuron = _removable(block, mode)
            if pair + neuron:
                shares.append((pair + neuron) / total)
        return 0.95 * min(shares, default=1.0)  # something of each has to stay

    def _scores(self, block: Block, weight: Tensor, gram: Tensor | None) -> Tensor:
        if self.score == "random":
            return random_scores(block, weight.shape[1], self.draw).to(weight.device)
        energy = gram.diagonal() if gram is not None and self.score == "wanda" else None
        return column_scores(weight, energy, self.norm)

    def _cut_neurons(self, block: Block, gram: Tensor | None, count: int) -> Tensor:
        """Returns which columns of the last matrix stay, as the other cuts do."""
        down = _slim(block).mlp.down_proj
        keep = strongest(self._scores(block, down.weight, gram), count)
        new = refit(down.weight, gram, keep, self.damping) if gram is not None and self.restore else None
        keep_neurons_(block.module, keep)
        _write(down, new)
        return keep

    def _cut_values(self, block: Block, gram: Tensor | None, count: int) -> Tensor:
        attention = _slim(block).self_attn
        scores = self._scores(block, attention.o_proj.weight, gram).view(attention.heads, attention.v)
        owner = torch.tensor(owners(attention), device=scores.device)
        grouped = scores.new_zeros(attention.kv_heads, attention.v).index_add_(0, owner, scores)
        keep = strongest(grouped, count)
        columns = value_slices(attention, keep.cpu())[1]
        weight = attention.o_proj.weight
        new = refit(weight, gram, columns, self.damping) if gram is not None and self.restore else None
        keep_values_(block.module, keep.cpu())
        _write(attention.o_proj, new)
        return columns

    def _cut_groups(self, block: Block, gram: Tensor | None, count: int) -> Tensor:
        attention = _slim(block).self_attn
        scores = self._scores(block, attention.o_proj.weight, gram).view(attention.heads, attention.v).sum(1)
        owner = torch.tensor(owners(attention), device=scores.device)
        keep = strongest(scores.new_zeros(attention.kv_heads).index_add_(0, owner, scores), count).cpu()
        heads = torch.tensor([h for h, t in enumerate(owners(attention)) if t in set(keep.tolist())])
        columns: Tensor = (heads[:, None] * attention.v + torch.arange(attention.v)).flatten()
        weight = attention.o_proj.weight
        new = refit(weight, gram, columns, self.damping) if gram is not None and self.restore else None
        keep_kv_heads_(block.module, keep)
        _write(attention.o_proj, new)
        return columns


def _removable(block: Any, mode: str) -> tuple[int, int, int]:
    """Parameters of a block, and how many of them are in the parts of attention and in the neurons that may go."""
    attention, mlp = block.self_attn, block.mlp
    pair = neuron = 0
    if mlp is not None:
        neuron = sum(p.numel() for n, p in mlp.named_parameters() if n != "down_proj.bias")
    if attention is not None and mode == "values":
        pair = attention.v_proj.weight.numel() + attention.o_proj.weight.numel()
    elif attention is not None and mode == "groups":
        pair = sum(p.numel() for n, p in attention.named_parameters() if n != "o_proj.bias" and "norm" not in n)
    return sum(p.numel() for p in block.parameters()), pair, neuron


def _slim(block: Block) -> Any:
    return block.module


def _write(linear: nn.Linear, weight: Tensor | None) -> None:
    if weight is not None:
        linear.weight.data.copy_(weight.to(linear.weight.dtype))


@register("magnitude-widths")
class MagnitudeWidths(FASP):
    title = "Magnitude, whole channels"
    paper = None
    summary = "Removes the neurons and value channels with the smallest columns; updates nothing."
    when = "A baseline that needs no data."
    score: Literal["wanda", "magnitude", "random"] = Field("magnitude", description="What ranks channels.")
    restore: bool = Field(False, description="Refit the second matrix of each pair on the channels that stay.")


@register("wanda-widths")
class WandaWidths(FASP):
    title = "Wanda, whole channels"
    paper = None
    summary = "Removes the neurons and value channels with the smallest summed Wanda score; updates nothing."
    when = "A baseline: FASP without its refit."
    restore: bool = Field(False, description="Refit the second matrix of each pair on the channels that stay.")


@register("random-widths")
class RandomWidths(MagnitudeWidths):
    title = "Random channels"
    summary = "Removes random neurons and value channels; updates nothing."
    when = "The control that every structured method has to beat."
    score: Literal["wanda", "magnitude", "random"] = Field("random", description="What ranks channels.")
