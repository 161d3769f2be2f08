"""DISP-LLM: every sublayer reads and writes its own subset of the residual stream, learned by a hypernetwork."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from billhook.calibrate import distributed
from billhook.calibrate.capture import feed
from billhook.calibrate.sensitivity import shortened, task_loss
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.methods.base import Paper, register
from billhook.methods.structured import StructuredMethod
from billhook.progress import bar
from billhook.recover.train import Loop, packed, unpacked
from billhook.sparsity.gates import (
    Noise,
    gumbel_sigmoid,
    hardened,
    likely,
    log_ratio,
    reinmax,
    straight_through,
    within_budget,
)
from billhook.surgery.points import gated, points
from billhook.surgery.shrink import Part, drop_attention_, drop_mlp_, keep_neurons_, keep_reads_, keep_writes_

Masks = list[dict[str, Tensor]]  # block -> point -> one value per channel


@register("disp-llm")
class DispLLM(StructuredMethod):
    title = "DISP-LLM"
    paper = Paper(
        "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models",
        "S. Gao, C. Lin, T. Hua, T. Zheng, Y. Shen, H. Jin, Y. Hsu",
        "NeurIPS 2024",
        "2410.11988",
    )
    trains = True
    summary = (
        "Lets every attention and MLP read and write its own subset of the residual channels, and learns the subsets "
        "and the neurons as gates, with a hypernetwork over the frozen model; no weight changes."
    )
    when = (
        "For high ratios where training is affordable: needs the whole model and its activations in memory, and "
        "thousands of steps to be at its best. Runtimes other than PyTorch and ONNX do not know such blocks."
    )

    training_steps: int = Field(300, ge=0, description="Optimizer steps; the paper has 10000, at lr=1e-3.")
    lr: float = Field(3e-3, gt=0, description="Learning rate, constant.")
    batch: int = Field(1, ge=1, description="Sequences per step.")
    lam: float = Field(16.0, ge=0, description="Weight of the penalty on being off the budget.")
    estimator: Literal["reinmax", "st", "gumbel_soft"] = Field(
        "reinmax", description="Gradient of the gates: second order, straight-through, or soft as in the paper's code."
    )
    tau: float | None = Field(
        None, gt=0, description="Temperature; 1 for reinmax, at least, and 0.4 for gumbel_soft by default; st has none."
    )
    offset: float = Field(3.0, description="Added to all logits, so that nearly all gates begin open.")
    hyper: bool = Field(True, description="Logits come from a hypernetwork, or are parameters themselves.")
    tie: Literal["none", "same"] = Field("none", description="same: one subset of the stream for all sublayers.")
    repair: bool = Field(True, description="Move the threshold on the gates so that the budget is met exactly.")
    draw: int = Field(0, ge=0, description="Seed of the hypernetwork and of the gates' samples.")

    @model_validator(mode="after")
    def _warm(self) -> DispLLM:
        if self.estimator == "reinmax" and self.tau is not None and self.tau < 1:
            raise ValueError(f"tau={self.tau:g} turns reinmax's gradients round: give 1 or more, or another estimator")
        if self.estimator == "st" and self.tau is not None:
            raise ValueError("estimator=st has no temperature: leave tau out, or take another estimator")
        return self

    def check(self, walk: Walk) -> None:
        _target(self.overall(walk), walk.blocks)
        if self.tie == "same":
            Gates(walk.blocks, tied=True)

    def prune(self, walk: Walk) -> None:
        ratio = self.overall(walk)
        with walk.editing() as model:
            gates, target = Gates(walk.blocks, self.tie == "same"), _target(ratio, walk.blocks)
            if ratio == 0:
                return
            logits = self._learned(walk, model, gates, target)
            if self.repair:
                kept = within_budget(logits, lambda keep: float(gates.size(gates.closed(keep))), target).byte()
            else:
                kept = likely(logits, self._noise).byte()
            distributed.from_main_([kept])
            masks = gates.closed(kept.bool())
            if not self.repair:
                share = 1 - float(gates.size(masks)) / gates.total
                walk.notes.append(f"The gates remove {share:.1%} of the blocks' matrices: no repair was asked for.")
            for block, mask in zip(walk.blocks, masks, strict=True):
                cut_(block, mask)

    def _learned(self, walk: Walk, model: nn.Module, gates: Gates, target: float) -> Tensor:
        """The logits of all gates after training, float32 [gates]."""
        source = (HyperNet if self.hyper else FreeLogits)(gates.sizes, self.draw).to(walk.device)
        generator = torch.Generator().manual_seed(self.draw)
        batches = shortened(walk.batches, 1 << 62, 1 << 30, self.batch)
        current: Masks = []
        seen: list[float] = []

        def loss(index: int) -> Tensor:
            batch = batches[index % len(batches)]
            with torch.autocast(walk.device.type, enabled=False):
                logits = source() + self.offset
                soft, hard = self.sample(logits, torch.rand(logits.shape, generator=generator).to(logits.device))
                current[:] = gates.spread(soft)
                size = gates.size(gates.spread(hard))
            own = task_loss(feed(model, walk.anatomy, batch, walk.device), batch)
            seen[:] = [float(own.detach()), float(size.detach()) / gates.total]
            return (own + self.lam * log_ratio(size, target)).float()

        opened = gated(walk.blocks, lambda block, point: current[block][point])
        with opened, bar("disp-llm", self.training_steps) as step:
            loop = Loop(
                model,
                {"gates": dict(source.named_parameters())},
                self.lr,
                loss,
                self.training_steps,
                autocast=walk.precision == "bf16",
                generator=generator,
                weight_decay=0.05,
                clip=1.0,
                constant=True,
            )
            state = walk.kept_state()
            if state is not None:
                loop.load_state_dict(unpacked(*state))
                source.load_state_dict({name: state[0][name] for name, _ in source.named_buffers()}, strict=False)
            while loop.step < self.training_steps:
                loop.run(until=loop.step + 1)
                walk.keep_state(lambda: _with_buffers(packed(loop.state_dict()), source))
                step(f"loss {seen[0]:.4f}  kept {seen[1]:.3f}")
        with torch.no_grad():
            result: Tensor = source() + self.offset
        return result

    def sample(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One draw: gates for the activations, and hard ones to count parameters with."""
        if self.estimator == "gumbel_soft":
            soft = gumbel_sigmoid(logits, uniform, 0.4 if self.tau is None else self.tau)
            return soft, hardened(soft)
        if self.estimator == "st":
            gate = straight_through(logits, uniform)
        else:
            gate = reinmax(logits, uniform, 1.0 if self.tau is None else self.tau)
        return gate, gate

    @property
    def _noise(self) -> Noise:
        return "gumbel" if self.estimator == "gumbel_soft" else "logistic"


