"""A Hugging Face folder as a GGUF file for llama.cpp.

llama.cpp's architectures have one width for all layers, but for `deci`: that is Llama with a number of heads, of
key/value heads and of neurons for each layer. A layer without attention has 0 heads there, but for the first one: its
number of heads decides how llama.cpp reads the width of a head, so it gets one head of zeros. 0 neurons cannot be used
for a layer without MLP, because llama.cpp then drops the layer's attention too: such a layer gets an MLP of zeros.

Tensors are read, converted and written one at a time. The finished file is run in llama.cpp against the PyTorch model
before it gets its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.models.checkpoint import Packed
from billhook.models.files import Stored, room
from billhook.models.load import load
from billhook.models.source import Streamed, source_of
from billhook.surgery.slim import is_slim, reads_or_writes_some, stock_class

log = logging.getLogger("billhook")

Kind = Literal["f32", "f16", "bf16", "q8_0"]

_ALTERNATIVE = "keep the Hugging Face folder (--format hf) or use --format onnx"
_FILLER = 32  # neurons of an MLP of zeros: a whole block of every number format
_BLOCK = 32  # weights that share a scale in q8_0
_CHECKED = 12  # tokens per prompt that must agree
_LENGTH = 16  # tokens per prompt that are generated
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "Water boils at",
    "def add(a, b):\n    return",
)
_TEXTS = (
    *_PROMPTS,
    "Hello, world! It's 2024, isn't it? I'VE paid $1234.56 (50%).",
    "  two  spaces,\ttabs\n\nlines\r\n   and a tail  ",
    "Übergrößenträger, naïve café, Привет, 你好世界, 日本語, हिन्दी, 🙂👍🏽 ½ x² ١٢٣",
    "if (x != y) { return foo_bar[0]->baz; } // http://example.com/a?b=c&d",
)
# By how much a token's log-probability may fall short of the largest where two tokens count as equally good. llama.cpp
# multiplies f16 and bf16 weights with inputs rounded to the same type; what that does to this very model is measured
# and allowed for, since pruned models can be sensitive to it.
_TIE = {"f32": 0.01, "f16": 0.02, "bf16": 0.1}
_NOISE = 4.0  # times the measured effect of that rounding
_LARGEST_TIE = 1.0
_ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16}

_GPT2, _DIGITS = "bytes and words", "digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a tokenizer cuts text into words, and whether it takes a word that is a token without merging -> the name that
# llama.cpp has for it. (llama.cpp's own converter recognises known tokenizers by the tokens of a test text.)
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((_WORDS % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((_WORDS % r"\p{N}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


@dataclass(frozen=True)
class _Family:
    """How llama.cpp has a family.

    Attributes:
        architecture: its name for the family, with one width for all layers.
        per_layer: its name for the family with widths per layer; None where it has none.
        pairs: whether rotary embeddings turn neighbouring channels there, rather than one of each half of a head.
        norms: whether queries and keys are normalised.
    """

    architecture: str
    per_layer: str | None = None
    pairs: bool = False
    norms: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", "deci", pairs=True),
    "MistralForCausalLM": _Family("llama", "deci", pairs=True),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3", norms=True),
}


@dataclass(frozen=True)
class Check:
    """What llama.cpp wrote, next to what the PyTorch model would have written.

    Attributes:
        tokens: tokens that were compared.
        agreement: share of them that are the PyTorch model's first choice; None where nothing was generated.
        ties: tokens that are not, but whose probability is the same up to rounding.
        difference: the largest difference between the log-probabilities of a token; None where llama.cpp gave none.
        text: the first prompt and what llama.cpp wrote after it.
    """

    tokens: int
    agreement: float | None
    ties: int
    difference: float | None
    text: str


@dataclass(frozen=True)
class GGUFReport:
    """What an export wrote.

    Attributes:
        path: the file.
        architecture: llama.cpp's name: the family's, or `deci` (Llama with widths per layer).
        kind: number format of the matrices.
        layers: layers in the file.
        tensors: tensors in the file.
        nbytes: size of the file.
        check: the comparison with the PyTorch model; None where it was skipped.
        notes: sentences on what the file does not hold as the folder does.
    """

    path: Path
    architecture: str
    kind: str
    layers: int
    tensors: int
    nbytes: int
    check: Check | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Layer:
    """A layer of the file: the block that it is, its widths in the file, and which parts of it are zeros."""

    block: int
    heads: int
    kv_heads: int
    neurons: int
    empty_attention: bool = False
    empty_mlp: bool = False
    values: int | None = None  # value channels per head, where they are fewer than the file has


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, its shape, its type, how to make it, and the parameter that it holds."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Tensor]
    source: str


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer's part of the metadata."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]  # bos, eos, unk, pad
    add_bos: bool
    add_eos: bool
    template: str | None


def export_gguf(folder: Path, out: Path, *, kind: Kind = "f16", force: bool = False, verify: bool = True) -> GGUFReport:
    """Write the Llama, Mistral or Qwen model in a Hugging Face folder as a GGUF file, and try it in llama.cpp.

    The trial holds the PyTorch model in memory in float32; everything else needs one tensor at a time.

    Args:
        folder: a folder written by billhook, or a stock one.
        out: the file to write.
        kind: number format of the matrices (norms and biases stay float32).
        force: overwrite `out`.
        verify: load the file in llama.cpp and compare what it generates with the PyTorch model.

    Raises:
        BillhookError: the folder is no usable model; GGUF or llama.cpp cannot express it (the sentence names what,
            and in which layer); its tokenizer cannot be converted; `out` exists or cannot be written; llama.cpp is not
            installed, refuses the file, splits text otherwise, or generates other tokens.
    """
    folder, out = Path(folder), Path(out)
    if kind not in ("f32", "f16", "bf16", "q8_0"):
        raise BillhookError(f"There is no GGUF number format {kind!r}: use f32, f16, bf16 or q8_0.")
    if out.is_dir():
        raise BillhookError(f"{out} is a folder: name the .gguf file to write.")
    if out.exists() and not force:
        raise BillhookError(f"{out} exists: choose another --out, or overwrite it with --force.")
    if verify and importlib.util.find_spec("xllamacpp") is None:
        raise BillhookError(
            "Trying the file in llama.cpp needs the package xllamacpp: install it with pip install 'billhook[gguf]'."
        )
    model, _ = load(folder, stream=True)
    source = source_of(model)
    family = _family(model, folder)
    if not isinstance(source, Streamed):
        raise BillhookError(f"The weights in {folder} have other names than the model's: save the model again first.")
    layers, left_out = _layers(model, folder, family)
    vocabulary = _vocabulary(folder, model)
    architecture = _architecture(family, layers, folder)
    entries = list(_entries(model, source, family, layers, kind))
    notes = _notes(model, layers, left_out, entries, kind)

    part = out.with_name(out.name + ".partial")
    try:
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _write(part, architecture, model, folder, layers, vocabulary, entries, kind)
        check = _verify(part, folder, model, vocabulary, entries, kind) if verify else None
        with _writing(out):
            size = part.stat().st_size
            os.replace(part, out)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong matters more
            part.unlink(missing_ok=True)
        raise
    return GGUFReport(out, architecture, kind, len(layers), len(entries), size, check, notes)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        with room(out.parent, "export again"):
            yield
    except OSError as error:
        raise BillhookError(f"{out} cannot be written ({error.strerror or error}): choose another --out.") from None


# -- what is in the model ---------------------------------------------------------------------------------


def _family(model: Any, folder: Path) -> _Family:
    name = (stock_class(type(model)) if is_slim(model) else type(model)).__name__
    if name not in _FAMILIES:
        *others, last = _FAMILIES
        raise BillhookError(f"{folder} is a {name}; GGUF export knows {', '.join(others)} and {last}: {_ALTERNATIVE}.")
    activation = getattr(model.config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BillhookError(
            f"{folder} uses the activation {activation!r}; llama.cpp knows only silu for a {name}: {_ALTERNATIVE}."
        )
    return _FAMILIES[name]


def _architecture(family: _Family, layers: list[_Layer], folder: Path) -> str:
    """llama.cpp's name for the family with these widths."""
    odd = next((layer for layer in layers if _widths(layer) != _widths(layers[0]) or not all(_widths(layer))), None)
    if odd is None:
        return family.architecture
    if family.per_layer is None:
        raise BillhookError(
            f"In {folder}, layer {odd.block} has other widths than layer {layers[0].block} or lacks a part, which "
            f"llama.cpp can read of Llama and Mistral models alone: prune with --uniform, or {_ALTERNATIVE}."
        )
    return family.per_layer


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _widths(layer: _Layer) -> tuple[int, int, int]:
    return layer.heads, layer.kv_heads, layer.neurons


