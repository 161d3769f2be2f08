"""Removing parts of slim blocks: what is left is smaller, and computes what the block with those parts at zero did.

Every function takes the indices that stay (sorted, at least one) and edits in place. A part is a coupled group: its
slices in several tensors leave together.

    neuron j           row j of gate and up and of their biases, column j of down
    query head h       rows of query, columns of output
    key/value head t   rows of key and value, and all query heads that read it
    value channel j    one row of value per key/value head, one column of output per query head that reads it
    rotary pair p      two rows of query and of key per head, which rotate together
    channel c          (no rotary embedding) one row of query and of key per head
    hidden dimension c one channel of the residual stream, in all that writes, normalises or reads it, in every block
    stream channel c   of what a part reads: one column of query, key and value, or of gate and up; of what it writes:
                       one row of output, or of down, and of its bias (the stream itself keeps its width)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy, anatomy_of, find_blocks
from billhook.anatomy.anatomy import join
from billhook.errors import BillhookError
from billhook.surgery.modeling_slim import (
    NORMS,
    NarrowNorm,
    SlimAttention,
    SlimBlock,
    narrowed,
    replace,
    tell_width,
)
from billhook.surgery.rotate import readers, writers
from billhook.surgery.slim import dims_of, reads_or_writes_some, refresh


def keep_neurons_(block: nn.Module, keep: Tensor) -> None:
    """Keep these intermediate neurons, [k] integer indices."""
    mlp = _slim(block).mlp
    keep = _checked(keep, mlp.down_proj.in_features, "neurons")
    for name in ("gate_proj", "up_proj"):
        if hasattr(mlp, name):
            _rows(getattr(mlp, name), keep)
    _columns(mlp.down_proj, keep)


def keep_heads_(block: nn.Module, keep: Tensor) -> None:
    """Keep these query heads, [k]; key/value heads that none of them reads leave too."""
    attention = _attention(block)
    keep = _checked(keep, attention.heads, "query heads")
    owner = torch.tensor(owners(attention))[keep.cpu()]
    groups, kv_of_head = torch.unique(owner, return_inverse=True)
    _rows(attention.q_proj, _spread(keep, attention.qk))
    _columns(attention.o_proj, _spread(keep, attention.v))
    if len(groups) < attention.kv_heads:
        _rows(attention.k_proj, _spread(groups, attention.qk))
        _rows(attention.v_proj, _spread(groups, attention.v))
        if attention.pairs is not None:
            attention.pairs = [attention.pairs[t] for t in groups.tolist()]
    _counts(attention, len(keep), len(groups), kv_of_head.tolist())


def keep_kv_heads_(block: nn.Module, keep: Tensor) -> None:
    """Keep these key/value heads, [k], with all query heads that read them (a KV group)."""
    attention = _attention(block)
    keep = _checked(keep, attention.kv_heads, "key/value heads")
    kept = set(keep.tolist())
    keep_heads_(block, torch.tensor([h for h, t in enumerate(owners(attention)) if t in kept]))


def keep_values_(block: nn.Module, keep: Tensor) -> None:
    """Keep these value channels, [key/value heads, k]: for each head the channels within it."""
    attention = _attention(block)
    rows, columns = value_slices(attention, keep)
    _rows(attention.v_proj, rows)
    _columns(attention.o_proj, columns)
    attention.v = keep.shape[1]


def keep_pairs_(block: nn.Module, keep: Tensor) -> None:
    """Keep these rotary pairs, [key/value heads, k]; channels that do not rotate stay.

    Raises:
        BillhookError: queries and keys are normalised over the head's width, which would change.
    """
    attention = _attention(block)
    half = rotary_pairs(attention)
    _refuse_norms(attention)
    keep = _each_checked(keep, half, "rotary pairs").cpu()
    tail = torch.arange(2 * half, attention.qk).expand(attention.kv_heads, -1)
    _query_key(attention, torch.cat([keep, keep + half, tail], dim=1))
    before = torch.tensor(attention.pairs) if attention.pairs else torch.arange(half).expand(attention.kv_heads, -1)
    attention.pairs = before.gather(1, keep).tolist()
    attention._indices.clear()


def keep_channels_(block: nn.Module, keep: Tensor) -> None:
    """Keep these query/key channels, [key/value heads, k], of a block without rotary embedding."""
    attention = _attention(block)
    _refuse_norms(attention)
    _query_key(attention, _each_checked(keep, attention.qk, "query/key channels").cpu())


Part = Literal["attention", "mlp"]


def keep_reads_(block: nn.Module, part: Part, keep: Tensor) -> None:
    """Keep these of the stream channels that the attention or MLP reads, [k] indices into its present inputs.

    The norm before it still sees the whole stream.
    """
    module = _part(block, part)
    matrices = [getattr(module, name) for name in _READERS if hasattr(module, name)]
    width = matrices[0].in_features
    keep = _checked(keep, width, "channels read")
    for linear in matrices:
        _columns(linear, keep)
    module.reads = _subset(module.reads, keep, width)
    module._indices.clear()


def keep_writes_(block: nn.Module, part: Part, keep: Tensor) -> None:
    """Keep these of the stream channels that the attention or MLP adds to, [k] indices into its present outputs.

    Without any it is removed, and the stream passes.
    """
    module = _part(block, part)
    if keep.numel() == 0:
        (drop_attention_ if part == "attention" else drop_mlp_)(block)
        return
    linear = module.o_proj if part == "attention" else module.down_proj
    width = linear.out_features
    keep = _checked(keep, width, "channels written")
    _rows(linear, keep)
    module.writes = _subset(module.writes, keep, width)
    module._indices.clear()


_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def fold_value_bias_(attention: Any) -> None:
    """Attention rows sum to one, so a value bias reaches every token as the constant W_O b_V: put it there, exactly.

    The output projection is given a bias where it has none. The value's own stays, at zero, so that the block keeps
    its parameters' names.
    """
    bias, output = attention.v_proj.bias, attention.o_proj
    if bias is None or not bool(bias.any()):
        return
    spread = bias.data.view(attention.kv_heads, attention.v)[torch.tensor(owners(attention), device=bias.device)]
    if output.bias is None:
        output.bias = nn.Parameter(output.weight.new_zeros(output.out_features), output.weight.requires_grad)
    output.bias.data.add_(output.weight.data.double() @ spread.flatten().double())
    bias.data.zero_()


def drop_attention_(block: nn.Module) -> None:
    """Remove the attention of a block; the residual stream passes."""
    _slim(block).self_attn = None


def drop_mlp_(block: nn.Module) -> None:
    """Remove the MLP of a block; the residual stream passes."""
    _slim(block).mlp = None


def keep_blocks_(model: Any, keep: Sequence[int]) -> None:
    """Keep these blocks of a slim model, in order.

    Raises:
        BillhookError: none is kept, or there is no such block.
    """
    anatomy = anatomy_of(model)
    blocks = find_blocks(model, anatomy)
    kept = _checked(torch.tensor(sorted(keep), dtype=torch.long), len(blocks), "blocks").tolist()
    container = model.get_submodule(anatomy.blocks)
    for index in sorted(set(range(len(blocks))) - set(kept), reverse=True):
        del container[index]
    for index, block in enumerate(container):
        block.layer_idx = index
        if block.self_attn is not None:
            block.self_attn.layer_idx = index
    model.config.slim["kept_layers"] = kept
    refresh(model)
    model.config.slim["kept_layers"] = list(range(len(kept)))


def keep_hidden_(model: Any, keep: Tensor) -> None:
    """Keep these channels of the residual stream of a slim model, [k], in all that writes, normalises or reads it.

    That is embeddings (of positions, token types and patches too), norms, attention, MLP, and what reads the last
    hidden state: head, pooler, classifier; a tied head stays tied. Norms go on dividing by the width before, the lost
    channels counting as zeros. The result is therefore exactly the model whose channels are zero in all that writes
    them and in the norms' scales and offsets, for LayerNorms too. A base model returns the channels that stay.

    Raises:
        BillhookError: the weights are on disk, the stream was rotated or is read in part, or what reads or writes it
            outside the blocks is not known.
    """
    if not hasattr(model.config, "slim"):
        raise BillhookError(f"{type(model).__name__} is a stock model: make it slim first, with slim_(model).")
    anatomy, slim = anatomy_of(model), model.config.slim
    blocks: list[Any] = list(find_blocks(model, anatomy))
    if any(p.device.type == "meta" for p in model.parameters()):
        raise BillhookError("Channels leave all weights at once, so these have to be in memory: load without stream.")
    if any(dims["fused"] or any(dims["adapters"]) or reads_or_writes_some(dims) for dims in map(dims_of, blocks)):
        raise BillhookError(
            "The residual stream of this model was rotated, or some blocks read or write only a part of it, so "
            "channels cannot be removed from all of it: start from the original model."
        )
    width = blocks[0].stream[0]
    keep = _checked(keep, width, "hidden dimensions")
    slices, norms = _around(model, anatomy, width)
    for block in blocks:
        for linear in (*readers(block, "attention"), *readers(block, "mlp")):
            _columns(linear, keep)
        for linear in writers(block):
            _rows(linear, keep)
        for name in NORMS[block.layout]:
            if hasattr(block, name):
                setattr(block, name, _narrowed(getattr(block, name), keep, slim))
        block.stream = (len(keep),) * 3
    lost = slim.setdefault("narrowed", {"parameters": {}, "norms": norms})
    for path in norms:
        replace(model, path, _narrowed(model.get_submodule(path), keep, slim))
    for name, dim in slices:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        old = getattr(holder, leaf)
        new = old.data.index_select(dim, keep.to(old.device))
        setattr(holder, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        tell_width(holder)
        lost["parameters"][name] = list(new.shape)
    model.tie_weights()
    refresh(model)


def _around(model: Any, anatomy: Anatomy, width: int) -> tuple[list[tuple[str, int]], list[str]]:
    """What of the stream is outside the blocks: (parameter, dimension of its channels), and paths of norms.

    Raises:
        BillhookError: it is not known, or a shape is not that of a part of the stream.
    """
    slices: list[tuple[str, int]] = []
    norms: list[str] = []

    def add(path: str, leaf: str, dim: int) -> None:
        parameter = getattr(model.get_submodule(path), leaf, None)
        if parameter is None:
            return
        if parameter.shape[dim] != width:
            raise BillhookError(
                f"{path}.{leaf} has the shape {list(parameter.shape)}, which does not fit a residual stream of {width} "
                "channels: leave the hidden dimension whole."
            )
        slices.append((f"{path}.{leaf}", dim))

    def add_written(path: str) -> None:
        for inner, module in model.get_submodule(path).named_modules():
            name = join(path, inner)
            if isinstance(module, nn.LayerNorm | NarrowNorm):
                norms.append(name)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                add(name, "weight", 0)
                add(name, "bias", 0)
            else:
                for leaf in module._parameters:
                    add(name, leaf, -1)

    for path in anatomy.embeddings:
        add_written(path)
    if anatomy.final_norm and _has(model, anatomy.final_norm):
        norms.append(anatomy.final_norm)
    between = [path for path in anatomy.readers if _has(model, path)]
    for path in between:
        add(path, "weight", 1)
    if anatomy.transform and _has(model, anatomy.transform):
        if f"{anatomy.head}.weight" in (model.all_tied_weights_keys or {}):  # it ends in the embeddings' channels
            add_written(anatomy.transform)
            add(str(anatomy.head), "weight", 1)
    elif anatomy.head and not between:
        add(anatomy.head, "weight", 1)
    elif not between and model.base_model is not model:
        raise BillhookError(
            f"What reads the last hidden state of {type(model).__name__} is not declared: leave the hidden dimension "
            "whole, or name its path as head or readers in the anatomy of its family."
        )
    return slices, norms


def _narrowed(norm: Any, keep: Tensor, slim: dict[str, Any]) -> nn.Module:
    new = narrowed(norm, len(keep), slim)
    if new is not norm:
        for name, parameter in new.named_parameters():
            old = getattr(norm, name)
            parameter.data.copy_(old.data[keep.to(old.device)])
            parameter.requires_grad_(old.requires_grad)
    return new.train(norm.training)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


# -- what is where ----------------------------------------------------------------------------------------


def owners(attention: Any) -> list[int]:
    """The key/value head of each query head."""
    if attention.kv_of_head:
        return list(attention.kv_of_head)
    return [h // (attention.heads // attention.kv_heads) for h in range(attention.heads)]


def value_slices(attention: Any, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the value projection and columns of the output projection of the channels [key/value heads, k]."""
    keep = _each_checked(keep, attention.v, "value channels").cpu()
    rows = (torch.arange(attention.kv_heads)[:, None] * attention.v + keep).flatten()
    owner = torch.tensor(owners(attention))
    columns = (torch.arange(attention.heads)[:, None] * attention.v + keep[owner]).flatten()
    return rows, columns