class HyperNet(nn.Module):
    """Logits of any list of masks: a fixed random sequence, a bidirectional GRU, and a linear head per mask.

    Args:
        sizes: gates of each mask, in network order.
        seed: of the sequence and the weights; the global random state is not touched.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("z", torch.randn(len(sizes), 1, 32))
            self.gru = nn.GRU(32, 64, bidirectional=True)
            self.norm = nn.LayerNorm(128)
            self.heads = nn.ModuleList(nn.Linear(128, size, bias=False) for size in sizes)

    def forward(self) -> Tensor:
        hidden = nn.functional.gelu(self.norm(self.gru(self.z)[0][:, 0]))
        return torch.cat([head(row) for head, row in zip(self.heads, hidden, strict=True)])


class FreeLogits(nn.Module):
    """Logits that are parameters themselves, zero at first."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self) -> Tensor:
        return self.logits * 1.0


@dataclass(frozen=True)
class _Shape:
    """What one channel costs in a block: heads · channels of query, key and value; of output; matrices that read."""

    attention: int
    output: int
    readers: int


class Gates:
    """Which part of a vector of gates belongs to which point of which block, and how many elements that keeps.

    Attributes:
        sizes: gates of each mask.
        total: elements of the matrices with all gates open.
    """

    def __init__(self, blocks: Sequence[nn.Module], tied: bool) -> None:
        self.sizes: list[int] = []
        self.shapes = [_shape(block) for block in blocks]
        self.place: list[dict[str, int]] = []  # block -> point -> which mask
        for index, block in enumerate(blocks):
            places: dict[str, int] = {}
            for point, size in points(block).items():
                if not tied or point == "mlp.mid" or not self.sizes:
                    places[point] = len(self.sizes)
                    self.sizes.append(size)
                elif size == self.sizes[0]:
                    places[point] = 0  # the first mask is the stream's
                else:
                    raise BillhookError(
                        f"Method disp-llm: {point} of block {index} has {size} channels where others have "
                        f"{self.sizes[0]}, so they cannot share one subset: leave tie at none."
                    )
            self.place.append(places)
        self.total = int(self.size(self.spread(torch.ones(sum(self.sizes)))))

    def spread(self, gates: Tensor) -> Masks:
        """A vector of all gates as one mask for each point."""
        masks = torch.split(gates, self.sizes)
        return [{point: masks[mask] for point, mask in places.items()} for places in self.place]

    def closed(self, keep: Tensor) -> Masks:
        """Masks (bool) of what really stays: a sublayer with nothing to read, compute or write leaves as a whole."""
        masks = self.spread(keep)
        for mask in masks:
            for part in ("attention", "mlp"):
                own = [point for point in mask if point.startswith(part)]
                if not all(bool(mask[point].any()) for point in own):
                    mask |= {point: torch.zeros_like(mask[point]) for point in own}
        return masks

    def size(self, masks: Masks) -> Tensor:
        """Elements of all matrices that the masks keep, float64 scalar; differentiable in them.

        T = Σ_blocks d1 (H h + 2 G h) + d2 H h + 2 d3 d4 + d4 d5, of a gated MLP, of which no bias is counted.
        """
        sizes = []
        for shape, mask in zip(self.shapes, masks, strict=True):
            d = {point: values.double().sum() for point, values in mask.items()}
            if "attention.in" in d:
                sizes.append(d["attention.in"] * shape.attention + d["attention.out"] * shape.output)
            if "mlp.in" in d:
                sizes.append((d["mlp.in"] * shape.readers + d["mlp.out"]) * d["mlp.mid"])
        return torch.stack(sizes).sum()