def _layers(model: Any, folder: Path, family: _Family) -> tuple[list[_Layer], list[int]]:
    """The layers of the file, and the blocks that are empty and left out of it."""
    config = model.config
    if not is_slim(model):
        heads, width = int(config.num_attention_heads), int(config.intermediate_size)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return [_Layer(i, heads, kv_heads, width) for i in range(config.num_hidden_layers)], []
    slim = config.slim
    layers: list[_Layer] = []
    left_out: list[int] = []
    for index, dims in enumerate(slim["layers"]):
        attention, mlp = dims["attention"], dims["mlp"]
        _refuse_layer(folder, index, dims, slim["hidden"], slim["rotary_dim"], family)
        if not attention and not mlp:
            left_out.append(index)
            continue
        filler = 0 if layers else 1
        heads, kv_heads = (attention["heads"], attention["kv_heads"]) if attention else (filler, filler)
        neurons = mlp["width"] if mlp else _FILLER
        values = attention["v"] if attention and attention["v"] < slim["rotary_dim"] else None
        layers.append(_Layer(index, heads, kv_heads, neurons, not attention, not mlp, values))
    if slim["fused_final"]:
        raise _cannot(folder, "the final norm", "has its scale multiplied into the head")
    if not layers:
        raise BillhookError(f"No layer of {folder} has attention or an MLP: there is nothing to export.")
    return layers, left_out


