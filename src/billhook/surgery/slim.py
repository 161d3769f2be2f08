"""From a stock model to one whose blocks may have any widths, and back where a stock class can express it.

`slim_(model)` puts a `SlimBlock` in the place of every block, with the same weights under the names that Llama gives
them, and the same outputs. Structured methods and surgery then know one kind of block, whatever the family.
`settle_(model)` ends it: a stock model again if widths allow, else a model that carries its own modelling file.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from billhook.anatomy import Anatomy, anatomy_of, families, find_blocks, fitted
from billhook.errors import BillhookError
from billhook.surgery import modeling_slim
from billhook.surgery.modeling_slim import NORMS, Slim, SlimBlock, SlimNorm

FILE = "modeling_slim.py"


def is_slim(model: nn.Module) -> bool:
    """Whether the blocks of `model` are slim ones."""
    return isinstance(model, Slim)


def slim_(model: Any) -> dict[str, str]:
    """Replace the blocks of a Transformers model by slim ones with the same weights and outputs, in place.

    Returns:
        Full names of the blocks' parameters before -> after, as far as `only_renames` tensors stay what they are.

    Raises:
        BillhookError: the model's family declares no attention and MLP, or it is no Transformers model.
    """
    if is_slim(model):
        return {}
    anatomy = anatomy_of(model)
    if anatomy.attention is None or anatomy.mlp is None:
        raise BillhookError(
            f"The anatomy of family {anatomy.family!r} names no attention and MLP, so nothing can be removed from its "
            "blocks as a whole: declare both with bh.declare(bh.Anatomy(...))."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise BillhookError(f"{type(model).__name__} is not a Transformers model, so its blocks cannot be reshaped.")
    known = {*anatomy.attention.inputs, anatomy.attention.output, *anatomy.mlp.inputs, anatomy.mlp.output}
    for name, module in find_blocks(model, anatomy)[0].named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in known:
            raise BillhookError(
                f"Blocks of this {type(model).__name__} hold {name!r} besides one attention and one MLP, so nothing "
                "can be removed from them as a whole: use a method that sets weights to zero, such as wanda."
            )
    model.config.slim = spec = _spec(model, anatomy)
    container: Any = model.get_submodule(anatomy.blocks)
    names: dict[str, str] = {}
    for index, block in enumerate(find_blocks(model, anatomy)):
        weights = _split(block, anatomy, model.config)
        names |= _names(block, spec, anatomy, f"{anatomy.blocks}.{index}")
        with torch.device("meta"):
            slim = SlimBlock(block, spec, spec["layers"][index])
        _fill(slim, weights)
        container[index] = slim.train(block.training)
    model.__class__ = slim_class(type(model))
    modeling_slim.record_outputs(model)
    refresh(model)
    return names


def only_renames(anatomy: Anatomy) -> bool:
    """Whether slimming a model of this family takes no tensor apart, so that its weights may stay on disk."""
    attention, mlp = anatomy.attention, anatomy.mlp
    if attention is None or mlp is None:
        return False
    return attention.fused is None and len(mlp.inputs) == 1 + mlp.gated and not anatomy.conv1d


def refresh(model: Any) -> None:
    """Write the present widths of all parts into `model.config`."""
    slim = model.config.slim
    anatomy = anatomy_of(model)
    slim["layers"] = [dims_of(block) for block in find_blocks(model, anatomy)]
    model.config.num_hidden_layers = len(slim["layers"])
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None and len(kinds) != len(slim["layers"]):
        model.config.layer_types = [kinds[i] for i in slim["kept_layers"]]
    name = type(model).__name__
    model.config.architectures = [name]
    model.config.auto_map = {auto_class(model): f"modeling_slim.{name}"}


def auto_class(model: Any) -> str:
    """The name of the Transformers class that loads such a model by its configuration, such as AutoModelForCausalLM."""
    kind, name = model.config.model_type, (stock_class(type(model)) if is_slim(model) else type(model)).__name__
    for auto in modeling_auto.__all__:
        if auto.startswith("AutoModelFor") and auto not in ("AutoModelForPreTraining", "AutoModelForTextEncoding"):
            found = getattr(modeling_auto, auto)._model_mapping._model_mapping.get(kind)
            if name == found or (isinstance(found, tuple) and name in found):
                return str(auto)
    return "AutoModel"


def dims_of(block: nn.Module) -> dict[str, Any]:
    """What a slim block holds, as its entry in the configuration."""
    assert isinstance(block, SlimBlock)
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    entry: dict[str, Any] = {"attention": None, "mlp": None}
    if attention is not None:
        entry["attention"] = {
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "qk": attention.qk,
            "v": attention.v,
            "bias": [getattr(attention, f"{name}_proj").bias is not None for name in ("q", "k", "v", "o")],
            "kv_of_head": attention.kv_of_head,
            "pairs": attention.pairs,
            "norms": hasattr(attention, "q_norm"),
            "reads": attention.reads,
            "writes": attention.writes,
        }
    if mlp is not None:
        entry["mlp"] = {
            "width": mlp.down_proj.in_features,
            "bias": [mlp.up_proj.bias is not None, mlp.down_proj.bias is not None],
            "reads": mlp.reads,
            "writes": mlp.writes,
        }
    entry["stream"] = list(block.stream)
    entry["adapters"] = [block.attention_adapter is not None, block.mlp_adapter is not None]
    entry["fused"] = any(isinstance(m, SlimNorm) for m in block.children())
    return entry


def reads_or_writes_some(dims: dict[str, Any]) -> bool:
    """Whether a part of the block of this description reads or adds to only some channels of the residual stream."""
    parts = [part for part in (dims["attention"], dims["mlp"]) if part]
    return any(part.get(name) is not None for part in parts for name in ("reads", "writes"))


def shaped(block: nn.Module, slim: dict[str, Any], dims: dict[str, Any]) -> SlimBlock:
    """A slim block of the shapes of `dims` without weights; norms and activation are those of `block`."""
    assert isinstance(block, SlimBlock)
    own = {**slim, "attention": "self_attn", "activation": "mlp.act_fn", "norms": _norm_names(block)}
    own |= {"query_norm": "q_norm", "key_norm": "k_norm"}
    with torch.device("meta"):
        return SlimBlock(block, own, dims)


def resize_(block: nn.Module, slim: dict[str, Any], dims: dict[str, Any]) -> None:
    """Give a slim block the shapes of `dims`; its weights are then on the meta device, to be loaded."""
    assert isinstance(block, SlimBlock)
    if dims_of(block) == dims:
        return
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    new = shaped(block, slim, dims)
    dtype = next((p.dtype for p in block.parameters() if p.ndim == 2), torch.get_default_dtype())
    for module in new.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    new.train(block.training)  # or dropout of the new parts is on
    block._modules.clear()
    block._modules.update(new.to_empty(device=device)._modules)
    block.stream = new.stream


def settle_(model: Any) -> dict[str, str]:
    """Make a slim model a stock one again, in place, if its widths are such as a stock class can express.

    Returns:
        Full names of the blocks' parameters before -> after.
    """
    if not is_slim(model):
        return {}
    refresh(model)
    stock = _stock_config(model)
    if stock is None:
        return {}
    base = stock_class(type(model))
    anatomy = _stock_anatomy(model)
    with torch.device("meta"):
        shape = base(stock)
    container: Any = model.get_submodule(anatomy.blocks)
    wanted = find_blocks(shape, anatomy)
    names: dict[str, str] = {}
    for index, (block, new) in enumerate(zip(find_blocks(model, anatomy), wanted, strict=True)):
        tensors = _join(block, new, anatomy)
        names |= {v: k for k, v in _names(new, model.config.slim, anatomy, f"{anatomy.blocks}.{index}").items()}
        _fill(new, tensors)
        for name, module in _pieces(block, anatomy):  # activations and norms carry their own state
            modeling_slim.replace(new, name, module)
        container[index] = new.train(block.training)
    model.__class__ = base
    model.config = stock
    for module in model.modules():
        if hasattr(module, "config") and isinstance(module.config, transformers.PretrainedConfig):
            module.config = stock
        module.__dict__.pop("_can_record_outputs", None)
    modeling_slim.record_outputs(model, stock=True)
    return names


def heads_may_leave(model: Any) -> bool:
    """Whether the configuration of a slim model's stock class can say that there are fewer heads of the same width."""
    attention = next((a for layer in model.config.slim["layers"] if (a := layer["attention"])), None)
    if attention is None or attention["qk"] != attention["v"] or attention["kv_of_head"]:
        return False
    config = copy.deepcopy(model.config)
    delattr(config, "slim")
    config.head_dim = attention["qk"]
    config.num_attention_heads = attention["heads"] // attention["kv_heads"]
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = 1
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:1]
    anatomy = _stock_anatomy(model)
    assert anatomy.attention is not None
    try:
        with torch.device("meta"):
            probe = stock_class(type(model))(config)
    except ValueError:  # as in _stock_config
        return False
    output = find_blocks(probe, anatomy)[0].get_submodule(anatomy.attention.output)
    return bool(_rows(output)["weight"].shape[1] == config.num_attention_heads * attention["v"])


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def slim_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The slim class of a stock class; the same one every time."""
    if stock not in _CLASSES:
        _CLASSES[stock] = type(f"Slim{stock.__name__}", (Slim, stock), {"__module__": modeling_slim.__name__})
    return _CLASSES[stock]


def stock_class(slim: type[nn.Module]) -> type[nn.Module]:
    """The stock class that a slim class is of."""
    return slim.__mro__[2]


def class_named(name: str) -> type[nn.Module] | None:
    """The slim class of a name such as SlimLlamaForCausalLM, without running any file; None if it is no such name."""
    base = getattr(transformers, name.removeprefix("Slim"), None) if name.startswith("Slim") else None
    return slim_class(base) if isinstance(base, type) else None


def modelling_file(model: nn.Module) -> str:
    """The text of the modelling file that goes beside the weights of a slim model."""
    base, name = stock_class(type(model)).__name__, type(model).__name__
    body = Path(modeling_slim.__file__).read_text(encoding="utf-8")
    return f"{body}\n\nfrom transformers import {base}  # noqa: E402\n\n\nclass {name}(Slim, {base}):\n    pass\n"


# -- what a stock block is made of ------------------------------------------------------------------------


def _spec(model: Any, anatomy: Anatomy) -> dict[str, Any]:
    attention, mlp = anatomy.attention, anatomy.mlp
    assert attention is not None
    assert mlp is not None
    config = model.config
    layout = anatomy.layout
    if anatomy.layout_switch and not getattr(config, anatomy.layout_switch[0], True):
        layout = anatomy.layout_switch[1]
    blocks = find_blocks(model, anatomy)
    head = model.get_submodule(anatomy.head) if anatomy.head else None
    drop: Any = 0.0
    if anatomy.dropout:
        owner, _, leaf = anatomy.dropout.rpartition(".")
        drop = getattr(blocks[0].get_submodule(owner), leaf)
    spec: dict[str, Any] = {
        "family": anatomy.family,
        "blocks": anatomy.blocks,
        "layout": layout,
        "attention": attention.module,
        "activation": mlp.activation,
        "norms": list(anatomy.norms),
        "query_norm": attention.query_norm,
        "key_norm": attention.key_norm,
        "gated": mlp.gated,
        "dropout": float(getattr(drop, "p", drop)),
        "embeddings": list(anatomy.embeddings),
        "final_norm": anatomy.final_norm,
        "head": anatomy.head,
        "head_bias": getattr(head, "bias", None) is not None,
        "norm_plus_one": anatomy.norm_plus_one,
        "fused_final": False,
        "kept_layers": list(range(len(blocks))),
    }
    layers: list[dict[str, Any]] = []
    for block in blocks:
        weights = _split(block, anatomy, config)
        heads, kv_heads = _head_counts(config)
        hidden = weights["self_attn.q_proj.weight"].shape[1]
        module = block.get_submodule(attention.module)
        layers.append(
            {
                "attention": {
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "qk": weights["self_attn.q_proj.weight"].shape[0] // heads,
                    "v": weights["self_attn.v_proj.weight"].shape[0] // kv_heads,
                    "bias": [f"self_attn.{p}_proj.bias" in weights for p in ("q", "k", "v", "o")],
                    "kv_of_head": None,
                    "pairs": None,
                    "norms": bool(attention.query_norm) and hasattr(module, str(attention.query_norm)),
                },
                "mlp": {
                    "width": weights["mlp.down_proj.weight"].shape[1],
                    "bias": ["mlp.up_proj.bias" in weights, "mlp.down_proj.bias" in weights],
                },
                "stream": [hidden] * 3,
                "adapters": [False, False],
                "fused": False,
            }
        )
    spec["hidden"] = layers[0]["stream"][0]
    rope = getattr(config, "rope_parameters", None) or {}
    turned = rope.get("partial_rotary_factor", 1.0) if attention.rotary else 0.0
    spec["rotary_dim"] = int(layers[0]["attention"]["qk"] * turned)
    spec["layers"] = layers
    return spec


def _head_counts(config: Any) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _rows(module: Any) -> dict[str, Tensor]:
    """Weight [out, in] and bias of a linear layer of either layout."""
    weight = module.weight.data
    found = {"weight": weight.T.contiguous() if isinstance(module, Conv1D) else weight}
    if module.bias is not None:
        found["bias"] = module.bias.data
    return found


def _split(block: nn.Module, anatomy: Anatomy, config: Any) -> dict[str, Tensor]:
    """All parameters of a stock block under the names of a slim one, fused projections taken apart."""
    attention, mlp = anatomy.attention, anatomy.mlp
    assert attention is not None
    assert mlp is not None
    heads, kv_heads = _head_counts(config)
    found: dict[str, Tensor] = {}

    def put(name: str, tensors: dict[str, Tensor]) -> None:
        found.update({f"{name}.{kind}": tensor for kind, tensor in tensors.items()})

    if attention.fused:
        for kind, tensor in _rows(block.get_submodule(attention.fused)).items():
            if attention.fused_layout == "per-head":
                parts = tensor.view(heads, 3, -1, *tensor.shape[1:]).unbind(1)
                query, key, value = (p.reshape(-1, *tensor.shape[1:]) for p in parts)
            else:
                size = tensor.shape[0] // (heads + 2 * kv_heads)
                query, key, value = torch.split(tensor, [heads * size, kv_heads * size, kv_heads * size])
            for name, part in (("q", query), ("k", key), ("v", value)):
                found[f"self_attn.{name}_proj.{kind}"] = part.contiguous()
    else:
        for name, path in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            put(f"self_attn.{name}_proj", _rows(block.get_submodule(str(path))))
    put("self_attn.o_proj", _rows(block.get_submodule(attention.output)))
    inputs = [_rows(block.get_submodule(path)) for path in mlp.inputs]
    if mlp.gated and len(inputs) == 1:
        halves = {kind: tensor.chunk(2) for kind, tensor in inputs[0].items()}
        inputs = [{kind: pair[i].contiguous() for kind, pair in halves.items()} for i in range(2)]
    for name, tensors in zip(("gate", "up") if mlp.gated else ("up",), inputs, strict=True):
        put(f"mlp.{name}_proj", tensors)
    put("mlp.down_proj", _rows(block.get_submodule(mlp.output)))
    return found


def _join(block: Any, new: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    """The parameters of a slim block under the names and in the layout of the stock block `new`."""
    attention, mlp = anatomy.attention, anatomy.mlp
    assert attention is not None
    assert mlp is not None
    found: dict[str, Tensor] = {}

    def put(path: str, tensors: dict[str, Tensor]) -> None:
        conv = isinstance(new.get_submodule(path), Conv1D)
        for kind, tensor in tensors.items():
            found[f"{path}.{kind}"] = tensor.T.contiguous() if conv and kind == "weight" else tensor.contiguous()

    own = block.self_attn
    parts = [_rows(getattr(own, f"{name}_proj")) for name in ("q", "k", "v")]
    if attention.fused:
        joined = {}
        for kind in parts[0]:
            tensors = [part[kind] for part in parts]
            if attention.fused_layout == "per-head":
                split = [t.view(own.heads, 1, -1, *t.shape[1:]) for t in tensors]
                joined[kind] = torch.cat(split, 1).reshape(-1, *tensors[0].shape[1:])
            else:
                joined[kind] = torch.cat(tensors)
        put(attention.fused, joined)
    else:
        for path, part in zip((attention.query, attention.key, attention.value), parts, strict=True):
            put(str(path), part)
    put(attention.output, _rows(own.o_proj))
    gates = [_rows(getattr(block.mlp, f"{name}_proj")) for name in (("gate", "up") if mlp.gated else ("up",))]
    if mlp.gated and len(mlp.inputs) == 1:
        gates = [{kind: torch.cat([g[kind] for g in gates]) for kind in gates[0]}]
    for path, part in zip(mlp.inputs, gates, strict=True):
        put(path, part)
    put(mlp.output, _rows(block.mlp.down_proj))
    for name, module in _pieces(block, anatomy):
        found.update({f"{name}.{local}": p.data for local, p in module.named_parameters()})
    return found


def _names(stock: nn.Module, slim: dict[str, Any], anatomy: Anatomy, prefix: str) -> dict[str, str]:
    """Parameter of a stock block -> of its slim block, full names; fused ones are left out."""
    attention, mlp = anatomy.attention, anatomy.mlp
    assert attention is not None
    assert mlp is not None
    paths: dict[str | None, str] = {
        attention.query: "self_attn.q_proj",
        attention.key: "self_attn.k_proj",
        attention.value: "self_attn.v_proj",
        attention.output: "self_attn.o_proj",
        mlp.output: "mlp.down_proj",
        f"{attention.module}.{attention.query_norm}": "self_attn.q_norm",
        f"{attention.module}.{attention.key_norm}": "self_attn.k_norm",
    }
    gates = ("mlp.gate_proj", "mlp.up_proj") if mlp.gated else ("mlp.up_proj",)
    paths |= dict(zip(mlp.inputs, gates, strict=False))
    paths |= dict(zip(anatomy.norms, NORMS[slim["layout"]], strict=False))
    return {
        f"{prefix}.{name}": f"{prefix}.{paths[owner]}.{leaf}"
        for name, _ in stock.named_parameters()
        for owner, _, leaf in [name.rpartition(".")]
        if owner in paths
    }


def _pieces(block: Any, anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
    """(path in the stock block, module) of what a slim block took over unchanged."""
    assert anatomy.attention is not None
    pairs = list(zip(anatomy.norms, (getattr(block, name) for name in _norm_names(block)), strict=False))
    own = block.self_attn
    for path, name in ((anatomy.attention.query_norm, "q_norm"), (anatomy.attention.key_norm, "k_norm")):
        if own is not None and hasattr(own, name):
            pairs.append((f"{anatomy.attention.module}.{path}", getattr(own, name)))
    return pairs


def _norm_names(block: SlimBlock) -> list[str]:
    return [name for name in NORMS[block.layout] if hasattr(block, name)]


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the tensors in the place of the parameters that are on the meta device."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta" and name in tensors:
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            holder._parameters[leaf] = nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())


def _stock_anatomy(model: Any) -> Anatomy:
    return fitted(model, families()[model.config.model_type])


def _stock_config(model: Any) -> Any:
    """The stock configuration that has the model's widths; None where there is none."""
    slim: dict[str, Any] = model.config.slim
    layers, first = slim["layers"], slim["layers"][0]
    attention, mlp = first["attention"], first["mlp"]
    plain = all(
        layer["attention"] == attention
        and layer["mlp"] == mlp
        and set(layer["stream"]) == {slim["hidden"]}
        and not any(layer["adapters"])
        and not layer["fused"]
        for layer in layers
    )
    if not plain or slim["fused_final"] or attention is None or mlp is None:
        return None
    if attention["pairs"] or attention["kv_of_head"] or attention["qk"] != attention["v"]:
        return None
    if reads_or_writes_some(first):
        return None
    config = copy.deepcopy(model.config)
    for name in ("slim", "auto_map"):
        delattr(config, name)
    anatomy = _stock_anatomy(model)
    assert anatomy.mlp is not None
    if hasattr(config, "head_dim") or attention["heads"] * attention["qk"] != slim["hidden"]:
        config.head_dim = attention["qk"]
    setattr(config, anatomy.mlp.width, mlp["width"])
    config.num_attention_heads = attention["heads"]
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = attention["kv_heads"]
    elif attention["kv_heads"] != attention["heads"]:
        return None
    config.architectures = [stock_class(type(model)).__name__]
    try:
        with torch.device("meta"):
            probe = stock_class(type(model))(config)
    except ValueError:  # heads that do not divide the width, for example
        return None
    own: Any = find_blocks(model, anatomy)[0]
    other: Any = find_blocks(probe, anatomy)[0]
    assert anatomy.attention is not None
    tensors = _join(own, other, anatomy)
    fits = all(tensors[name].shape == p.shape for name, p in other.named_parameters())
    return config if fits and own.self_attn.scaling == other.get_submodule(anatomy.attention.module).scaling else None