def cut_(block: nn.Module, mask: dict[str, Tensor]) -> None:
    """Remove what the masks (bool, one value per channel of each point) leave out of a block."""
    drops = {"attention": drop_attention_, "mlp": drop_mlp_}
    parts: list[Part] = ["attention", "mlp"]
    for part in parts:
        if f"{part}.in" not in mask:
            continue
        if not mask[f"{part}.out"].any():
            drops[part](block)
            continue
        keep_reads_(block, part, mask[f"{part}.in"].nonzero()[:, 0])
        if part == "mlp":
            keep_neurons_(block, mask["mlp.mid"].nonzero()[:, 0])
        keep_writes_(block, part, mask[f"{part}.out"].nonzero()[:, 0])


def _shape(block: Any) -> _Shape:
    own, mlp = block.self_attn, block.mlp
    read = [own.q_proj, own.k_proj, own.v_proj] if own is not None else []
    return _Shape(
        attention=sum(linear.out_features for linear in read),
        output=own.o_proj.in_features if own is not None else 0,
        readers=1 + hasattr(mlp, "gate_proj"),
    )


def _target(ratio: float, blocks: Sequence[nn.Module]) -> float:
    """How many elements of the matrices stay when `ratio` of the blocks' parameters leave, all of them from there.

    Raises:
        BillhookError: that is nothing.
    """
    everything = sum(p.numel() for block in blocks for p in block.parameters())
    total = Gates(blocks, tied=False).total
    target = total - ratio * everything
    if target <= 0:
        raise BillhookError(f"Method disp-llm: removing {ratio:.0%} of the blocks leaves nothing: lower the sparsity.")
    return target


def _with_buffers(state: tuple[dict[str, Tensor], dict[str, Any]], module: nn.Module) -> Any:
    """The state with what the module holds fixed: a hypernetwork is of no use without its input."""
    return state[0] | dict(module.named_buffers()), state[1]