def _refuse_layer(folder: Path, index: int, dims: dict[str, Any], hidden: int, head: int, family: _Family) -> None:
    where, attention = f"layer {index}", dims["attention"]
    if any(dims["adapters"]):
        raise _cannot(folder, where, "has a matrix in its residual connection (a residual adapter)")
    if set(dims["stream"]) != {hidden}:
        raise _cannot(folder, where, f"has a residual stream of width {min(dims['stream'])} instead of {hidden}")
    if reads_or_writes_some(dims):
        raise _cannot(folder, where, "reads or writes only some channels of the residual stream")
    if dims["fused"]:
        raise _cannot(folder, where, "has the scales of its norms multiplied into its weights (fused norms)")
    if not attention:
        return
    if attention["pairs"]:
        raise _cannot(folder, where, "has rotary pairs removed from its queries and keys")
    if attention["kv_of_head"]:
        raise _cannot(folder, where, "has key/value heads that unequal numbers of query heads read")
    if attention["norms"] and not family.norms:
        raise _cannot(folder, where, "normalises its queries and keys")
    if attention["qk"] != head:
        raise _cannot(folder, where, f"has {attention['qk']} query/key channels per head, of which {head} rotate")
    if attention["v"] > head:
        raise _cannot(folder, where, f"has {attention['v']} value channels per head but {head} query/key channels")


def _cannot(folder: Path, where: str, what: str) -> BillhookError:
    return BillhookError(f"In {folder}, {where} {what}, which GGUF cannot express: {_ALTERNATIVE}.")


