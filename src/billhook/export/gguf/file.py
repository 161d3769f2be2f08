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
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from billhook.errors import BillhookError
from billhook.export.gguf.tensors import (
    BLOCK,
    FILLER,
    Entry,
    Family,
    Layer,
    architecture_of,
    encoded,
    entries_of,
    family_of,
    head_size,
    layers_of,
    refuse_order,
    rotary_bases,
    window_of,
)
from billhook.export.gguf.tokenizer import Vocabulary, vocabulary_of, write_tokenizer
from billhook.export.gguf.trial import Check, try_file
from billhook.models.files import room
from billhook.models.load import load
from billhook.models.source import Streamed, source_of

Kind = Literal["f32", "f16", "bf16", "q8_0"]


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


def export_gguf(folder: Path, out: Path, *, kind: Kind = "f16", force: bool = False, verify: bool = True) -> GGUFReport:
    """Write the Llama, Mistral, Qwen or Gemma model in a Hugging Face folder as a GGUF file, and try it in llama.cpp.

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
    family = family_of(model, folder)
    if not isinstance(source, Streamed):
        raise BillhookError(f"The weights in {folder} have other names than the model's: save the model again first.")
    config: Any = model.config
    layers, left_out = layers_of(model, folder, family)
    vocabulary = vocabulary_of(folder, model)
    architecture = architecture_of(family, layers, folder)
    refuse_order(family, layers, config, folder)
    entries = list(entries_of(model, source, family, layers, kind))
    window = window_of(config, family)
    context = window or int(config.max_position_embeddings)
    notes = _notes(layers, left_out, entries, window, kind)

    part = out.with_name(out.name + ".partial")
    try:
        with _writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _write(part, architecture, family, model, folder, layers, vocabulary, entries, kind, context)
        check = try_file(part, folder, model, vocabulary, entries, kind, context) if verify else None
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


def _notes(layers: list[Layer], left_out: list[int], entries: list[Entry], window: int | None, kind: str) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"Layers without attention and MLP are left out of the file: {_numbers(left_out)}.")
    if layers[0].empty_attention:
        notes.append(f"Layer {layers[0].block}, the first, has an attention of one zero head in the file.")
    filled = [layer.block for layer in layers if layer.empty_mlp]
    if filled:
        notes.append(f"Layers without MLP have an MLP of {FILLER} zero neurons in the file: {_numbers(filled)}.")
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
            f"q8_0 needs rows that are multiples of {BLOCK}; {wide[0].source}{others} (rows of {wide[0].shape[1]}) "
            "stay f16."
        )
    if window:
        notes.append(f"llama.cpp attends to all tokens, so the context is limited to the sliding window of {window}.")
    return notes


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _write(
    path: Path,
    architecture: str,
    family: Family,
    model: Any,
    folder: Path,
    layers: list[Layer],
    vocabulary: Vocabulary,
    entries: list[Entry],
    kind: str,
    context: int,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        _metadata(writer, architecture, family, model.config, folder, layers, kind, context)
        write_tokenizer(writer, vocabulary)
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
            writer.write_tensor_data(encoded(entry))
        for stream in writer.fout:
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()


def _metadata(
    writer: Any,
    architecture: str,
    family: Family,
    config: Any,
    folder: Path,
    layers: list[Layer],
    kind: str,
    context: int,
) -> None:
    import gguf

    size = head_size(config)
    per_layer = [
        [layer.heads for layer in layers],
        [layer.kv_heads for layer in layers],
        [layer.neurons for layer in layers],
    ]
    heads, kv_heads, neurons = per_layer if architecture == "deci" else [values[0] for values in per_layer]
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_block_count(len(layers))
    writer.add_context_length(context)
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    for turn, theta in rotary_bases(config).items():
        getattr(writer, f"add_rope_freq_base{turn}")(theta)
    if family.period:
        writer.add_sliding_window(int(config.sliding_window))
    for cap in ("attn", "final"):
        value = getattr(config, f"{cap}_logit_softcapping", None)
        if value:
            getattr(writer, f"add_{cap}_logit_softcapping")(float(value))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[names[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
