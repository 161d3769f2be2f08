"""Per-sample gradients of chosen entries of linear layers, without ever holding the gradient of one sample whole.

For y = x Wᵀ with W [out, in], input X_s [T, in] and output gradient D_s [T, out] of sample s, the gradient of that
sample's loss is D_sᵀX_s, so the entry (r, c) is Σ_t D_s[t, r] X_s[t, c]: one forward and one backward pass, and a
product per wanted entry. With G [S, n] these gradients, GᵀG / S is the empirical Fisher matrix that iCBS, CBS and
WoodFisher use as Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from billhook.calibrate.capture import Batch
from billhook.calibrate.padding import IGNORED, next_tokens
from billhook.errors import BillhookError, nearest
from billhook.system import finite

LossFn = Callable[[nn.Module, Any], Tensor]

_CHUNK = 1 << 22  # entries of a float32 temporary: 16 MiB


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """What one layer read and what came back to it, sample by sample.

    Attributes:
        name: the layer's module name.
        calls: (X [S, T, in], D [S, T, out]) for every time the layer was called; T may differ between calls.
    """

    name: str
    calls: list[tuple[Tensor, Tensor]]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        x, d = self.calls[0]
        return d.shape[2], x.shape[2]

    @property
    def samples(self) -> int:
        """S."""
        return len(self.calls[0][0])

    def gather(self, rows: Tensor, columns: Tensor) -> Tensor:
        """G: the gradient of each sample's loss with respect to W[rows[i], columns[i]].

        Costs O(S T n) products; temporaries are bounded by 2 · 16 MiB, or 8 T bytes where that is more.

        Args:
            rows, columns: int64 [n].

        Returns:
            float32 [S, n].

        Raises:
            BillhookError: an index is outside of the weight, or the two differ in length.
        """
        if rows.ndim != 1 or rows.shape != columns.shape:
            raise BillhookError(
                f"Rows {list(rows.shape)} and columns {list(columns.shape)} of {self.name} must be two vectors of the "
                "same length."
            )
        for what, index, size in zip(("rows", "columns"), (rows, columns), self.shape, strict=True):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise BillhookError(
                    f"The {what} of {self.name} reach from {int(index.min())} to {int(index.max())}, but its weight "
                    f"is {self.shape[0]} x {self.shape[1]}."
                )
        device = self.calls[0][0].device
        rows, columns = rows.to(device), columns.to(device)
        result = torch.zeros(self.samples, len(rows), dtype=torch.float32, device=device)
        for inputs, gradients in self.calls:
            width = max(1, _CHUNK // inputs.shape[1])
            for start in range(0, len(rows), width):
                part = slice(start, start + width)
                for s, (x, d) in enumerate(zip(inputs, gradients, strict=True)):
                    result[s, part] += (d[:, rows[part]].float() * x[:, columns[part]].float()).sum(0)
        return result

    def mean(self) -> Tensor:
        """The gradient of the mean loss, (1/S) Σ_s D_sᵀX_s, float32 [out, in]."""
        device = self.calls[0][0].device
        result = torch.zeros(self.shape, dtype=torch.float32, device=device)
        for inputs, gradients in self.calls:
            for x, d in zip(inputs, gradients, strict=True):
                result.addmm_(d.float().T, x.float(), alpha=1 / self.samples)
        return result


@dataclass(frozen=True, eq=False)
class SampleGradients:
    """The result of one forward and backward pass.

    Attributes:
        losses: the samples' losses, float32 [S].
        layers: per layer name, in the order asked for.
    """

    losses: Tensor
    layers: dict[str, LayerGradients]

    def __getitem__(self, name: str) -> LayerGradients:
        return self.layers[name]


def sample_gradients(model: nn.Module, layers: Sequence[str], batch: Any, loss_fn: LossFn) -> SampleGradients:
    """Run one batch forward and backward and keep what per-sample gradients of the layers are made of.

    The pass is in evaluation mode. The losses are summed over the samples before the backward pass, so that every
    row of an output gradient belongs to one sample's loss alone. No parameter needs a gradient or gets one; modes,
    `requires_grad` flags and hooks are as before afterwards, also after an error.

    Memory: b · S · T · (in + out) bytes per layer with b bytes per activation (layers that read the same tensor
    share it), plus what the backward pass keeps from the first chosen layer on. For more samples than fit, call
    this for one part of them after the other and concatenate the rows of G. In float16 small gradients vanish:
    prefer bfloat16 or float32.

    Args:
        model: in memory.
        layers: module names of `nn.Linear` or Transformers `Conv1D` layers. Their inputs must have the sample as
            first dimension, or, for a batch of token ids [S, T], be the S · T tokens in order.
        batch: what `loss_fn` takes.
        loss_fn: (model, batch) -> [S], the loss of each sample, independent of the other samples; for example
            `next_token_losses` or `label_losses`.

    Raises:
        BillhookError: no such layer, not a linear one, not reached by the loss, or with an input that does not
            show its samples; losses of the wrong shape; or a loss or gradient that is not finite.
    """
    names = [layers] if isinstance(layers, str) else list(layers)
    modules = {name: _linear(model, name) for name in names}
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BillhookError("Gradients need the whole model in memory: load it without streaming.")
    taps: dict[str, list[_Tap]] = {name: [] for name in names}
    handles: list[Any] = []
    with _quiet(model), torch.inference_mode(False), torch.enable_grad():
        try:
            for name, module in modules.items():
                handles.append(module.register_forward_hook(_tapping(taps[name]), with_kwargs=True))
            losses = loss_fn(model, batch)
            if losses.ndim != 1 or not len(losses):
                raise BillhookError(
                    f"The loss function returned a tensor of shape {list(losses.shape)}: it must return one loss per "
                    "sample, [S]."
                )
            if not finite(losses.detach()):
                worst = int((~losses.detach().isfinite()).nonzero()[0])
                raise BillhookError(f"The loss of sample {worst} is not finite: check the model and the data.")
            for name, calls in taps.items():
                if not calls or not losses.requires_grad:
                    raise BillhookError(f"The loss does not depend on layer {name}: leave it out.")
            losses.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
    length = _length(batch)
    result = {name: LayerGradients(name, _paired(name, calls, len(losses), length)) for name, calls in taps.items()}
    return SampleGradients(losses.detach().float(), result)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of each sequence over its own next tokens, from a float32 log-softmax; float32 [S].

    Args:
        model: a causal language model.
        batch: token ids [S, T]; or a mapping with `input_ids` and, for padded sequences, `attention_mask`: pads
            are then no targets.

    Raises:
        BillhookError: a sequence has no next token, or the model predicts none.
    """
    device = next(model.parameters()).device
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    inputs = {key: value.to(device) for key, value in inputs.items() if key != "labels"}
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise BillhookError(f"Token ids of shape {list(ids.shape)} are no batch of sequences: give [S, T].")
    targets = next_tokens(ids, inputs.get("attention_mask"))
    counts = (targets != IGNORED).sum(1)
    if not targets.shape[1] or bool((counts == 0).any()):
        raise BillhookError("A sequence has no next token to predict: give sequences of at least two tokens.")
    output = model(**inputs)
    refuse_non_causal(output)
    logits: Tensor = getattr(output, "logits", output)
    # one sequence at a time: vocabulary-sized float32 tensors are the largest here
    losses = [
        nn.functional.cross_entropy(row[:-1].float(), target, reduction="sum")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses) / counts


