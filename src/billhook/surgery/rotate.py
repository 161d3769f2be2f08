"""Changes of basis of the residual stream, exact up to what is cut off.

In a pre-norm transformer whose norms have no weights, the stream may be multiplied by an orthogonal matrix at every
place between two sublayers, if what writes to it and what reads it absorb the rotation. (SliceGPT, section 3.)
All products are taken in float64 and cast back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.errors import BillhookError
from billhook.surgery.modeling_slim import NORMS, SlimNorm, _eps, replace
from billhook.surgery.slim import reads_or_writes_some


def check_rotatable(model: Any, anatomy: Anatomy) -> None:
    """Refuse what has no rotated form.

    Raises:
        BillhookError: norms after the sublayers, or embeddings that are not plain tables of the hidden width.
    """
    slim = model.config.slim
    if slim["layout"] not in ("sequential", "parallel"):
        raise BillhookError(
            f"Family {slim['family']!r} normalises what its sublayers add to the residual stream, so the stream cannot "
            "be rotated: use a method that narrows blocks instead, such as fasp or modegpt."
        )
    if any(reads_or_writes_some(dims) for dims in slim["layers"]):
        raise BillhookError(
            "Blocks of this model read or write only some channels of the residual stream, so the stream cannot be "
            "rotated: rotate first, or use a method that narrows blocks."
        )
    if slim.get("narrowed"):
        raise BillhookError(
            "Channels of this model's residual stream were removed, so it cannot be rotated: rotate the original model."
        )
    for path in anatomy.embeddings:
        table = model.get_submodule(path)
        if not isinstance(table, nn.Embedding) or table.embedding_dim != slim["hidden"]:
            raise BillhookError(
                f"{path!r} is not a table of {slim['hidden']}-wide embeddings, so the residual stream cannot be "
                "rotated: use a method that narrows blocks instead, such as fasp or modegpt."
            )
    if anatomy.head is None or anatomy.final_norm is None:
        raise BillhookError(f"The anatomy of family {slim['family']!r} names no final norm and head to rotate.")


def fuse_norms_(block: Any, slim: dict[str, Any], anatomy: Anatomy) -> None:
    """Multiply a block's norm scales and offsets into their readers, centre its writers, and leave weightless norms.

    Exact where what the block reads is centred, if its norms are LayerNorms: LN(x) = RMSN(x − mean) diag(α) + β.
    """
    attention, mlp = block.self_attn, block.mlp
    readers = ([attention.q_proj, attention.k_proj, attention.v_proj] if attention is not None else [], gates(mlp))
    names = [name for name in NORMS[block.layout] if hasattr(block, name)]
    if len(names) == 1:  # a parallel block with one norm
        readers = ([*readers[0], *readers[1]], [])
    for name, those in zip(names, readers, strict=False):
        norm = getattr(block, name)
        if isinstance(norm, SlimNorm):
            continue
        scale, offset = scale_of(norm, anatomy)
        for linear in those:
            absorb_norm_(linear, scale, offset)
        setattr(block, name, SlimNorm(slim["hidden"], _eps(norm)))
    if anatomy.norm == "layer":
        for writer in writers(block):
            _set(writer, writer.weight.double() - writer.weight.double().mean(0, keepdim=True))
            if writer.bias is not None:
                writer.bias.data -= writer.bias.data.mean()


def absorb_norm_(linear: nn.Linear, scale: Tensor, offset: Tensor | None) -> None:
    """W ← W diag(α), b ← b + W β: the layer then reads the normalised stream without scale and offset."""
    weight = linear.weight.double()
    if offset is not None:
        shift = weight @ offset
        bias = shift if linear.bias is None else linear.bias.double() + shift
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
    _set(linear, weight * scale)


def scale_of(norm: Any, anatomy: Anatomy) -> tuple[Tensor, Tensor | None]:
    """Scale α and offset β of a norm, float64 [hidden]; a scale stored as the difference from one is completed."""
    scale = norm.weight.data.double() + float(anatomy.norm_plus_one)
    bias = getattr(norm, "bias", None)
    return scale, None if bias is None else bias.data.double()


def rotate_input_(linear: nn.Linear, basis: Tensor) -> None:
    """Read the stream in the coordinates of `basis`, [width before, width after]: W ← W Q."""
    _set(linear, linear.weight.double() @ basis.double())


def rotate_output_(linear: nn.Linear, basis: Tensor) -> None:
    """Write to the stream in the coordinates of `basis`, [width before, width after]: W ← Qᵀ W, b ← Qᵀ b."""
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis.double().T @ linear.bias.double()).to(linear.weight.dtype))
    _set(linear, basis.double().T @ linear.weight.double())


def adapter(matrix: Tensor, like: Tensor) -> nn.Linear:
    """A residual connection x ↦ x S, with S [width before, width after]."""
    result = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False, device="meta")
    result.weight = nn.Parameter(matrix.T.to(like.device, like.dtype).contiguous())
    return result


def readers(block: Any, place: str) -> list[nn.Linear]:
    """What reads the stream at the "attention" or at the "mlp"."""
    if place == "mlp":
        return gates(block.mlp)
    own = block.self_attn
    return [own.q_proj, own.k_proj, own.v_proj] if own is not None else []


def gates(mlp: Any) -> list[nn.Linear]:
    """The matrices of an MLP that read the stream."""
    return [getattr(mlp, name) for name in ("gate_proj", "up_proj") if hasattr(mlp, name)] if mlp is not None else []


def writers(block: Any) -> list[nn.Linear]:
    """What writes to the stream in a block."""
    own = [block.self_attn.o_proj] if block.self_attn is not None else []
    return own + ([block.mlp.down_proj] if block.mlp is not None else [])


def rotate_ends_(model: Any, anatomy: Anatomy, first: Tensor, last: Tensor) -> list[str]:
    """Rotate embeddings by `first`, final norm and head by `last` ([hidden, width] each); a tied head is untied.

    The centring that LayerNorms did on the first stream must be in `first` already.

    Returns:
        Paths of the modules that were edited.
    """
    slim = model.config.slim
    assert anatomy.head is not None
    assert anatomy.final_norm is not None
    head, norm = model.get_submodule(anatomy.head), model.get_submodule(anatomy.final_norm)
    table = model.get_submodule(anatomy.embeddings[0])
    own = head.weight.data if head.weight.device.type != "meta" else table.weight.data  # tied and not loaded itself
    new = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    new.weight = nn.Parameter(own.clone())
    if head.bias is not None:
        new.bias = nn.Parameter(head.bias.data.clone())
    if not isinstance(norm, SlimNorm):
        absorb_norm_(new, *scale_of(norm, anatomy))
        replace(model, anatomy.final_norm, SlimNorm(slim["hidden"], _eps(norm)))
    rotate_input_(new, last)
    replace(model, anatomy.head, new)
    for path in anatomy.embeddings:
        embedding = model.get_submodule(path)
        embedding.weight = nn.Parameter((embedding.weight.double() @ first).to(own.dtype))
        embedding.embedding_dim = first.shape[1]
    slim["fused_final"] = True
    slim["head_bias"] = new.bias is not None
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return [*anatomy.embeddings, anatomy.head]


def _set(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous())
    linear.out_features, linear.in_features = weight.shape