def _notes(model: Any, layers: list[_Layer], left_out: list[int], entries: list[_Entry], kind: str) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"Layers without attention and MLP are left out of the file: {_numbers(left_out)}.")
    if layers[0].empty_attention:
        notes.append(f"Layer {layers[0].block}, the first, has an attention of one zero head in the file.")
    filled = [layer.block for layer in layers if layer.empty_mlp]
    if filled:
        notes.append(f"Layers without MLP have an MLP of {_FILLER} zero neurons in the file: {_numbers(filled)}.")
    padded = [layer.block for layer in layers if layer.values is not None]
    if padded:
        # Tried: llama.cpp's `llama` and `deci` both stop where value_length is not key_length.
        notes.append(
            "llama.cpp wants as many value channels per head as key channels: those that were removed are zeros in "
            f"the file, in {len(padded)} layer(s)."
        )
    wide = [e for e in entries if kind == "q8_0" and e.kind == "f16"]
    if wide:
        others = f" and {len(wide) - 1} more" if len(wide) > 1 else ""
        notes.append(
            f"q8_0 needs rows that are multiples of {_BLOCK}; {wide[0].source}{others} (rows of {wide[0].shape[1]}) "
            "stay f16."
        )
    window = _window(model.config)
    if window:
        notes.append(f"llama.cpp attends to all tokens, so the context is limited to the sliding window of {window}.")
    return notes


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _window(config: Any) -> int | None:
    """The sliding window where it is shorter than the context."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window and window < config.max_position_embeddings else None


# -- tensors ----------------------------------------------------------------------------------------------


def _entries(model: Any, source: Streamed, family: _Family, layers: list[_Layer], kind: str) -> Iterator[_Entry]:
    """The tensors of the file, in its order."""
    refs = source.refs
    config = model.config
    size, hidden = _head_size(config), int(config.hidden_size)

    def entry(name: str, parameter: str, heads: int = 0, pad: tuple[int, int] | None = None) -> _Entry:
        ref = refs[parameter]
        if pad is None:
            return _Entry(name, ref.shape, _kind(ref.shape, kind), lambda: _read(ref, heads), parameter)
        axis = 1 if name.endswith("attn_output.weight") else 0
        shape = tuple(pad[0] * size if i == axis else n for i, n in enumerate(ref.shape))
        return _Entry(name, shape, _kind(shape, kind), lambda: _padded(_read(ref, 0), axis, *pad, size), parameter)

    def zeros(name: str, shape: tuple[int, ...]) -> _Entry:
        return _Entry(name, shape, _kind(shape, kind), lambda: torch.zeros(shape), "zeros for a part that is absent")

    yield entry("token_embd.weight", "model.embed_tokens.weight")
    factors = _rotary_factors(model, size)
    if factors is not None:
        if not family.pairs:  # tried: those of Qwen are not asked for
            raise BillhookError(
                f"Scaled rotary embeddings cannot be expressed for a {family.architecture} model in GGUF, in any "
                f"layer: {_ALTERNATIVE}."
            )
        yield _Entry("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors, "the rotary frequencies")
    for number, layer in enumerate(layers):
        own, stock = f"blk.{number}", f"model.layers.{layer.block}"
        if layer.heads:
            yield entry(f"{own}.attn_norm.weight", f"{stock}.input_layernorm.weight")
            rows, keys = layer.heads * size, layer.kv_heads * size
            for name, path, heads, shape in (
                ("attn_q", "q_proj", layer.heads, (rows, hidden)),
                ("attn_k", "k_proj", layer.kv_heads, (keys, hidden)),
                ("attn_v", "v_proj", 0, (keys, hidden)),
                ("attn_output", "o_proj", 0, (hidden, rows)),
            ):
                if layer.empty_attention:
                    yield zeros(f"{own}.{name}.weight", shape)
                    continue
                pad = None
                if layer.values is not None and path in ("v_proj", "o_proj"):
                    pad = (layer.kv_heads if path == "v_proj" else layer.heads, layer.values)
                for leaf in ("weight", "bias"):
                    if f"{stock}.self_attn.{path}.{leaf}" in refs:
                        inner = None if (path, leaf) == ("o_proj", "bias") else pad
                        turned = heads if family.pairs else 0
                        yield entry(f"{own}.{name}.{leaf}", f"{stock}.self_attn.{path}.{leaf}", turned, inner)
            for name, path in (("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")) if family.norms else ():
                yield entry(f"{own}.{name}.weight", f"{stock}.self_attn.{path}.weight")
        yield entry(f"{own}.ffn_norm.weight", f"{stock}.post_attention_layernorm.weight")
        for name, path in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
            if layer.empty_mlp:
                narrow = (layer.neurons, hidden)
                yield zeros(f"{own}.{name}.weight", narrow[::-1] if name == "ffn_down" else narrow)
                continue
            for leaf in ("weight", "bias"):
                if f"{stock}.mlp.{path}.{leaf}" in refs:
                    yield entry(f"{own}.{name}.{leaf}", f"{stock}.mlp.{path}.{leaf}")
    yield entry("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield entry("output.weight", "lm_head.weight")


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """The type that a tensor of this shape has in a file of this kind."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


