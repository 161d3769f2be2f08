"""What a GGUF file holds of a model: the families that llama.cpp has, their layers, and their tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.models.checkpoint import Packed
from billhook.models.files import Stored
from billhook.models.source import Streamed
from billhook.surgery.slim import is_slim, reads_or_writes_some, stock_class

ALTERNATIVE = "keep the Hugging Face folder (--format hf) or use --format onnx"
FILLER = 32  # neurons of an MLP of zeros: a whole block of every number format
BLOCK = 32  # weights that share a scale in q8_0


@dataclass(frozen=True)
class Family:
    """How llama.cpp has a family.

    Attributes:
        architecture: its name for the family, with one width for all layers.
        per_layer: its name for the family with widths per layer; None where it has none.
        pairs: whether rotary embeddings turn neighbouring channels there, rather than one of each half of a head.
        norms: whether queries and keys are normalised.
        activation: what it computes in the MLP.
        plus_one: whether the weights of norms are kept without the 1 that is added to them.
        sandwich: whether what attention and MLP give back is normalised too.
        period: one layer in so many sees all tokens, the others a sliding window; None where all are alike.
    """

    architecture: str
    per_layer: str | None = None
    pairs: bool = False
    norms: bool = False
    activation: str = "silu"
    plus_one: bool = False
    sandwich: bool = False
    period: int | None = None

    @property
    def further_norms(self) -> dict[str, str]:
        """llama.cpp's name -> ours of a layer's norms behind the first."""
        if not self.sandwich:
            return {"ffn_norm": "post_attention_layernorm"}
        return {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }


_GEMMA = Family("gemma", activation="gelu_pytorch_tanh", plus_one=True)
_FAMILIES = {
    "LlamaForCausalLM": Family("llama", "deci", pairs=True),
    "MistralForCausalLM": Family("llama", "deci", pairs=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3", norms=True),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": replace(_GEMMA, architecture="gemma2", sandwich=True, period=2),
    "Gemma3ForCausalLM": replace(_GEMMA, architecture="gemma3", sandwich=True, period=6, norms=True),
}


@dataclass(frozen=True)
class Layer:
    """A layer of the file: the block that it is, its widths in the file, and which parts of it are zeros."""

    block: int
    heads: int
    kv_heads: int
    neurons: int
    empty_attention: bool = False
    empty_mlp: bool = False
    values: int | None = None  # value channels per head, where they are fewer than the file has


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, its shape, its type, how to make it, and the parameter that it holds."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Tensor]
    source: str


def family_of(model: Any, folder: Path) -> Family:
    """How llama.cpp has a model's family.

    Raises:
        BillhookError: it does not have it, or computes something else in it than the model does.
    """
    name = (stock_class(type(model)) if is_slim(model) else type(model)).__name__
    if name not in _FAMILIES:
        *others, last = _FAMILIES
        raise BillhookError(f"{folder} is a {name}; GGUF export knows {', '.join(others)} and {last}: {ALTERNATIVE}.")
    family, config = _FAMILIES[name], model.config
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation))
    if activation.replace("swish", "silu") != family.activation:
        raise BillhookError(
            f"{folder} uses the activation {activation!r}; llama.cpp knows only {family.activation} for a {name}: "
            f"{ALTERNATIVE}."
        )
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale not in (None, head_size(config)):  # tried: llama.cpp takes the width of a head, whatever a file says
        raise BillhookError(
            f"{folder} scales its attention by {scale} instead of the width of its heads, {head_size(config)}, which "
            f"llama.cpp does not: {ALTERNATIVE}."
        )
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, cap, None)
        if bool(value) != (family.architecture == "gemma2") and (family.architecture, cap[:5]) != ("gemma3", "final"):
            raise BillhookError(
                f"{folder} has {cap}={value}; llama.cpp always bounds these values in a Gemma 2, and attention's in no "
                f"other model: {ALTERNATIVE}."
            )
    return family


def architecture_of(family: Family, layers: list[Layer], folder: Path) -> str:
    """llama.cpp's name for the family with these widths."""
    odd = next((layer for layer in layers if _widths(layer) != _widths(layers[0]) or not all(_widths(layer))), None)
    if odd is None:
        return family.architecture
    if family.per_layer is None:
        raise BillhookError(
            f"In {folder}, layer {odd.block} has other widths than layer {layers[0].block} or lacks a part, which "
            f"llama.cpp can read of Llama and Mistral models alone: prune with --uniform, or {ALTERNATIVE}."
        )
    return family.per_layer


def refuse_order(family: Family, layers: list[Layer], config: Any, folder: Path) -> None:
    """Refuse layers whose kind of attention is not the one that llama.cpp gives them by their place.

    Raises:
        BillhookError: names the first of them.
    """
    if family.period is None:
        return
    for place, layer in enumerate(layers):
        wanted = "full_attention" if (place + 1) % family.period == 0 else "sliding_attention"
        found = config.layer_types[layer.block]
        if found != wanted:
            raise BillhookError(
                f"In {folder}, layer {layer.block} has {found.replace('_', ' ')}; as layer {place} of the file it "
                f"would get {wanted.replace('_', ' ')} in llama.cpp: keep all layers, or {ALTERNATIVE}."
            )


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _widths(layer: Layer) -> tuple[int, int, int]:
    return layer.heads, layer.kv_heads, layer.neurons


