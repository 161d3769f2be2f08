"""Low-rank adapters on a pruned linear layer, and their merge without filling its zeros.

With W [out, in] the pruned weight, M its mask, B [out, r], A [r, in] and s = alpha / r, a layer computes with

    mask_lora         W + s · M ∘ (B A)      merges exactly
    lora_prune        W + s · B A            merges as W + s · M ∘ (B A): what was trained outside M is lost
    lora              W + s · B A            merges only where no weight is masked
    scale_lora        W ∘ (B A)              merges exactly
    scale_lora_full   W ∘ (1 1ᵀ + B A)       merges exactly

Source: Zimmer, Andoni, Spiegel, Pokutta, "PERP" (arXiv:2312.15230), except `scale_lora_full`. All entries of
scale_lora start at 1/√r, so the columns of B (and the rows of A) are equal, get equal gradients and stay equal
under any optimizer that works entry by entry: B A has rank 1 for ever. `scale_lora_full` starts from the same
function with B = 0 and a random A, and reaches rank r + 1.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError, nearest
from billhook.system import finite

Kind = Literal["mask_lora", "scale_lora", "scale_lora_full", "lora", "lora_prune"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class LowRank(nn.Module):
    """The parametrisation of a weight by a frozen W and two trained factors.

    Attributes:
        a: A [r, in], float32.
        b: B [out, r], float32.
        keep: bool [out, in], True where a weight was kept; None where nothing says so.
        transposed: whether the layer stores its weight as [in, out] (Transformers' Conv1D).
    """

    keep: Tensor | None

    def __init__(self, kind: Kind, a: Tensor, b: Tensor, keep: Tensor | None, alpha: float, transposed: bool) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.register_buffer("keep", keep, persistent=False)
        self.scaling = alpha / len(a)
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, in the layout and dtype of `weight`."""
        seen = weight.T if self.transposed else weight
        result = self.effective(seen).to(weight.dtype)
        return result.T if self.transposed else result

    def effective(self, weight: Tensor) -> Tensor:
        """The trained weight for a W [out, in], in float32 (float64 for a float64 W)."""
        # Autocast would round the product to 16 bits, and with it the small steps of a training.
        with torch.autocast(weight.device.type, enabled=False):
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if self.kind == "scale_lora":
                return wide * (self.b @ self.a)
            if self.kind == "scale_lora_full":
                return wide * (1.0 + self.b @ self.a)
            return self._added(wide, masked=self.kind == "mask_lora")

    def merged(self, weight: Tensor) -> Tensor:
        """The weight to keep after training for a W [out, in], in float32 (float64 for a float64 W)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.kind == "lora_prune":
            with torch.autocast(weight.device.type, enabled=False):
                return self._added(wide, masked=True)
        if self.kind == "scale_lora" and self._untrained():
            return wide  # r · (1/√r)² is 1 only up to rounding
        return self.effective(weight)

    def _added(self, wide: Tensor, masked: bool) -> Tensor:
        """W + s · M ∘ (B A), or without M, in as few passes over matrices of W's size as can be."""
        product = (self.scaling * self.b) @ self.a
        if masked and self.keep is not None:
            product = torch.where(self.keep, product, 0.0)
        return wide + product  # of the layout of W

    def _untrained(self) -> bool:
        start = _symmetric_start(len(self.a))
        return all(bool((factor == start).all()) for factor in (self.a, self.b))


class Adapter:
    """A handle on an attached adapter; made by `attach`.

    Attributes:
        module: the layer.
        factors: the `LowRank` that holds A and B.
    """

    def __init__(self, module: nn.Linear | Conv1D, factors: LowRank) -> None:
        self.module = module
        self.factors = factors
        self._weight: Tensor = module.weight
        self._trained_before = self._weight.requires_grad
        self._order = list(module._parameters)
        self._attached = True
        parametrize.register_parametrization(module, "weight", factors, unsafe=True)
        self._weight.requires_grad_(False)

    @property
    def kind(self) -> Kind:
        return self.factors.kind

    def parameters(self) -> list[nn.Parameter]:
        """[A, B], float32 [r, in] and [out, r]."""
        return [self.factors.a, self.factors.b]

    def effective(self) -> Tensor:
        """The weight [out, in] that the layer computes with now, before it is rounded to the storage dtype."""
        return self.factors.effective(self._seen())

    @torch.no_grad()
    def merge(self) -> None:
        """Write the trained weight into the layer and leave it as plain as it was.

        Computed in float32 (float64 for float64 weights), set to exactly +0 outside the mask, then cast to the
        storage dtype. Where no mask was given, the number of exact zeros must not fall instead.

        Raises:
            BillhookError: zeros would be filled, a value is not finite in the storage dtype, or the adapter is not
                attached any more. The adapter then stays as it is.
        """
        self._check_attached()
        seen, keep = self._seen(), self.factors.keep
        new = self.factors.merged(seen)
        filled = (
            int(torch.count_nonzero(new)) - int(torch.count_nonzero(seen))
            if keep is None
            else int(torch.count_nonzero(torch.where(keep, 0.0, new)))
        )
        if filled > 0:
            advice = "keep it apart, or train mask_lora instead"
            if keep is None:
                advice += ", or say with keep= what may be filled"
            elif self.kind != "lora":
                advice = "its weight was written outside the mask meanwhile, so mask it again"
            raise BillhookError(
                f"Merging this {self.kind} adapter would fill {filled} of the zeros of {_named(self.module)}: {advice}."
            )
        if keep is not None:
            new = torch.where(keep, new, 0.0)
        new = new.to(seen.dtype)
        if not finite(new):
            raise BillhookError(
                f"The merged weight of {_named(self.module)} has NaN or infinite values in {seen.dtype}: train with a "
                "lower learning rate, or use a wider --dtype."
            )
        seen.copy_(new)
        self._detach()

    def remove(self) -> None:
        """Drop the adapter; the layer is bit for bit what it was before `attach`.

        Raises:
            BillhookError: the adapter is not attached any more.
        """
        self._check_attached()
        self._detach()

    def _seen(self) -> Tensor:
        """W as [out, in], a view of the stored weight."""
        weight = self._weight.detach()
        return weight.T if self.factors.transposed else weight

    def _detach(self) -> None:
        parametrize.remove_parametrizations(self.module, "weight", leave_parametrized=False)
        self._weight.requires_grad_(self._trained_before)
        own = self.module._parameters
        for name in self._order:  # the weight came back last: optimizers number parameters by their order
            own[name] = own.pop(name)
        self._attached = False

    def _check_attached(self) -> None:
        if not self._attached:
            raise BillhookError(
                f"The adapter of {_named(self.module)} was merged or removed already: attach a new one."
            )


def attach(
    module: nn.Module,
    kind: Kind,
    keep: Tensor | None,
    rank: int,
    alpha: float,
    generator: torch.Generator,
) -> Adapter:
    """Put an adapter on a linear layer; it computes the same function as before until A and B are trained.

    The layer's weight becomes a parametrisation (`torch.nn.utils.parametrize`) of its frozen self, kept in its
    storage dtype, and of A and B in float32. While it is attached, `state_dict` has other keys and the layer cannot
    be pickled; `merge` and `remove` end that.

    Args:
        module: `nn.Linear` or Transformers' `Conv1D`; a Conv1D's weight is read as [out, in] too.
        kind: see the module's description.
        keep: bool [out, in], True where a weight was kept. A kept weight that happens to be 0 is free to move,
            except under scale_lora and scale_lora_full. None for lora and the scale variants means that no mask is
            known: a merge then refuses to lower the number of zeros.
        rank: r, from 1 to min(out, in).
        alpha: the product is multiplied by alpha / r; the scale variants have no such factor.
        generator: draws A, uniform within ±1/√in (Kaiming-uniform with a = √5); not used by scale_lora.

    Raises:
        BillhookError: another kind of layer or an unknown kind of adapter; a rank, alpha or mask that does not fit;
            weights outside the mask that are not zero; a layer whose weight is parametrised already.
    """
    if kind not in KINDS:
        raise BillhookError(f"Adapter {kind!r} is not known{nearest(kind, KINDS)}: use one of {', '.join(KINDS)}.")
    if not isinstance(module, nn.Linear | Conv1D):
        raise BillhookError(f"An adapter needs an nn.Linear or a Conv1D, not a {type(module).__name__}.")
    if parametrize.is_parametrized(module, "weight"):
        raise BillhookError(
            f"The weight of {_named(module)} is parametrised already: merge or remove its adapter first."
        )
    transposed = isinstance(module, Conv1D)
    weight: Tensor = module.weight.detach()
    weight = weight.T if transposed else weight
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise BillhookError(f"Rank {rank} does not fit {_named(module)}: use a rank from 1 to {min(rows, columns)}.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise BillhookError(f"alpha is {alpha}: use a positive number, such as twice the rank.")
    if keep is None:
        if kind in ("mask_lora", "lora_prune"):
            raise BillhookError(f"{kind} needs the mask of {_named(module)}: give keep, a bool tensor [out, in].")
    else:
        if keep.dtype != torch.bool or keep.shape != weight.shape:
            raise BillhookError(
                f"The mask of {_named(module)} is {keep.dtype} {list(keep.shape)}: give a bool tensor [out, in] of the "
                "same shape."
            )
        keep = keep.to(weight.device)
        if bool(torch.count_nonzero(torch.where(keep, 0.0, weight))):
            raise BillhookError(
                f"{_named(module)} has nonzero weights outside its mask: prune it before an adapter is attached."
            )
    if kind == "scale_lora":
        a = torch.full((rank, columns), _symmetric_start(rank))
        b = torch.full((rows, rank), _symmetric_start(rank))
    else:
        bound = 1 / math.sqrt(columns)
        a = torch.empty(rank, columns, device=generator.device).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(rows, rank)
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    return Adapter(module, LowRank(kind, a, b, keep, alpha, transposed))


def _symmetric_start(rank: int) -> float:
    """1/√r as float32 has it."""
    return float(torch.tensor(1 / math.sqrt(rank), dtype=torch.float32))


def _named(module: nn.Linear | Conv1D) -> str:
    """What a sentence calls a layer: its kind and size."""
    weight: Tensor = module.weight
    conv = isinstance(module, Conv1D)
    rows, columns = (weight.T if conv else weight).shape
    return f"a {'Conv1D' if conv else 'Linear'} of [{rows}, {columns}]"