def _read(ref: Stored | Packed, heads: int) -> Tensor:
    """A tensor in float32; with `heads`, rows of each go from halves (all first channels, all second ones) to pairs."""
    tensor = ref.read().float()
    if not heads:
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _padded(tensor: Tensor, axis: int, heads: int, width: int, size: int) -> Tensor:
    """A tensor with `heads` times `width` channels along `axis`, each head filled up with zeros to `size`."""
    shape = list(tensor.shape)
    split = tensor.view(*shape[:axis], heads, width, *shape[axis + 1 :])
    result = split.new_zeros(*shape[:axis], heads, size, *shape[axis + 1 :])
    result.narrow(axis + 1, 0, width).copy_(split)
    return result.reshape(*shape[:axis], heads * size, *shape[axis + 1 :])


def _rotary_factors(model: Any, size: int) -> Tensor | None:
    """By what llama.cpp divides the frequencies of its plain rotary embedding; None where nothing is scaled.

    Raises:
        BillhookError: the scaling is not one of fixed frequencies.
    """
    rotary = model.model.rotary_emb
    kind = model.config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3") or rotary.attention_scaling != 1.0:
        raise BillhookError(
            f"Rotary embeddings of type {kind!r} cannot be expressed by this GGUF export, in any layer: {_ALTERNATIVE}."
        )
    channels = torch.arange(0, size, 2, dtype=torch.float64) / size
    plain = float(model.config.rope_parameters["rope_theta"]) ** -channels
    factors: Tensor = (plain / rotary.inv_freq.double()).float()
    return factors


def _encoded(entry: _Entry) -> np.ndarray[Any, Any]:
    """The tensor as its bytes in the file."""
    from gguf import GGMLQuantizationType, quants

    array = entry.make().contiguous().numpy()
    if entry.kind == "f16":
        with np.errstate(over="ignore"):
            result: np.ndarray[Any, Any] = array.astype(np.float16)
        if not np.isfinite(result).all():
            what = "too large for f16: use --quantize bf16 or f32" if np.isfinite(array).all() else "not finite"
            raise BillhookError(f"{entry.source} holds numbers that are {what}.")
        return result
    result = quants.quantize(array, GGMLQuantizationType[entry.kind.upper()])
    return np.ascontiguousarray(result)


# -- the file ---------------------------------------------------------------------------------------------


