"""PERP: after pruning, train a tiny part of the parameters; the zeros stay exactly where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from billhook.anatomy import Site
from billhook.calibrate.capture import feed
from billhook.calibrate.sensitivity import shortened, task_loss
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError, nearest
from billhook.methods.base import Method, Paper, register
from billhook.progress import bar
from billhook.recover.adapters import Adapter, Kind, attach
from billhook.recover.groups import Group, Named, counts, head_module, parameters_of
from billhook.recover.reconstruct import reconstruct
from billhook.recover.train import Loop, packed, unpacked


@register("perp")
class PERP(Method):
    title = "PERP"
    paper = Paper(
        "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        "M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta",
        "2023",
        "2312.15230",
    )
    trains = True
    summary = (
        "Trains norms, biases and low-rank adapters of a pruned model, on the outputs of each dense block or the next "
        "token, and merges the adapters under the mask."
    )
    when = (
        "After any pruning, as a step of the same run. Block by block it needs the memory of one block; on the next "
        "token, that of the whole model and its activations."
    )

    objective: Literal["block", "global"] = Field(
        "block", description="Outputs of the dense block (block), or the model's own loss (global)."
    )
    groups: str = Field(
        "auto", description="Of norm, bias, adapters, head, joined by '+'; auto: the first three if any."
    )
    adapter: Literal["mask_lora", "scale_lora", "scale_lora_full", "lora_prune"] = Field(
        "mask_lora", description="Kind of low-rank adapter; each merges without filling a zero."
    )
    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Adapters are scaled by alpha / rank.")
    training_steps: int | None = Field(
        None, ge=0, description="Optimizer steps per block (100 by default) or in all (global: 200)."
    )
    lr: float | None = Field(
        None, ge=0, description="Peak learning rate of norms and biases (1e-2 by default; global: 3e-3)."
    )
    adapter_lr: float | None = Field(
        None, ge=0, description="Peak learning rate of adapters (5e-3 by default; global: 1e-3)."
    )
    accumulate: int = Field(1, ge=1, description="Calibration batches per step.")
    draw: int = Field(0, ge=0, description="Seed of the adapters' start.")

    @field_validator("groups")
    @classmethod
    def _groups(cls, text: str) -> str:
        for name in [] if text == "auto" else text.split("+"):
            if name not in get_args(Group):
                raise ValueError(
                    f"there is no group {name!r}{nearest(name, get_args(Group))}: join some of "
                    f"{', '.join(get_args(Group))} by '+'"
                )
        return text

    @model_validator(mode="after")
    def _alpha_is_used(self) -> PERP:
        scales = self.adapter in ("scale_lora", "scale_lora_full") and "head" not in self.groups.split("+")
        if scales and "alpha" in self.model_fields_set:
            raise ValueError(f"adapter={self.adapter} multiplies the weights and has no alpha: leave alpha out")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps, per block or in all."""
        if self.training_steps is None:
            return 100 if self.objective == "block" else 200
        return self.training_steps

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate per group; few steps on squared errors need more than those on a language loss."""
        norm, adapter = (1e-2, 5e-3) if self.objective == "block" else (3e-3, 1e-3)
        norm = norm if self.lr is None else self.lr
        adapter = adapter if self.adapter_lr is None else self.adapter_lr
        return {"norm": norm, "bias": norm, "adapters": adapter, "head": adapter}

    @property
    def wants_original(self) -> bool:
        return self.objective == "block"

    def chosen(self, module: nn.Module) -> list[Group]:
        """The groups to train in a block or model."""
        if self.groups == "auto":
            has = counts(module)
            few: tuple[Group, ...] = ("norm", "bias")
            return [*(group for group in few if has[group]), "adapters"]
        return [group for group in get_args(Group) if group in self.groups.split("+")]

    def check(self, walk: Walk) -> None:
        if "head" not in self.groups.split("+"):
            return
        if self.objective == "block":
            raise BillhookError("Method perp: the head belongs to no block: leave it out, or use objective=global.")
        # in files a tied head is stored once, so a streamed model does not show it
        if getattr(getattr(walk.model, "config", None), "tie_word_embeddings", False):
            raise BillhookError(
                "Method perp: the output head of this model is tied to its embedding, which would change too: leave "
                "the group head out."
            )

    def prune(self, walk: Walk) -> None:
        if self.objective == "global":
            self._next_token(walk)
            return
        for block in walk:
            walk.targets |= {site.name: _sparsity(site) for site in block.sites}
            with walk.original(block):
                targets = [walk.rows(batch, walk.forward(block, batch)) for batch in range(len(walk.inputs))]
            adapters = self._attach(block.sites, block.index) if "adapters" in self.chosen(block.module) else []
            with _merged(adapters):
                reconstruct(
                    lambda batch, b=block: walk.rows(batch, walk.call(b, batch)),  # type: ignore[misc]
                    block.module,
                    parameters_of(block.module, self.chosen(block.module)),
                    targets,
                    self.steps,
                    self.rates,
                    accumulate=self.accumulate,
                    autocast=walk.precision == "bf16",
                )

    def _attach(self, sites: list[Site], number: int) -> list[Adapter]:
        generator = torch.Generator().manual_seed(self.draw + number)
        kind: Kind = self.adapter
        return [
            attach(site.module, kind, site.weight != 0, min(self.rank, *site.shape), self.alpha, generator)
            for site in sites
        ]

    def _next_token(self, walk: Walk) -> None:
        """Global retraining: the model's loss on the calibration batches, in order, again and again."""
        with walk.whole() as model:
            outside = self._outside(walk, model)
        with walk.editing(outside) as model:
            walk.targets = {site.name: _sparsity(site) for site in walk.all_sites()}
            groups = self.chosen(model)
            adapters = self._attach(walk.all_sites(), 0) if "adapters" in groups else []
            if "head" in groups:
                head = head_module(model)
                generator = torch.Generator().manual_seed(self.draw)
                keep = torch.ones(head.weight.shape[-2:], dtype=torch.bool)
                adapters.append(attach(head, "lora", keep, min(self.rank, *keep.shape), self.alpha, generator))
            batches = shortened(walk.batches, 1 << 62, 1 << 30, _sequences(walk))

            def loss(index: int) -> Tensor:
                batch = batches[index % len(batches)]
                return task_loss(feed(model, walk.anatomy, batch, walk.device), batch).float()

            with _merged(adapters), bar("perp", self.steps) as step:
                loop = Loop(
                    model,
                    parameters_of(model, groups),
                    self.rates,
                    loss,
                    self.steps,
                    accumulate=self.accumulate,
                    autocast=walk.precision == "bf16",
                )
                kept = walk.kept_state()
                if kept is not None:
                    loop.load_state_dict(unpacked(*kept))
                while loop.step < self.steps:
                    losses = loop.run(until=loop.step + 1)
                    walk.keep_state(lambda: packed(loop.state_dict()))
                    step(f"loss {losses[-1]:.4f}")

    def _outside(self, walk: Walk, model: nn.Module) -> list[str]:
        """Parameters outside the blocks that the chosen groups train."""
        inside = {id(p) for block in walk.blocks for p in block.parameters()}
        groups = [group for group in self.chosen(model) if group in ("norm", "bias")]
        trained: dict[Group, Named] = parameters_of(model, groups) if groups else {}
        names = [name for named in trained.values() for name, p in named.items() if id(p) not in inside]
        if "head" in self.groups.split("+"):
            head = head_module(model)
            names += [f"{name}.weight" for name, module in model.named_modules() if module is head]
        return names


@contextmanager
def _merged(adapters: list[Adapter]) -> Iterator[None]:
    """Adapters are merged at the end; after an error they are dropped, and the weights are what they were."""
    try:
        yield
    except BaseException:
        for adapter in adapters:
            adapter.remove()
        raise
    for adapter in adapters:
        adapter.merge()


def _sparsity(site: Site) -> float:
    return 1.0 - int(torch.count_nonzero(site.weight)) / site.numel


def _sequences(walk: Walk) -> int:
    first = walk.batches[0]
    return len(first) if isinstance(first, Tensor) else len(next(iter(first.values())))
