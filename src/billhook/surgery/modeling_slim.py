"""Transformer blocks whose every width may differ from layer to layer.

This file needs only PyTorch and Transformers. A copy of it lies beside the weights of a model that no stock class
can express, so that the model loads with `from_pretrained(..., trust_remote_code=True)`. `config.slim` says what
each block holds; everything around the blocks (embedding, masks, rotary tables, cache, generation) is the stock
class's own.

A block's entry in `config.slim["layers"]`:

    {"attention": {"heads": 9, "kv_heads": 3, "qk": 64, "v": 64, "bias": [query, key, value, output],
                   "kv_of_head": [0, 0, 1, ...] where groups are unequal, "pairs": rotary pairs kept per key/value
                   head where some were removed, "norms": whether queries and keys are normalised,
                   "reads", "writes": channels of the stream that it reads (after the norm, which sees all of them)
                   and adds to, sorted, or null for all} or null,
     "mlp": {"width": 1536, "bias": [in, out], "reads", "writes": as above} or null,
     "stream": [width in, width between attention and MLP, width out],
     "adapters": [attention, MLP]: whether the residual connection is a matrix,
     "fused": whether the norms' scales and offsets were multiplied into the weights that read them}

Where channels of the stream were removed everywhere, `config.slim["narrowed"]` says what is narrower outside the
blocks: {"parameters": {full name: shape}, "norms": [paths]}; `config.slim["hidden"]` stays the width before.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NORMS = {
    "sequential": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm", "post_attention_layernorm"),
    "post": ("input_layernorm", "post_attention_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


class SlimNorm(nn.Module):
    """x / sqrt(sum(x^2) / divisor + eps): a norm without weights; the divisor is the width before slicing."""

    def __init__(self, divisor: int, eps: float) -> None:
        super().__init__()
        self.divisor = divisor
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.divisor + self.eps)
        return (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}, eps={self.eps}"


class NarrowNorm(nn.Module):
    """A norm of a stream that lost channels: it goes on counting them, as zeros.

    With `divisor` channels D before and k now, the mean of a LayerNorm is m = Σx / D and its variance
    (Σ(x − m)² + (D − k) m²) / D; the mean square of an RMSNorm is Σx² / D.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: Any, width: int, divisor: int, plus_one: bool) -> None:
        super().__init__()
        self.width = width
        self.divisor = divisor
        self.eps = _eps(norm)
        self.centred = bool(getattr(norm, "centred", isinstance(norm, nn.LayerNorm)))
        self.plus_one = plus_one  # scales are stored as their difference from one
        for name in ("weight", "bias"):
            own = getattr(norm, name, None)
            new = None if own is None else nn.Parameter(torch.zeros(width, device=own.device, dtype=own.dtype))
            self.register_parameter(name, new)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        if self.centred:
            mean = wide.sum(-1, keepdim=True) / self.divisor
            wide = wide - mean
            total = wide.square().sum(-1, keepdim=True) + (self.divisor - self.width) * mean.square()
        else:
            total = wide.square().sum(-1, keepdim=True)
        wide = wide * torch.rsqrt(total / self.divisor + self.eps)
        if self.weight is not None:
            wide = wide * (self.weight + 1 if self.plus_one else self.weight)
        if self.bias is not None:
            wide = wide + self.bias
        return wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, divisor={self.divisor}, eps={self.eps}"


class SlimPart(nn.Module):
    """Attention or MLP of a block: it may read only some channels of the stream, and add to only some."""

    def __init__(self, dims: dict[str, Any]) -> None:
        super().__init__()
        self.reads: list[int] | None = dims.get("reads")
        self.writes: list[int] | None = dims.get("writes")
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    def select(self, x: Tensor) -> Tensor:
        """The channels of the normalised stream that this part reads."""
        return x if self.reads is None else x.index_select(-1, self._index("reads", self.reads, x.device))

    def spread(self, y: Tensor, like: Tensor) -> Tensor:
        """What this part adds to the stream, with zeros in the channels that it leaves alone."""
        return y if self.writes is None else self.add(torch.zeros_like(like), y)

    def add(self, total: Tensor, y: Tensor) -> Tensor:
        """The stream after this part's output was added."""
        if self.writes is None:
            return total + y
        return total.index_add(-1, self._index("writes", self.writes, y.device), y.to(total.dtype))

    def _index(self, name: str, values: list[Any], device: torch.device) -> Tensor:
        if (name, device) not in self._indices:
            with torch.inference_mode(False):  # or it is of no use to a later pass with gradients
                self._indices[name, device] = torch.tensor(values, device=device)
        return self._indices[name, device]


