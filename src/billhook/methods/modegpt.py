"""MoDeGPT: shrink the inner widths of a block, each with the matrices on both sides of it, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from billhook.calibrate.ahead import with_dense
from billhook.calibrate.gram import Gram
from billhook.calibrate.influence import block_influence
from billhook.calibrate.statistics import TokenSum, Total
from billhook.calibrate.walk import Block, Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.structured import Dims, Sharing, WidthMethod
from billhook.sparsity.lowrank import balanced, fewer_channels
from billhook.sparsity.refit import refit
from billhook.sparsity.structure import entropic, output_energy, ridge_leverage, rounded, strongest
from billhook.surgery.shrink import (
    fold_value_bias_,
    keep_channels_,
    keep_neurons_,
    keep_pairs_,
    keep_values_,
    owners,
    rotary_pairs,
)
from billhook.surgery.slim import dims_of

MODULES = ("mlp", "qk", "vo")
_ATTENTION, _MLP = "self_attn.q_proj", "mlp.down_proj"  # the sites whose inputs are looked at
_TOKENS = 8  # per neuron, from which a refit is trusted


@dataclass(frozen=True)
class Seen:
    """What was seen of a site's input: H = Σ x xᵀ float32 [in, in], and Σ x with the number of tokens."""

    gram: Tensor
    total: Total


@dataclass(frozen=True)
class _Part:
    """An inner width of a block: how many units it has, parameters per unit, and what it is to be a multiple of."""

    name: str
    size: int
    cost: int
    multiple: int