def rotary_pairs(attention: Any) -> int:
    """How many rotary pairs each head has."""
    if attention.pairs is not None:
        return len(attention.pairs[0])
    return int(attention.rotary_dim) // 2


def _query_key(attention: Any, keep: Tensor) -> None:
    keys = (torch.arange(attention.kv_heads)[:, None] * attention.qk + keep).flatten()
    owner = torch.tensor(owners(attention))
    queries = (torch.arange(attention.heads)[:, None] * attention.qk + keep[owner]).flatten()
    _rows(attention.q_proj, queries)
    _rows(attention.k_proj, keys)
    attention.qk = keep.shape[1]


def _counts(attention: Any, heads: int, kv_heads: int, kv_of_head: list[int]) -> None:
    attention.heads, attention.kv_heads = heads, kv_heads
    even = heads % kv_heads == 0 and kv_of_head == [h // (heads // kv_heads) for h in range(heads)]
    attention.kv_of_head = None if even else kv_of_head
    attention.num_key_value_groups = heads // kv_heads if even else 1
    attention._indices.clear()


def _spread(index: Tensor, width: int) -> Tensor:
    """Indices of all channels of these heads."""
    return (index[:, None] * width + torch.arange(width, device=index.device)).flatten()


def _rows(linear: nn.Linear, keep: Tensor) -> None:
    keep = keep.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.data[keep], requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[keep], requires_grad=linear.bias.requires_grad)
    linear.out_features = len(keep)