class SlimAttention(SlimPart):
    """Attention with its own number of heads, of key/value heads, and of channels per head for keys and values."""

    def __init__(self, stock: Any, slim: dict[str, Any], dims: dict[str, Any], width: int, out: int) -> None:
        super().__init__(dims)
        self.config = stock.config
        self.layer_idx = getattr(stock, "layer_idx", None)
        self.scaling = stock.scaling  # of the width before pruning
        self.is_causal = stock.is_causal
        self.dropout_p = _probability(stock, "dropout_p", "attention_dropout", "attn_dropout", "dropout")
        self.softcap = getattr(stock, "softcap", getattr(stock, "attn_logit_softcapping", None))
        if hasattr(stock, "sliding_window"):
            self.sliding_window = stock.sliding_window
        else:
            self.sliding_window = getattr(stock.config, "sliding_window", None)
        self.heads, self.kv_heads = dims["heads"], dims["kv_heads"]
        self.qk, self.v = dims["qk"], dims["v"]
        self.kv_of_head = dims.get("kv_of_head")
        self.pairs = dims.get("pairs")
        self.rotary_dim = slim["rotary_dim"]  # channels that rotate, of the width before pruning
        self.num_key_value_groups = 1 if self.kv_of_head else self.heads // self.kv_heads

        bias = dims["bias"]
        width = width if self.reads is None else len(self.reads)
        out = out if self.writes is None else len(self.writes)
        self.q_proj = nn.Linear(width, self.heads * self.qk, bias=bias[0])
        self.k_proj = nn.Linear(width, self.kv_heads * self.qk, bias=bias[1])
        self.v_proj = nn.Linear(width, self.kv_heads * self.v, bias=bias[2])
        self.o_proj = nn.Linear(self.heads * self.v, out, bias=bias[3])
        if dims.get("norms"):
            self.q_norm = getattr(stock, slim["query_norm"])
            self.k_norm = getattr(stock, slim["key_norm"])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, self.heads, self.qk).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, self.kv_heads, self.qk).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, self.kv_heads, self.v).transpose(1, 2)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query, key = self._rotate(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.kv_of_head:
            index = self._index("kv", self.kv_of_head, key.device)
            key, value = key.index_select(1, index), value.index_select(1, index)
        attend = _attend
        if self.config._attn_implementation not in ("eager", None):
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        qk, v = self.attended(shape[1])
        if (qk, v) != (self.qk, self.v):
            query, key, value = _widened(query, qk), _widened(key, qk), _widened(value, v)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout_p if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            **kwargs,
        )
        return self.o_proj(output[..., : self.v].reshape(*shape, -1)), weights

    def attended(self, length: int) -> tuple[int, int]:
        """Channels per head of keys and of values in the two products over `length` new tokens.

        Fused kernels want one width; zeros that fill it up change neither the scores nor the channels that are there.
        """
        if self.config._attn_implementation in ("eager", None) or length == 1:
            return self.qk, self.v
        return (max(self.qk, self.v),) * 2

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self.pairs is None:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            return _rotary(query, cos, sin), _rotary(key, cos, sin)
        # [batch, tokens, rotated] -> [batch, key/value heads, tokens, kept]: each head has frequencies of its own
        half = cos.shape[-1] // 2
        kept = self._index("pairs", self.pairs, cos.device)
        kept = torch.cat([kept, kept + half], dim=1)
        cos, sin = cos[..., kept].transpose(1, 2), sin[..., kept].transpose(1, 2)
        owner = self.kv_of_head or [h // (self.heads // self.kv_heads) for h in range(self.heads)]
        index = self._index("owner", owner, cos.device)
        return _rotary(query, cos[:, index], sin[:, index]), _rotary(key, cos, sin)


class SlimMLP(SlimPart):
    """A feed-forward layer, gated or not."""

    def __init__(self, activation: nn.Module, slim: dict[str, Any], dims: dict[str, Any], width: int, out: int) -> None:
        super().__init__(dims)
        width = width if self.reads is None else len(self.reads)
        out = out if self.writes is None else len(self.writes)
        if slim["gated"]:
            self.gate_proj = nn.Linear(width, dims["width"], bias=dims["bias"][0])
        self.up_proj = nn.Linear(width, dims["width"], bias=dims["bias"][0])
        self.down_proj = nn.Linear(dims["width"], out, bias=dims["bias"][1])
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class SlimBlock(GradientCheckpointingLayer):
    """One transformer block; `stock` is the block of the stock class whose place it takes."""

    def __init__(self, stock: Any, slim: dict[str, Any], dims: dict[str, Any]) -> None:
        super().__init__()
        self.layout = slim["layout"]
        self.dropout_p = slim["dropout"]
        self.arguments = [name for name in inspect.signature(type(stock).forward).parameters if name != "self"][1:]
        if isinstance(stock, SlimBlock):
            self.arguments = stock.arguments
        self.stream = tuple(dims["stream"])
        before, between, after = self.stream
        attention = _part(stock, slim["attention"])
        self.layer_idx = getattr(attention, "layer_idx", getattr(stock, "layer_idx", None))
        # in a parallel block the MLP reads and adds to what the attention does
        entering = before if self.layout == "parallel" else between
        own, mlp = dims["attention"], dims["mlp"]
        activation = _part(stock, slim["activation"])
        self.register_module("self_attn", SlimAttention(attention, slim, own, before, between) if own else None)
        self.register_module("mlp", SlimMLP(activation, slim, mlp, entering, after) if mlp else None)
        for name, path in zip(NORMS[self.layout], slim["norms"], strict=False):
            norm = stock.get_submodule(path)
            setattr(self, name, SlimNorm(slim["hidden"], _eps(norm)) if dims["fused"] else narrowed(norm, before, slim))
        first, second = dims["adapters"]
        self.register_module("attention_adapter", nn.Linear(before, between, bias=False) if first else None)
        self.register_module("mlp_adapter", nn.Linear(between, after, bias=False) if second else None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(self.arguments, args, strict=False))
        cache = next((kwargs.pop(name) for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        for name in (*_CACHE_NAMES, "encoder_hidden_states", "encoder_attention_mask"):
            kwargs.pop(name, None)
        x = hidden_states
        if self.self_attn is None and cache is not None:  # the stock model reads the length from the first layer
            empty = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)

        def attention(h: Tensor) -> Tensor:
            return self._drop(self.self_attn(self.self_attn.select(h), cache=cache, **kwargs)[0])

        def mlp(h: Tensor) -> Tensor:
            return self._drop(self.mlp(self.mlp.select(h)))

        if self.layout == "parallel":
            total = x if self.attention_adapter is None else self.attention_adapter(x)
            normed = self.input_layernorm(x)
            second = self.post_attention_layernorm(x) if hasattr(self, "post_attention_layernorm") else normed
            if self.self_attn is not None:
                total = self.self_attn.add(total, attention(normed))
            return total if self.mlp is None else self.mlp.add(total, mlp(second))
        total = x if self.attention_adapter is None else self.attention_adapter(x)
        if self.self_attn is not None:
            if self.layout == "sequential":
                total = self.self_attn.add(total, attention(self.input_layernorm(x)))
            elif self.layout == "sandwich":
                added = self.self_attn.spread(attention(self.input_layernorm(x)), total)
                total = total + self.post_attention_layernorm(added)
            else:
                total = self.self_attn.add(total, attention(x))
        x = self.input_layernorm(total) if self.layout == "post" else total
        total = x if self.mlp_adapter is None else self.mlp_adapter(x)
        if self.mlp is not None:
            if self.layout == "sequential":
                total = self.mlp.add(total, mlp(self.post_attention_layernorm(x)))
            elif self.layout == "sandwich":
                added = self.mlp.spread(mlp(self.pre_feedforward_layernorm(x)), total)
                total = total + self.post_feedforward_layernorm(added)
            else:
                total = self.mlp.add(total, mlp(x))
        return self.post_attention_layernorm(total) if self.layout == "post" else total

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout_p, self.training) if self.dropout_p else x


class Slim:
    """Mixed into a stock class: after its own constructor its blocks are replaced as `config.slim` says."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        rebuild(self, config.slim)


def rebuild(model: Any, slim: dict[str, Any]) -> None:
    """Give a freshly made stock model the modules that `slim` describes; their weights are still to be loaded."""
    blocks = model.get_submodule(slim["blocks"])
    for index, dims in enumerate(slim["layers"]):
        blocks[index] = SlimBlock(blocks[index], slim, dims)
    stream = [slim["layers"][0]["stream"][0], slim["layers"][-1]["stream"][2]]
    lost = slim.get("narrowed") or {"parameters": {}, "norms": []}
    for path in lost["norms"]:
        replace(model, path, narrowed(model.get_submodule(path), stream[0], slim))
    for name, shape in lost["parameters"].items():
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        setattr(holder, leaf, nn.Parameter(torch.empty(shape, device=getattr(holder, leaf).device)))
        tell_width(holder)
    if lost["parameters"]:
        model.tie_weights()
    elif stream[0] != slim["hidden"]:
        for path in slim["embeddings"]:
            old = model.get_submodule(path)
            old.weight = nn.Parameter(torch.empty(old.weight.shape[0], stream[0], device=old.weight.device))
            old.embedding_dim = stream[0]
    if slim["fused_final"]:
        replace(model, slim["final_norm"], SlimNorm(slim["hidden"], _eps(model.get_submodule(slim["final_norm"]))))
        old = model.get_submodule(slim["head"])
        replace(model, slim["head"], nn.Linear(stream[1], old.out_features, bias=slim["head_bias"]))
    record_outputs(model)


def record_outputs(model: Any, stock: bool = False) -> None:
    """Let `output_hidden_states` and `output_attentions` find the blocks of this file (or the stock ones again)."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY as registry
    except ImportError:  # a version of Transformers that looks at the attribute only
        registry = {}
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)  # they are on the blocks from before
        if getattr(module, "_can_record_outputs", None):
            if not stock:
                module._can_record_outputs = {"hidden_states": SlimBlock, "attentions": SlimAttention}
            registry[module] = module._can_record_outputs


def narrowed(norm: nn.Module, width: int, slim: dict[str, Any]) -> nn.Module:
    """The norm for a stream of `width` channels; itself where it is such a one already. Its weights are not set."""
    if width == getattr(norm, "width", slim["hidden"]):
        return norm
    return NarrowNorm(norm, width, slim["hidden"], slim.get("norm_plus_one", False))


def tell_width(module: Any) -> None:
    """Let a module that was given a narrower weight say the widths it has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` in the place of the module at `path`."""
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)


def _part(block: nn.Module, path: str) -> Any:
    """A module of a block; None where it was removed."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels, as many as `cos` has, in the half-split layout; the rest passes."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned[..., : width // 2], turned[..., width // 2 :]
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _widened(x: Tensor, width: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for attn_implementation="eager"."""
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    if mask is not None:
        weights = weights + mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def _probability(module: nn.Module, *names: str) -> float:
    for name in names:
        value = getattr(module, name, None)
        if value is not None:
            return float(getattr(value, "p", value))
    return 0.0


def _eps(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise AttributeError(f"{type(norm).__name__} has no epsilon")