@register("modegpt")
class MoDeGPT(WidthMethod):
    title = "MoDeGPT"
    paper: ClassVar[Paper | None] = Paper(
        "MoDeGPT: Modular Decomposition for Large Language Model Compression",
        "C.-H. Lin, S. Gao, J. S. Smith, A. Patel, S. Tuli, Y. Shen, H. Jin, Y.-C. Hsu",
        "ICLR 2025",
        "2408.09632",
    )
    summary = (
        "Narrows the MLP (ridge leverage scores and a least-squares refit), queries and keys (rotary pairs of least "
        "energy) and values (a truncated SVD of value times output, weighted by the data), more in blocks of little "
        "influence."
    )
    when = (
        "Where no gradients can be had and attention is to become cheaper too: queries and keys shrink, which FASP "
        "leaves whole. Models that normalise queries and keys keep those whole here as well. The result has widths "
        "that differ per layer, so it brings its own modelling file."
    )

    sharing: Sharing = Field(
        "influence", description="How the ratio is shared out over blocks: uniform, influence, redundancy."
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        description="Entropy of sharing=influence: large is uniform. None: the largest ratio is 2 x the mean.",
    )
    cap: float = Field(0.85, gt=0, lt=1, description="With sharing=influence no block loses more of what may leave it.")
    modules: str = Field("mlp+qk+vo", description="What is narrowed: some of mlp, qk, vo, joined by + or commas.")
    ridge: float = Field(
        1e-2, gt=0, description="Of the leverage scores, in units of the mean diagonal of the Gram matrix."
    )
    damping: float = Field(
        1e-6,
        ge=0,
        description="Of the refit, in units of the Gram matrix's mean diagonal, and of the values' moment, in units of "
        "its largest eigenvalue.",
    )
    gqa_vo: Literal["joint", "value"] = Field(
        "joint",
        description="Where several query heads read a value head: the best for all their outputs, or for the values.",
    )
    statistics: Literal["dense", "sequential"] = Field(
        "dense", description="Inputs of a block as in the dense model (the paper's), or after its pruned predecessors."
    )

    @field_validator("modules")
    @classmethod
    def _known_modules(cls, given: str) -> str:
        asked = {part.strip() for part in given.replace("+", ",").split(",")}
        if not asked <= set(MODULES):
            raise ValueError(f"modules are some of {', '.join(MODULES)}")
        return "+".join(name for name in MODULES if name in asked)  # no comma: options are separated by them

    def prune(self, walk: Walk) -> None:
        ratios = self.ratios(walk)
        walk.companions = [TokenSum]
        if "qk" in self.modules and any(_normalised(block) for block in walk.blocks):
            walk.notes.append(
                "Queries and keys are normalised over the head's width, so they stay whole; MLP and values lose more."
            )
        for block, seen in self._looked_at(walk):
            width = self.widths(block.module, ratios[block.index])
            if "qk" in width or "vo" in width:
                inputs = seen(_ATTENTION)
                if "qk" in width:
                    self._narrow_queries(block, inputs, width["qk"])
                if "vo" in width:
                    self._narrow_values(block, inputs.gram, width["vo"])
            if "mlp" in width:
                inputs = seen(_MLP)
                note = _too_few(inputs)
                if note and note not in walk.notes:
                    walk.notes.append(note)
                self._narrow_mlp(block, inputs.gram, width["mlp"])

    # -- the three modules ---------------------------------------------------------------------------------

    def _narrow_mlp(self, block: Block, gram: Tensor, count: int) -> None:
        """Type I, Nyström: keep the neurons of the largest ridge leverage, refit down on them."""
        down = _slim(block).mlp.down_proj
        keep = strongest(ridge_leverage(gram, self.ridge), count)
        new = refit(down.weight, gram, keep, self.damping)
        keep_neurons_(block.module, keep)
        _write(down, new)

    def _narrow_queries(self, block: Block, inputs: Seen, count: int) -> None:
        """Type II, CR: keep the rotary pairs (channels, without rotary embedding) of the largest energy.

        The score of a pair, per key/value head, is √(Σ q² · Σ k²) over its two channels, all query heads of the group
        and all tokens: a rotation changes neither sum, and it bounds what the pair adds to the logits.
        """
        attention = _slim(block).self_attn
        query, key = (
            output_energy(linear.weight, linear.bias, inputs.gram, inputs.total).view(-1, attention.qk)
            for linear in (attention.q_proj, attention.k_proj)
        )
        owner = torch.tensor(owners(attention), device=query.device)
        query = torch.zeros_like(key).index_add_(0, owner, query)
        half = rotary_pairs(attention)
        if half:
            query, key = (e[:, :half] + e[:, half : 2 * half] for e in (query, key))
        keep = strongest((query * key).sqrt(), count).cpu()
        (keep_pairs_ if half else keep_channels_)(block.module, keep)

    def _narrow_values(self, block: Block, gram: Tensor, count: int) -> None:
        """Type III, SVD: the best `count` channels between value and output, for each key/value head.

        With A = W_V C_X W_Vᵀ, the moment of the head's values, this needs nothing wider than a head.
        """
        attention = _slim(block).self_attn
        fold_value_bias_(attention)
        gram, width = gram.double(), attention.v
        owner = torch.tensor(owners(attention))
        values = attention.v_proj.weight.data.double().view(attention.kv_heads, width, -1)
        outputs = attention.o_proj.weight.data.double().view(-1, attention.heads, width)
        writers: list[Tensor] = []
        readers = outputs.new_zeros(outputs.shape[0], attention.heads, count)
        for t, value in enumerate(values):
            group = (owner == t).nonzero().flatten().to(outputs.device)
            stacked = outputs[:, group].reshape(-1, width)  # [out·g, width]: the group's heads read the same values
            best_for = None if self.gqa_vo == "value" and len(group) > 1 else stacked
            encode, decode = fewer_channels(value @ gram @ value.T, best_for, count, self.damping)
            writer, reader = balanced(encode @ value, stacked @ decode)
            writers.append(writer)
            readers[:, group] = reader.view(-1, len(group), count)
        keep_values_(block.module, torch.arange(count).expand(attention.kv_heads, -1))
        _write(attention.v_proj, torch.cat(writers))
        _write(attention.o_proj, readers.flatten(1))

    # -- the budget ----------------------------------------------------------------------------------------

    def shares(self, walk: Walk, mean: float) -> list[float]:
        if self.sharing != "influence" or mean == 0:
            return super().shares(walk, mean)
        return entropic(block_influence(walk), mean, self.epsilon, self._most(walk))

    def check(self, walk: Walk) -> None:
        mean = self.overall(walk)
        for block in walk.blocks:
            self.widths(block, mean)
        if self.sharing == "influence" and mean > self._most(walk):
            raise BillhookError(
                f"{mean:.0%} of the blocks is more than the {self._most(walk):.0%} that one block may lose at most: "
                "lower the sparsity, raise cap, or narrow more modules."
            )

    def most(self, walk: Walk) -> float:
        return 0.95 * self._most(walk) / self.cap  # something of each has to stay

    def _most(self, walk: Walk) -> float:
        """φ_max: `cap` counts within what may leave a block, which is less than all of it."""
        return self.cap * min(
            sum(part.size * part.cost for part in self._parts(block)) / _parameters(block) for block in walk.blocks
        )

    def widths(self, block: Any, ratio: float) -> dict[str, int]:
        """How much of each inner width stays to remove `ratio` of the block; one ratio for all, up to rounding.

        What a width's rounding leaves over goes to the next one; the last is the MLP, whose units are smallest.

        Returns:
            "mlp": neurons, "qk": rotary pairs (channels, without rotary embedding) and "vo": value channels per head;
            only those that shrink.

        Raises:
            BillhookError: what may be removed is less than what is asked.
        """
        parts, total = self._parts(block), _parameters(block)
        budget, left = ratio * total, float(sum(part.size * part.cost for part in parts))
        result: dict[str, int] = {}
        if budget and budget >= left:
            raise BillhookError(
                f"{ratio:.0%} of a block cannot be removed when only {left / total:.0%} of it may be: lower the "
                "sparsity, or narrow more modules."
            )
        for part in parts:
            stays = rounded(part.size * (1 - budget / left), part.multiple, part.size)
            if stays < part.size:
                result[part.name] = stays
            budget -= (part.size - stays) * part.cost
            left -= part.size * part.cost
        return result

    def shapes(self, walk: Walk, ratios: Sequence[float]) -> list[Dims | None]:
        result: list[Dims | None] = []
        for block, ratio in zip(walk.blocks, ratios, strict=True):
            width, dims, module = self.widths(block, ratio), dims_of(block), cast(Any, block)
            if "qk" in width:
                pairs = rotary_pairs(module.self_attn)
                dims["attention"]["qk"] = (
                    dims["attention"]["qk"] - 2 * pairs + 2 * width["qk"] if pairs else width["qk"]
                )
            if "vo" in width:
                dims["attention"]["v"] = width["vo"]
            if "mlp" in width:
                dims["mlp"]["width"] = width["mlp"]
            result.append(dims)
        return result

    def _parts(self, block: Any) -> list[_Part]:
        attention, mlp = block.self_attn, block.mlp
        parts: list[_Part] = []
        small = min(self.round, 8)  # heads are narrow
        if "qk" in self.modules and attention is not None and not hasattr(attention, "q_norm"):
            cost = sum(_per_row(linear) for linear in (attention.q_proj, attention.k_proj)) // attention.qk
            pairs = rotary_pairs(attention)
            if pairs:  # channels of a head that do not rotate stay
                parts.append(_Part("qk", pairs, 2 * cost, math.lcm(small, 2) // 2))
            else:
                parts.append(_Part("qk", attention.qk, cost, small))
        if "vo" in self.modules and attention is not None:
            cost = _per_row(attention.v_proj) + attention.o_proj.weight.numel()
            parts.append(_Part("vo", attention.v, cost // attention.v, small))
        if "mlp" in self.modules and mlp is not None:
            size = mlp.down_proj.in_features
            cost = sum(p.numel() for name, p in mlp.named_parameters() if name != "down_proj.bias")
            parts.append(_Part("mlp", size, cost // size, self.round))
        return parts

    # -- whose inputs --------------------------------------------------------------------------------------

    def _looked_at(self, walk: Walk) -> Iterator[tuple[Block, Callable[[str], Seen]]]:
        """The blocks, each with what was seen of the input of one of its sites."""
        wanted = [_ATTENTION] * ("qk" in self.modules or "vo" in self.modules) + [_MLP] * ("mlp" in self.modules)
        if self.statistics == "dense":
            for block, seen in with_dense(walk, lambda dense: self._gather(dense, wanted)):
                yield block, seen.__getitem__
        else:
            for block in walk:
                yield block, lambda name, block=block: self._gather(block, [name])[name]  # type: ignore[misc]

    def _gather(self, block: Block, names: Sequence[str]) -> dict[str, Seen]:
        sites = {name: site for name in names if (site := self.site(block, name)) is not None}
        grams = block.collect(Gram, list(sites.values())) if sites else {}
        return {n: Seen(grams[site].matrix, block.gathered(TokenSum, site)) for n, site in sites.items()}


def _too_few(inputs: Seen) -> str | None:
    """What to say where a refit on so few tokens follows their noise."""
    tokens, width = inputs.total.tokens, len(inputs.gram)
    if tokens >= _TOKENS * width:
        return None
    return (
        f"{tokens:.0f} calibration tokens are fewer than {_TOKENS} for each of {width} neurons: give more, or raise "
        "ridge and damping."
    )


def _slim(block: Block) -> Any:
    return block.module


def _write(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight.data.copy_(weight)


def _normalised(block: Any) -> bool:
    return block.self_attn is not None and hasattr(block.self_attn, "q_norm")


def _parameters(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def _per_row(linear: nn.Linear) -> int:
    return linear.weight.numel() + (0 if linear.bias is None else linear.bias.numel())