def _columns(linear: nn.Linear, keep: Tensor) -> None:
    keep = keep.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.data[:, keep], requires_grad=linear.weight.requires_grad)
    linear.in_features = len(keep)


def _slim(block: nn.Module) -> Any:
    if not isinstance(block, SlimBlock):
        raise BillhookError(f"{type(block).__name__} is a stock block: make the model slim first, with slim_(model).")
    return block


def _part(block: nn.Module, part: Part) -> Any:
    if part == "attention":
        return _attention(block)
    if _slim(block).mlp is None:
        raise BillhookError("The MLP of this block was removed already.")
    return block.mlp


def _subset(before: list[int] | None, keep: Tensor, width: int) -> list[int] | None:
    """Channels of the stream, from indices into those that were left before; None for all of them."""
    if before is None:
        return None if len(keep) == width else keep.tolist()
    return [before[i] for i in keep.tolist()]


def _attention(block: nn.Module) -> Any:
    attention = _slim(block).self_attn
    if not isinstance(attention, SlimAttention):
        raise BillhookError("The attention of this block was removed already.")
    return attention


def _refuse_norms(attention: Any) -> None:
    if hasattr(attention, "q_norm"):
        raise BillhookError(
            "Queries and keys of this model are normalised over the head's width, so their channels cannot be removed: "
            "leave query and key whole."
        )


def _checked(keep: Tensor, size: int, what: str) -> Tensor:
    if keep.numel() == 0:
        raise BillhookError(f"Nothing would be left of the {size} {what}: keep at least one.")
    if keep.min() < 0 or keep.max() >= size or len(set(keep.tolist())) != keep.numel():
        raise BillhookError(f"Indices of {what} must be distinct and within 0 to {size - 1}.")
    return keep.sort().values


def _each_checked(keep: Tensor, size: int, what: str) -> Tensor:
    return torch.stack([_checked(row, size, what) for row in keep])