def _write(
    path: Path,
    architecture: str,
    model: Any,
    folder: Path,
    layers: list[_Layer],
    vocabulary: _Vocabulary,
    entries: list[_Entry],
    kind: str,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        _metadata(writer, architecture, model.config, folder, layers, kind)
        _tokenizer_metadata(writer, vocabulary)
        for entry in entries:
            type_ = gguf.GGMLQuantizationType[entry.kind.upper()]
            block, nbytes = gguf.GGML_QUANT_SIZES[type_]
            # The shape is in numbers for every type but those of bytes, so no dtype of numpy is stated.
            writer.add_tensor_info(
                entry.name, entry.shape, np.dtype(np.float32), math.prod(entry.shape) // block * nbytes, type_
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_encoded(entry))
        for stream in writer.fout:
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()


def _metadata(writer: Any, architecture: str, config: Any, folder: Path, layers: list[_Layer], kind: str) -> None:
    import gguf

    size = _head_size(config)
    per_layer = [
        [layer.heads for layer in layers],
        [layer.kv_heads for layer in layers],
        [layer.neurons for layer in layers],
    ]
    heads, kv_heads, neurons = per_layer if architecture == "deci" else [values[0] for values in per_layer]
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_block_count(len(layers))
    writer.add_context_length(_window(config) or int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[names[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tokenizer_metadata(writer: Any, vocabulary: _Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, identity in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(identity)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


# -- the tokenizer ----------------------------------------------------------------------------------------


def _vocabulary(folder: Path, model: Any) -> _Vocabulary:
    """The tokenizer of a folder in the terms of llama.cpp.

    Raises:
        BillhookError: there is none, or it is not a byte-level BPE tokenizer that llama.cpp knows.
    """
    from gguf import TokenType

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BillhookError(f"{folder} has no tokenizer.json, from which GGUF's tokenizer is made: add it.")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        bpe = spec["model"]
        kind, vocab, added = bpe.get("type", "BPE"), bpe["vocab"], spec.get("added_tokens") or []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BillhookError(f"{path} is damaged: fetch the model again.") from None
    if kind != "BPE":
        raise _unknown_tokenizer(path, f"is of type {kind}")
    if bpe.get("byte_fallback"):
        raise _unknown_tokenizer(path, "is a SentencePiece one (BPE of characters with byte fallback)")
    pre = _pre_tokenizer(spec, path)

    rows = int(model.config.vocab_size)
    tokens = [f"[UNUSED{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    special = {token["content"]: token["id"] for token in added}
    largest = max([*vocab.values(), *special.values()])
    if largest >= rows:
        raise BillhookError(
            f"{path} has token {largest}, but the model only {rows} embeddings: use the right tokenizer."
        )
    for text, identity in vocab.items():
        tokens[identity], types[identity] = text, int(TokenType.NORMAL)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    settings = _json(folder / "tokenizer_config.json")
    ids = _special_ids(settings, {**vocab, **special}, model)
    if "eos" not in ids:
        raise BillhookError(f"{folder} names no end-of-text token, which GGUF needs: add eos_token_id to config.json.")
    add_bos, add_eos = _added_ends(path, settings, ids)
    return _Vocabulary(pre, tokens, types, merges, ids, add_bos, add_eos, _template(folder, settings))


def _unknown_tokenizer(path: Path, what: str) -> BillhookError:
    return BillhookError(
        f"The tokenizer {path} {what}; GGUF export converts byte-level BPE tokenizers in the manner of GPT-2, SmolLM, "
        f"Llama 3, Qwen 2 and Mistral Nemo: {_ALTERNATIVE}."
    )


def _pre_tokenizer(spec: dict[str, Any], path: Path) -> str:
    normalizer = spec.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":  # llama.cpp does without NFC, which most text already has
        raise _unknown_tokenizer(path, f"changes the text before splitting it ({normalizer.get('type')})")
    top = spec.get("pre_tokenizer") or {}
    steps = top.get("pretokenizers", []) if top.get("type") == "Sequence" else [top]
    signs: list[str] = []
    bytes_seen = False
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space") and not bytes_seen:
            bytes_seen = True
            if step.get("use_regex", True):
                signs.append(_GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            signs.append(_DIGITS)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            signs.append(step.get("pattern", {}).get("Regex", ""))
        else:
            signs.append(str(kind))
    name = _PRE_TOKENIZERS.get((tuple(signs), bool(spec["model"].get("ignore_merges"))))
    if not bytes_seen or name is None:
        raise _unknown_tokenizer(path, "splits text by rules that have no name in llama.cpp")
    return name


def _special_ids(settings: dict[str, Any], vocab: dict[str, int], model: Any) -> dict[str, int]:
    """bos, eos, unk, pad -> token, from the tokenizer's settings or else the model's."""
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        identity = vocab.get(text) if text is not None else None
        if identity is None and name != "unk":
            identity = getattr(model.config, f"{name}_token_id", None)
            identity = identity[0] if isinstance(identity, list) and identity else identity
        if isinstance(identity, int) and 0 <= identity < model.config.vocab_size:
            ids[name] = identity
    return ids


def _added_ends(path: Path, settings: dict[str, Any], ids: dict[str, int]) -> tuple[bool, bool]:
    """Whether encoding puts the bos token before a text and the eos token behind it."""
    tokenizer = _tokenizer(path)
    bare, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    add_bos = whole[: len(whole) - len(bare)] == [ids.get("bos")] or whole[:1] == [ids.get("bos")] != bare[:1]
    add_eos = whole[-1:] == [ids.get("eos")] != bare[-1:]
    if whole != [ids.get("bos")] * add_bos + bare + [ids.get("eos")] * add_eos:
        raise _unknown_tokenizer(path, "adds tokens other than bos and eos to every text")
    return bool(settings.get("add_bos_token", add_bos)), bool(settings.get("add_eos_token", add_eos))


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise BillhookError(f"{path} cannot be loaded ({error}): fetch the model again.") from None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BillhookError(f"{path} is damaged: fetch the model again.") from None
    return result


# -- the trial --------------------------------------------------------------------------------------------


def _verify(path: Path, folder: Path, model: Any, vocabulary: _Vocabulary, entries: list[_Entry], kind: str) -> Check:
    """Run the file in llama.cpp and compare it with the PyTorch model, token by token.

    Raises:
        BillhookError: llama.cpp refuses the file, splits text otherwise, or generates other tokens.
    """
    tokenizer = _tokenizer(folder / "tokenizer.json")
    context = min(512, _window(model.config) or int(model.config.max_position_embeddings))
    texts = list(_TEXTS)
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content:
            texts.append(f"one{token.content}two")
    expected = [_encode(tokenizer, vocabulary, text) for text in texts]
    prompts = [_encode(tokenizer, vocabulary, text) for text in _PROMPTS]
    prompts = [prompt for prompt in prompts if prompt and len(prompt) + _LENGTH < context]
    if not prompts:
        raise BillhookError(f"A context of {context} tokens is too short to try the file: export it with verify=False.")
    request = {
        "model": str(path),
        "context": context,
        "threads": torch.get_num_threads(),
        "texts": texts,
        "prompts": prompts,
        "length": _LENGTH,
    }
    response = _llamacpp(request, folder)
    for text, ours, theirs in zip(texts, expected, response["tokens"], strict=True):
        if ours != theirs:
            raise BillhookError(
                f"llama.cpp splits {text!r} into other tokens than the tokenizer of {folder} (it took the rules of "
                f"{vocabulary.pre!r}), so GGUF export cannot convert this tokenizer: {_ALTERNATIVE}."
            )
    ends = {i for i, t in enumerate(vocabulary.types) if t == 3} | {vocabulary.ids["eos"]}
    return _compare(path, folder, tokenizer, prompts, response["answers"], ends, entries, kind)


def _encode(tokenizer: Any, vocabulary: _Vocabulary, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return (
        [vocabulary.ids["bos"]] * (vocabulary.add_bos and "bos" in vocabulary.ids)
        + ids
        + [vocabulary.ids["eos"]] * vocabulary.add_eos
    )


def _llamacpp(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("llamacpp_run.py")
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work) / "request.json", Path(work) / "response.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, str(script), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answered.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            log.debug("%s", done.stderr)
            telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
            # Its log lines start with the time and a letter for the level.
            reason = re.sub(r"^[\d.]+ [A-Z] ", "", telling[0])[:300] if telling else f"it ended with {done.returncode}"
            raise BillhookError(f"llama.cpp does not run the file made from {folder} ({reason}): {_ALTERNATIVE}.")
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return result


def _compare(
    path: Path,
    folder: Path,
    tokenizer: Any,
    prompts: list[list[int]],
    answers: list[dict[str, Any]],
    ends: set[int],
    entries: list[_Entry],
    kind: str,
) -> Check:
    model, _ = load(folder, dtype=torch.float32)
    _round(model, kind)
    agreeing = ties = total = 0
    difference: float | None = None
    for prompt, answer in zip(prompts, answers, strict=True):
        written = [t for t in answer["tokens"] if t >= 0]
        logprobs = _logprobs(model, prompt, written)
        tie = _tie(model, prompt, written, logprobs, kind)
        for place, token in enumerate(written):
            own = logprobs[place]
            short = float(own.max() - own[token])
            total += 1
            agreeing += short == 0
            ties += 0 < short <= tie < math.inf
            if len(answer["logprobs"]) == len(written):  # it gives none for tokens that end amid a character
                difference = max(difference or 0.0, abs(float(own[token]) - answer["logprobs"][place]))
            if short > tie and place < _CHECKED:
                raise _disagreement(path, folder, tokenizer, prompt, written[:place], token, own, entries)
        ended = answer["stop"] == "eos" and not (written and written[-1] in ends)
        if ended and len(written) < _CHECKED:
            own = logprobs[len(written)]
            best = max(ends, key=lambda token: float(own[token]))
            if float(own.max() - own[best]) > tie:
                raise _disagreement(path, folder, tokenizer, prompt, written, best, own, entries)
    text = tokenizer.decode(prompts[0] + [t for t in answers[0]["tokens"] if t >= 0], skip_special_tokens=False)
    return Check(total, agreeing / total if total else None, ties, difference, text)


def _logprobs(model: nn.Module, prompt: list[int], written: list[int]) -> Tensor:
    """Of every token at the places of `written` and the one behind it."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt + written])).logits
    return logits[0, len(prompt) - 1 :].log_softmax(-1)


def _tie(model: nn.Module, prompt: list[int], written: list[int], logprobs: Tensor, kind: str) -> float:
    """By how much a token may fall short of the best one and still count as equally good."""
    if kind not in _TIE:
        return math.inf
    dtype = _ROUNDED.get(kind)
    if dtype is None:
        return _TIE[kind]

    def rounded(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].to(dtype).to(inputs[0].dtype), *inputs[1:])

    hooks = [m.register_forward_pre_hook(rounded) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        change = (_logprobs(model, prompt, written) - logprobs).abs()
    finally:
        for hook in hooks:
            hook.remove()
    likely = logprobs.topk(min(4, logprobs.shape[-1])).indices
    noise = float(change.gather(-1, likely).max())
    return min(_TIE[kind] + _NOISE * noise, _LARGEST_TIE)


def _round(model: nn.Module, kind: str) -> None:
    """Give the matrices the precision that they have in the file, so that only other differences are left."""
    if kind in _ROUNDED:
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data.copy_(parameter.data.to(_ROUNDED[kind]))


def _disagreement(
    path: Path,
    folder: Path,
    tokenizer: Any,
    prompt: list[int],
    written: list[int],
    token: int,
    logprobs: Tensor,
    entries: list[_Entry],
) -> BillhookError:
    before = tokenizer.decode(prompt + written, skip_special_tokens=False)
    own = int(logprobs.argmax())
    theirs, ours = (f"{tokenizer.decode([t], skip_special_tokens=False)!r} (token {t})" for t in (token, own))
    wrong = first_difference(path, entries)
    where = (
        f"the first tensor that was written wrongly is {wrong}"
        if wrong
        else "all tensors in the file are those of the folder, so llama.cpp computes something else with them"
    )
    return BillhookError(
        f"llama.cpp continues {before!r} with {theirs}, the model in {folder} with {ours}; {where}. The file was "
        f"not kept: {_ALTERNATIVE}, and report this."
    )


def first_difference(path: Path, entries: list[_Entry]) -> str | None:
    """The first tensor of a file that is not the source's, up to the rounding of its type; None where all are."""
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for entry in entries:
        if entry.name not in stored:
            return f"{entry.name} ({entry.source}), which is missing"
        tensor = stored[entry.name]
        read = torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        wanted = entry.make()
        bound = {"f32": 0.0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 2**-7}[entry.kind] * wanted.abs().max()
        if read.shape != wanted.shape or float((read - wanted).abs().max()) > float(bound):
            return f"{entry.name} ({entry.source})"
    return None