def refuse_non_causal(output: Any) -> None:
    """Raise where a Transformers model's output is not that of a causal language model: it predicts no next token.

    Raises:
        BillhookError: names what the output is.
    """
    kind = type(output).__name__
    if isinstance(output, ModelOutput) and "CausalLM" not in kind:
        raise BillhookError(
            f"The loss of the next token was asked for, but the model is no causal language model (it returns {kind}): "
            "give batches with 'labels' of a classifier, or choose a method or options that need no loss."
        )


def label_losses(model: nn.Module, batch: Mapping[str, Tensor] | tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each sample of a classifier, from a float32 log-softmax; float32 [S].

    Args:
        model: returns logits [S, classes], or an object that has them as `logits`.
        batch: (x, labels), or a mapping with `labels` and the model's inputs, such as `pixel_values`. Labels are
            int64 [S].

    Raises:
        BillhookError: there are no labels.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise BillhookError(f"The batch has no labels (keys: {', '.join(batch)}): put them under 'labels'.")
        labels = batch["labels"]
        output = model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    else:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise BillhookError("A batch of a classifier is a pair (x, labels), or a mapping with 'labels'.")
        x, labels = batch
        output = model(x.to(device))
    logits: Tensor = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits.float(), labels.to(device), reduction="none")


@dataclass(eq=False)
class _Tap:
    """One call of a layer: its input, the input's version when it was read, and the output's gradient."""

    x: Tensor
    version: int
    gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


def _tapping(taps: list[_Tap]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not output.requires_grad:
            # The graph starts here, from a scalar: a leaf of the output's size would collect a second gradient of
            # that size, and could not be changed in place by what follows.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        tap = _Tap(x, x._version)
        taps.append(tap)
        output.register_hook(tap.receive)  # type: ignore[no-untyped-call]
        return output

    return hook


def _paired(name: str, taps: list[_Tap], samples: int, length: int | None) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients of all calls as [S, T, width]."""
    pairs = []
    for tap in taps:
        x, d = tap.x, tap.gradient
        if d is None:
            continue  # a call whose output the loss does not read
        if x._version != tap.version:
            raise BillhookError(f"The input of layer {name} is changed in place after the layer read it: leave it out.")
        if not finite(d):
            raise BillhookError(f"The gradient at layer {name} is not finite: check the model, or use a wider --dtype.")
        tokens = x.ndim == 2 and length is not None and len(x) == samples * length
        if x.ndim < 2 or (len(x) != samples and not tokens):
            raise BillhookError(
                f"Layer {name} reads an input of shape {list(x.shape)} for {samples} samples: per-sample gradients "
                "need the sample as its first dimension."
            )
        pairs.append((x.reshape(samples, -1, x.shape[-1]), d.reshape(samples, -1, d.shape[-1])))
    if not pairs:
        raise BillhookError(f"The loss does not depend on layer {name}: leave it out.")
    return pairs


def _length(batch: Any) -> int | None:
    """Tokens per sequence where the batch is token ids."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
        return ids.shape[1]
    return None


def _linear(model: nn.Module, name: str) -> nn.Module:
    """The linear layer of this name."""
    known = dict(model.named_modules(remove_duplicate=False))
    module = known.get(name)
    if module is None:
        raise BillhookError(f"{type(model).__name__} has no layer {name!r}{nearest(name, known)}.")
    if not isinstance(module, nn.Linear | Conv1D):
        raise BillhookError(
            f"Layer {name} is a {type(module).__name__}: gradients are gathered from linear layers only."
        )
    return module


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter that needs a gradient, no key-value cache; everything as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        if config is not None and cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in flags:
            parameter.requires_grad_(needed)
        if config is not None and cache is not None:
            config.use_cache = cache
