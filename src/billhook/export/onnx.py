"""A Hugging Face folder as an ONNX file, for any causal language model, whatever the widths of its blocks.

The graph is traced from the model itself, so what no stock class can express (widths per layer, residual matrices)
needs nothing of its own here. Transformers' own exporters trace the same way; they also patch parts of PyTorch for
models that this does not need, are experimental, and give inputs other names than runtimes look for.

The finished file is run in ONNX Runtime against the PyTorch model before it gets its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.export.folder import _COMPANIONS, _OURS, Target
from billhook.measure.latency import cache_name
from billhook.models.load import load, resolve

log = logging.getLogger("billhook")
FILE = "model.onnx"
TOLERANCE = 1e-4  # of the largest logit
_EXTERNAL = 1_500_000_000  # bytes of weights over which they get a file of their own: protobuf ends at 2 GiB
_PROMPTS = ((1, 5), (3, 12))  # batch and tokens of the comparison; the graph was traced with others
_TRACED = (2, 9)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ONNXReport:
    """What an export wrote.

    Attributes:
        path: the .onnx file.
        nbytes: bytes of it and of the file of its weights, if it has one.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        opset: version of the ONNX operators.
        difference: largest difference of a logit from PyTorch's, relative to the largest logit.
    """

    path: Path
    nbytes: int
    inputs: list[str]
    outputs: list[str]
    opset: int
    difference: float


def export_onnx(folder: Path, out: Path, *, cache: bool = False, force: bool = False) -> ONNXReport:
    """Write a causal language model as `out`/model.onnx in float32, with its configuration and tokenizer.

    Without a cache the graph maps `input_ids` [batch, tokens] to `logits` [batch, tokens, vocabulary]. With one it
    also takes `attention_mask` [batch, past + tokens] and `past_key_values.N.key` and `.value` [batch, heads, past,
    channels] and gives `present.N.key` and `.value`; `past` may be 0. Batch and lengths are free. Weights over 1.5 GB
    lie beside it in model.onnx.data.

    Args:
        folder: a model as in `load`.
        out: folder to write.
        cache: take and give keys and values, so that writing token by token does not read everything anew.
        force: overwrite `out`.

    Raises:
        BillhookError: a package is missing, `out` is taken, the model is no causal language model or cannot be traced,
            or ONNX Runtime computes something else than PyTorch; then nothing is left.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BillhookError(f"The export to ONNX needs {', '.join(missing)}: pip install 'billhook[onnx]'.")
    target = Target(Path(out))
    if not force:
        target.refuse_foreign(FILE)
        if target.out.exists():
            raise BillhookError(f"{target.out} exists: choose another --out, or overwrite it with --force.")
    model: Any
    source = resolve(str(folder))
    model, _ = load(source, dtype=torch.float32)
    if getattr(model, "main_input_name", "") != "input_ids" or not model.can_generate():
        raise BillhookError(f"{folder} is a {type(model).__name__}: only causal language models are exported to ONNX.")
    past = _sample(model, cache)
    result = target.fresh()
    log.info("Tracing %s: minutes for a deep model.", folder)
    try:
        result.mkdir()
        program = _trace(model, past)
        path = result / FILE
        program.save(path, external_data=_weight_bytes(program) > _EXTERNAL)
        _companions(source, result)
        difference = _verify(path, model, past)
        graph = program.model.graph
        report = ONNXReport(
            path=target.out / FILE,
            nbytes=sum(file.stat().st_size for file in result.glob(FILE + "*")),
            inputs=[str(value.name) for value in graph.inputs],
            outputs=[str(value.name) for value in graph.outputs],
            opset=int(program.model.opset_imports[""]),
            difference=difference,
        )
    except OSError as error:
        target.discard()
        raise BillhookError(
            f"{target.out} cannot be written: {error.strerror or error}; choose another --out."
        ) from None
    except BaseException:
        target.discard()
        raise
    target.publish(result)
    return report


# -- tracing ----------------------------------------------------------------------------------------------


class _Plain(nn.Module):
    """input_ids -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class _Cached(nn.Module):
    """input_ids, attention_mask, [key, value, key, value ...] -> logits and the longer keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _cache_of(past)
        held = {cache_name(self.model): cache, "use_cache": True}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **held)
        return (output.logits, *_tensors_of(cache))


class _Blocks(nn.Module):
    """input_ids -> what enters and leaves each block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states)


def _cache_of(tensors: list[Tensor]) -> Any:
    """A cache that keeps all tokens, also in layers that look at a window only: their mask hides the rest."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def _tensors_of(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _ids(model: Any, batch: int, tokens: int) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def _sample(model: Any, cache: bool) -> list[Tensor]:
    """Keys and values of a few tokens, which have the shapes that the graph is traced with; empty without a cache."""
    if not cache:
        return []
    held = _cache_of([])
    try:
        model(_ids(model, *_TRACED), **{cache_name(model): held}, use_cache=True)
        past = _tensors_of(held)
        complete = all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in past)
    except Exception:  # a model that keeps something else fails in its own way
        past, complete = [], False
    if not complete or not past:
        raise BillhookError(
            f"{type(model).__name__} keeps more in its cache than keys and values: export it without the cache."
        )
    return past


