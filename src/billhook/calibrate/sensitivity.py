"""How strongly a model's loss reacts to its matrices: zeroth order (forward passes only) and first order.

Both need all weights in memory once, nothing else of scale: perturbations are regenerated from seeds, and a block's
inputs are kept so that a perturbed block is followed by its successors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from billhook.anatomy import Site
from billhook.calibrate import distributed
from billhook.calibrate.capture import Batch, Capture, feed
from billhook.calibrate.fisher import refuse_non_causal
from billhook.calibrate.padding import IGNORED, next_tokens
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.models.source import Resident
from billhook.progress import bar

GroupBy = Literal["block", "matrix"]
Loss = Callable[[Any, Batch], Tensor]


def task_loss(output: Any, batch: Batch) -> Tensor:
    """The model's own loss on a batch, float64 scalar: next token for ids, cross-entropy for `labels`.

    Raises:
        BillhookError: the batch has neither, or the model predicts no next token.
    """
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    labels = None if isinstance(batch, Tensor) else batch.get("labels")
    logits: Tensor = getattr(output, "logits", output)
    if labels is not None and labels.ndim == 1:
        return nn.functional.cross_entropy(logits.float(), labels.to(logits.device)).double()
    if ids is not None and not ids.is_floating_point():
        refuse_non_causal(output)
    if ids is None or ids.is_floating_point() or logits.ndim != 3:
        raise BillhookError(
            "Ranking matrices needs a loss: give batches of token ids, or with 'labels' of a classifier."
        )
    targets = next_tokens(ids, None if isinstance(batch, Tensor) else batch.get("attention_mask")).to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row, target in zip(logits[:, :-1], targets, strict=True):
        total = total + nn.functional.cross_entropy(row.float(), target, reduction="sum").double()
    return total / (targets != IGNORED).sum().clamp(min=1)


def shortened(batches: Iterable[Batch], samples: int, length: int, batch: int) -> list[Batch]:
    """The first `samples` sequences, cut to `length` tokens, in batches of `batch`; dict batches as they are."""
    batches = list(batches)
    ids = [b for b in batches if isinstance(b, Tensor) and not b.is_floating_point()]
    if len(ids) != len(batches):
        return batches
    return list(torch.split(torch.cat([b[:, :length] for b in ids])[:samples], batch))


class Tail:
    """The model's loss from the inputs of one block on, for a model that is whole in memory.

    Starts at the first block; `advance` moves to the next, with the block as it is then.
    """

    def __init__(self, walk: Walk, batches: Sequence[Batch], loss: Loss = task_loss) -> None:
        self.walk = walk
        self.batches = list(batches)
        self.loss_of = loss
        self.index = 0
        self.inputs: list[Tensor] = [torch.empty(0)] * len(self.batches)
        self.capture = Capture(walk.model, walk.anatomy, Resident(), walk.device, self.batches)
        self.capture.run(lambda i, hidden: self.inputs.__setitem__(i, hidden.clone()))
        self._as_tuple = False

    def _block(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        call = self.capture.calls[batch][index]
        output = self.walk.blocks[index](hidden, *call.args, **call.kwargs)
        self._as_tuple = isinstance(output, tuple)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def loss(self, batch: int) -> float:
        """The loss of one batch."""
        hidden = self.inputs[batch]
        for index in range(self.index, len(self.walk.blocks)):
            hidden = self._block(index, batch, hidden)
        return float(self.loss_of(self.capture.finish(batch, hidden, self._as_tuple), self.batches[batch]))

    def advance(self) -> None:
        """Go on to the next block."""
        self.inputs = [self._block(self.index, batch, hidden) for batch, hidden in enumerate(self.inputs)]
        self.index += 1


def zeroth_order(
    walk: Walk,
    batches: Sequence[Batch],
    *,
    group_by: GroupBy = "block",
    eps: float = 1e-3,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Σ over batches and draws of |L(W + εz) − L(W − εz)| / 2ε, z ~ N(0, 1), per block or matrix.

    To first order one term is |⟨z, ∇L⟩|, so its mean is √(2/π) · ‖∇L‖₂ (ECoFLaP, step 1; Sung et al., ICLR 2024).
    Two forward passes from the block on per group, batch and draw. Weights are restored from a copy, bit for bit,
    also where the loss raises; the global random state is not touched.

    Args:
        walk: a walk that has not begun.
        batches: each serves both signs of a draw.
        group_by: perturb all matrices of a block at once, or one at a time.
        eps: standard deviation of the perturbation.
        draws: noises per batch.
        seed: of the noises.

    Returns:
        Score per site name; sites of a block share one where `group_by` is "block".
    """
    scores: dict[str, float] = {}
    generator = torch.Generator(device=walk.device)
    count = 0
    with walk.whole(), bar("sensitivity", len(walk.blocks)) as step:
        tail = Tail(walk, batches)
        for sites in walk.sites:
            for group in [sites] if group_by == "block" else [[site] for site in sites]:
                saved = [site.weight.clone() for site in group]
                total = 0.0
                try:
                    for batch in range(len(batches)):
                        for _ in range(draws):
                            count += 1
                            losses = []
                            for sign in (1, -1):
                                generator.manual_seed(seed + count)
                                _perturb(group, saved, sign * eps, generator)
                                losses.append(tail.loss(batch))
                            total += abs(losses[0] - losses[1]) / (2 * eps)
                finally:
                    for site, original in zip(group, saved, strict=True):
                        site.weight.copy_(original)
                scores |= {site.name: total for site in group}
            tail.advance()
            step()
    return _summed(scores)


def _perturb(group: Sequence[Site], saved: Sequence[Tensor], scale: float, generator: torch.Generator) -> None:
    for site, original in zip(group, saved, strict=True):
        noise = torch.randn(original.shape, generator=generator, device=original.device, dtype=torch.float32)
        site.weight.copy_(torch.add(original.float(), noise, alpha=scale))


FirstOrder = Literal["grad", "grad_mag", "grad_mag_sq"]


def first_order(walk: Walk, batches: Sequence[Batch], score: FirstOrder) -> dict[str, float]:
    """Σ |∂L/∂W|, Σ |W|·|∂L/∂W| or Σ W²·(∂L/∂W)² per site, averaged over batches; one backward pass per batch.

    Memory: gradients of all sites beside the weights, and the activations of one batch.
    """
    scores = {site.name: 0.0 for site in walk.all_sites()}
    with walk.whole() as model:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        try:
            for sites in walk.sites:
                for site in sites:
                    site.module.weight.requires_grad_(True)
            for batch in batches:
                with torch.enable_grad():
                    task_loss(feed(model, walk.anatomy, batch, walk.device), batch).backward()  # type: ignore[no-untyped-call]
                for site in walk.all_sites():
                    parameter: Any = site.module.weight
                    if parameter.grad is None:  # an expert that no token was routed to
                        continue
                    gradient, weight = parameter.grad.float(), parameter.data.float()
                    if score == "grad":
                        value = gradient.abs().sum()
                    elif score == "grad_mag":
                        value = (weight * gradient).abs().sum()
                    else:
                        value = (weight * gradient).square().sum()
                    scores[site.name] += float(value) / len(batches)
                    parameter.grad = None
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None
    return _summed(scores)


def _summed(scores: dict[str, float]) -> dict[str, float]:
    """Scores added up over processes."""
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    distributed.sum_([values])
    return dict(zip(scores, values.tolist(), strict=True))