def layers_of(model: Any, folder: Path, family: Family) -> tuple[list[Layer], list[int]]:
    """The layers of the file, and the blocks that are empty and left out of it."""
    config = model.config
    if not is_slim(model):
        heads, width = int(config.num_attention_heads), int(config.intermediate_size)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return [Layer(i, heads, kv_heads, width) for i in range(config.num_hidden_layers)], []
    slim = config.slim
    layers: list[Layer] = []
    left_out: list[int] = []
    for index, dims in enumerate(slim["layers"]):
        attention, mlp = dims["attention"], dims["mlp"]
        _refuse_layer(folder, index, dims, slim["hidden"], slim["rotary_dim"], family)
        if not attention and not mlp:
            left_out.append(index)
            continue
        filler = 0 if layers else 1
        heads, kv_heads = (attention["heads"], attention["kv_heads"]) if attention else (filler, filler)
        neurons = mlp["width"] if mlp else FILLER
        values = attention["v"] if attention and attention["v"] < slim["rotary_dim"] else None
        layers.append(Layer(index, heads, kv_heads, neurons, not attention, not mlp, values))
    if slim["fused_final"]:
        raise _cannot(folder, "the final norm", "has its scale multiplied into the head")
    if not layers:
        raise BillhookError(f"No layer of {folder} has attention or an MLP: there is nothing to export.")
    return layers, left_out


def _refuse_layer(folder: Path, index: int, dims: dict[str, Any], hidden: int, head: int, family: Family) -> None:
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
    return BillhookError(f"In {folder}, {where} {what}, which GGUF cannot express: {ALTERNATIVE}.")


def window_of(config: Any, family: Family) -> int | None:
    """The sliding window where it is shorter than the context and llama.cpp does not know of it."""
    if family.period:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window and window < config.max_position_embeddings else None


def entries_of(model: Any, source: Streamed, family: Family, layers: list[Layer], kind: str) -> Iterator[Entry]:
    """The tensors of the file, in its order."""
    refs = source.refs
    config = model.config
    size, hidden = head_size(config), int(config.hidden_size)

    def entry(name: str, parameter: str, heads: int = 0, pad: tuple[int, int] | None = None) -> Entry:
        ref = refs[parameter]
        if pad is None:
            return Entry(name, ref.shape, _kind(ref.shape, kind), lambda: _read(ref, heads), parameter)
        axis = 1 if name.endswith("attn_output.weight") else 0
        shape = tuple(pad[0] * size if i == axis else n for i, n in enumerate(ref.shape))
        return Entry(name, shape, _kind(shape, kind), lambda: _padded(_read(ref, 0), axis, *pad, size), parameter)

    def norm(name: str, parameter: str) -> Entry:
        ref = refs[parameter]
        return Entry(name, ref.shape, "f32", lambda: ref.read().float() + family.plus_one, parameter)

    def zeros(name: str, shape: tuple[int, ...]) -> Entry:
        return Entry(name, shape, _kind(shape, kind), lambda: torch.zeros(shape), "zeros for a part that is absent")

    yield entry("token_embd.weight", "model.embed_tokens.weight")
    factors = _rotary_factors(model, size)
    if factors is not None:
        if not family.pairs:  # tried: those of Qwen are not asked for
            raise BillhookError(
                f"Scaled rotary embeddings cannot be expressed for a {family.architecture} model in GGUF, in any "
                f"layer: {ALTERNATIVE}."
            )
        yield Entry("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors, "the rotary frequencies")
    for number, layer in enumerate(layers):
        own, stock = f"blk.{number}", f"model.layers.{layer.block}"
        if layer.heads:
            yield norm(f"{own}.attn_norm.weight", f"{stock}.input_layernorm.weight")
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
                yield norm(f"{own}.{name}.weight", f"{stock}.self_attn.{path}.weight")
        for name, path in family.further_norms.items():
            yield norm(f"{own}.{name}.weight", f"{stock}.{path}.weight")
        for name, path in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
            if layer.empty_mlp:
                narrow = (layer.neurons, hidden)
                yield zeros(f"{own}.{name}.weight", narrow[::-1] if name == "ffn_down" else narrow)
                continue
            for leaf in ("weight", "bias"):
                if f"{stock}.mlp.{path}.{leaf}" in refs:
                    yield entry(f"{own}.{name}.{leaf}", f"{stock}.mlp.{path}.{leaf}")
    yield norm("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield entry("output.weight", "lm_head.weight")


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """The type that a tensor of this shape has in a file of this kind."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind


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


def rotary_bases(config: Any) -> dict[str, float]:
    """The base of the rotary frequencies: "" -> in all layers; or in those that see all tokens, "_swa" -> in others."""
    settings = config.rope_parameters
    if "rope_theta" in settings:
        return {"": float(settings["rope_theta"])}
    kinds = {"": "full_attention", "_swa": "sliding_attention"}
    return {turn: float(settings[kind]["rope_theta"]) for turn, kind in kinds.items()}


def _rotary_factors(model: Any, size: int) -> Tensor | None:
    """By what llama.cpp divides the frequencies of its plain rotary embedding; None where nothing is scaled.

    Raises:
        BillhookError: the scaling is not one of fixed frequencies.
    """
    rotary, settings = model.model.rotary_emb, model.config.rope_parameters
    kinds = {part.get("rope_type", "default") for part in settings.values() if isinstance(part, dict)}
    kind = settings.get("rope_type", next((kind for kind in sorted(kinds) if kind != "default"), "default"))
    if kind == "default":
        return None
    if kinds or kind not in ("linear", "llama3") or rotary.attention_scaling != 1.0:
        raise BillhookError(
            f"Rotary embeddings of type {kind!r} cannot be expressed by this GGUF export, in any layer: {ALTERNATIVE}."
        )
    channels = torch.arange(0, size, 2, dtype=torch.float64) / size
    plain = float(model.config.rope_parameters["rope_theta"]) ** -channels
    factors: Tensor = (plain / rotary.inv_freq.double()).float()
    return factors


def encoded(entry: Entry) -> np.ndarray[Any, Any]:
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