def _trace(model: Any, past: list[Tensor]) -> Any:
    batch, tokens = _TRACED
    ids = {0: "batch", 1: "tokens"}
    if not past:
        return _export(_Plain(model), (_ids(model, batch, tokens),), (ids,), ["input_ids"], ["logits"])
    new = 4
    arguments = (_ids(model, batch, new), torch.ones(batch, tokens + new, dtype=torch.long), past)
    shapes = (ids, {0: "batch", 1: "past_and_tokens"}, [{0: "batch", 2: "past"} for _ in past])
    inputs = ["input_ids", "attention_mask", *_names("past_key_values", past)]
    return _export(_Cached(model), arguments, shapes, inputs, ["logits", *_names("present", past)])


def _names(prefix: str, past: list[Tensor]) -> list[str]:
    """The names that Optimum gave them first, and that runtimes look for."""
    return [f"{prefix}.{index // 2}.{('key', 'value')[index % 2]}" for index in range(len(past))]


def _export(module: nn.Module, arguments: Any, shapes: Any, inputs: list[str], outputs: list[str]) -> Any:
    try:
        with _silence(), torch.no_grad():
            return torch.onnx.export(
                module.eval(),
                arguments,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # a step of the tracing that fails has a type of its own
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones tell only in which step it was
            cause = cause.__cause__
        first = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        name = type(getattr(module, "model", module)).__name__
        raise BillhookError(f"{name} cannot be traced for ONNX: {first}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep to itself what the exporter says about operations and packages that no user of a command knows."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _weight_bytes(program: Any) -> int:
    values = program.model.graph.initializers.values()
    return sum(int(value.const_value.nbytes) for value in values if value.const_value is not None)


def _companions(folder: Path, result: Path) -> None:
    """Configuration, tokenizer and generation settings."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in _OURS:
            shutil.copyfile(path, result / path.name)


# -- checking ---------------------------------------------------------------------------------------------


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _verify(path: Path, model: Any, past: list[Tensor]) -> float:
    """Compare the file with the model; the largest relative difference of a logit.

    Raises:
        BillhookError: it is larger than `TOLERANCE`, or ONNX Runtime cannot run the file.
    """
    worst = 0.0
    try:
        session = _session(path)
        run = _cached_logits if past else _plain_logits
        for batch, tokens in _PROMPTS:
            ids = _ids(model, batch, tokens)
            worst = max(worst, _difference(run(session, ids, past), model(ids, use_cache=False).logits))
    except Exception as error:  # ONNX Runtime raises types of its own
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise BillhookError(f"ONNX Runtime cannot run the exported {type(model).__name__}: {first}") from None
    if not worst <= TOLERANCE:  # NaN is not
        raise BillhookError(
            f"ONNX Runtime computes something else than PyTorch for {type(model).__name__}: logits differ by "
            f"{worst:.2g} of the largest{_first_block(path, model)}; nothing was written."
        )
    return worst


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def _plain_logits(session: Any, ids: Tensor, past: list[Tensor]) -> Tensor:
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def _cached_logits(session: Any, ids: Tensor, past: list[Tensor]) -> Tensor:
    """Logits of all tokens: all but two in one run from an empty cache, then one by one with what it gave back."""
    batch, tokens = ids.shape
    names = _names("past_key_values", past)
    held = [torch.zeros(batch, tensor.shape[1], 0, tensor.shape[3]).numpy() for tensor in past]
    wanted = {value.name for value in session.get_inputs()}
    parts = []
    for start, end in ((0, tokens - 2), (tokens - 2, tokens - 1), (tokens - 1, tokens)):
        feed = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": torch.ones(batch, end, dtype=torch.long).numpy(),
            **dict(zip(names, held, strict=True)),
        }
        logits, *held = session.run(None, {name: value for name, value in feed.items() if name in wanted})
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)


def _first_block(path: Path, model: Any) -> str:
    """Phrase that names the first block whose output differs; empty where it cannot be found out."""
    trial = path.with_name("blocks.onnx")
    try:
        ids = _ids(model, *_PROMPTS[0])
        want = _Blocks(model)(ids)
        names = [f"block{index}" for index in range(len(want))]
        shapes = ({0: "batch", 1: "tokens"},)
        program = _export(_Blocks(model), (_ids(model, *_TRACED),), shapes, ["input_ids"], names)
        program.save(trial, external_data=_weight_bytes(program) > _EXTERNAL)
        got = _session(trial).run(None, {"input_ids": ids.numpy()})
    except Exception:  # the error that is being told of matters more than where it begins
        return ""
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if not _difference(torch.from_numpy(one), other) <= TOLERANCE:
            return ", first in the embeddings" if index == 0 else f", first in the output of block {index - 1}"
    return ", first after the last block"
