"""Anatomy: a family of architectures declared as data.

Everything that a method needs to know about a family comes from here; nowhere else does a family's name
decide anything. All paths are module paths: those of `Anatomy` from the root of the model, those of
`Attention` and `MLP` from the root of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from billhook.errors import BillhookError, nearest

# Where a block's norms are: before attention and MLP in turn; before both at once; before and after each; after each.
Layout = Literal["sequential", "parallel", "sandwich", "post"]


@dataclass(frozen=True)
class Attention:
    """The projections of one attention module.

    Separate projections are named by `query`, `key`, `value`; a fused one by `fused`, in the layout that
    `fused_layout` says: "qkv" (all queries, then all keys, then all values) or "per-head" (query, key and
    value of head 0, then of head 1, ...).
    """

    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    fused_layout: Literal["qkv", "per-head"] = "qkv"
    rotary: bool = True
    query_norm: str | None = None  # attributes of the attention module, where queries and keys are normalised
    key_norm: str | None = None

    @property
    def module(self) -> str:
        """The path of the attention module itself."""
        return self.inputs[0].rpartition(".")[0]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that read the block's normalised hidden state."""
        return tuple(p for p in (self.query, self.key, self.value, self.fused) if p)


@dataclass(frozen=True)
class MLP:
    """The projections of one feed-forward module; `gated` when the inputs are (gate, up)."""

    inputs: tuple[str, ...]
    output: str
    gated: bool = False
    activation: str = "mlp.act_fn"
    width: str = "intermediate_size"  # the configuration's name of the inner width


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a family of networks are.

    With `attention` and `mlp` left out, every linear layer inside the blocks is a site: enough to prune an
    `nn.Module` that is not from Transformers: `Anatomy(family="mine", blocks="layers")`.
    """

    family: str
    blocks: str  # the nn.ModuleList (or nn.Sequential) of blocks; "" where the model itself is that
    model_types: tuple[str, ...] = ()  # `config.model_type` values of Transformers
    attention: Attention | None = None
    mlp: MLP | None = None
    embeddings: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()  # inside a block
    final_norm: str | None = None
    head: str | None = None  # or, in another class of the family, what is there under a usual name
    readers: tuple[str, ...] = ()  # what reads the last stream before the head, where the class has it
    transform: str | None = None  # the module between stream and head that ends in the space of the embeddings
    norm: Literal["rms", "layer"] = "rms"
    norm_plus_one: bool = False  # norm scales are stored as their difference from one
    bias: bool = False
    same_ends: bool = False  # the model gives its output the shape of its input, so the stream ends as wide as it began
    conv1d: bool = False  # weights stored as [in, out] (GPT-2)
    layout: Layout = "sequential"
    layout_switch: tuple[str, Layout] | None = None  # a configuration value that, if false, makes the layout another
    dropout: str | None = None  # path in a block of what drops out before the residual adds: a module or a number
    input: str | None = "input_ids"  # the forward argument that a tensor batch goes to; None: positional

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Projections grouped by the input they share, in the order of execution; empty if undeclared."""
        groups: list[tuple[str, ...]] = []
        if self.attention:
            groups += [self.attention.inputs, (self.attention.output,)]
        if self.mlp:
            groups += [self.mlp.inputs, (self.mlp.output,)]
        return tuple(groups)


_HEADS = ("score", "classifier", "qa_outputs")  # of the stock classes that are not what a family declares
_FAMILIES: dict[str, Anatomy] = {}


def declare(anatomy: Anatomy) -> Anatomy:
    """Make a family known for all its `model_types` (its own name when it has none). Returns it."""
    for model_type in anatomy.model_types or (anatomy.family,):
        _FAMILIES[model_type] = anatomy
    return anatomy


def families() -> dict[str, Anatomy]:
    """All declared families by `config.model_type`."""
    return dict(_FAMILIES)


def anatomy_of(model: nn.Module, anatomy: Anatomy | None = None) -> Anatomy:
    """The anatomy of `model`: the given one, or the one declared for `model.config.model_type`.

    Raises:
        BillhookError: no family is declared for the model, or a declared part is not in it.
    """
    if anatomy is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        known = families()
        if model_type is None:
            raise BillhookError(
                f"{type(model).__name__} has no config.model_type, so its parts are unknown: pass "
                'anatomy=bh.Anatomy(family="mine", blocks="path.to.the.block.list").'
            )
        if model_type not in known:
            raise BillhookError(
                f"No anatomy is declared for model_type {model_type!r}{nearest(model_type, known)}: its "
                f'list of blocks was not found; declare it with bh.declare(bh.Anatomy(family="{model_type}", '
                f'model_types=("{model_type}",), blocks="path.to.the.block.list")).'
            )
        anatomy = fitted(model, known[model_type])
        if hasattr(model.config, "slim"):
            anatomy = _slim(anatomy)
    _check(model, anatomy)
    return anatomy


def fitted(model: nn.Module, anatomy: Anatomy) -> Anatomy:
    """A family's anatomy with the paths that `model` has: base models lack a prefix, and heads have several names."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    short = anatomy.blocks.removeprefix(prefix)
    if short != anatomy.blocks and _find(model, anatomy.blocks) is None and _find(model, short) is not None:
        final = anatomy.final_norm.removeprefix(prefix) if anatomy.final_norm else None
        return replace(
            anatomy,
            blocks=short,
            embeddings=tuple(path.removeprefix(prefix) for path in anatomy.embeddings),
            readers=tuple(path.removeprefix(prefix) for path in anatomy.readers),
            final_norm=final,
            head=None,
        )
    if anatomy.head is None or _find(model, anatomy.head) is not None:
        return anatomy
    return replace(anatomy, head=next((path for path in _HEADS if _find(model, path) is not None), None))


def _slim(anatomy: Anatomy) -> Anatomy:
    """The anatomy of a family's models with reshaped blocks, which all have Llama's names."""
    attention, mlp = anatomy.attention, anatomy.mlp
    assert attention is not None
    assert mlp is not None
    return replace(
        anatomy,
        attention=Attention(
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.o_proj",
            rotary=attention.rotary,
        ),
        mlp=MLP(
            inputs=("mlp.gate_proj", "mlp.up_proj") if mlp.gated else ("mlp.up_proj",),
            output="mlp.down_proj",
            gated=mlp.gated,
            width=mlp.width,
        ),
        norms=(),
        conv1d=False,
    )


def _check(model: nn.Module, anatomy: Anatomy) -> None:
    parts = {"blocks": [anatomy.blocks]}
    blocks = _find(model, anatomy.blocks)
    if blocks is None:
        parts = {"blocks": [anatomy.blocks]}
    elif not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        raise BillhookError(
            f"The anatomy of family {anatomy.family!r} names {anatomy.blocks!r} as the blocks, but that is not "
            "a non-empty nn.ModuleList or nn.Sequential."
        )
    else:
        inside = [*(anatomy.attention.inputs if anatomy.attention else ())]
        inside += [anatomy.attention.output] if anatomy.attention else []
        inside += [*anatomy.mlp.inputs, anatomy.mlp.output] if anatomy.mlp else []
        first = join(anatomy.blocks, next(name for name, _ in blocks.named_children()))
        some = not hasattr(getattr(model, "config", None), "slim")  # whose blocks may lack attention or MLP
        parts = {"projection": [join(first, path) for path in inside if some]}
    parts["embeddings"] = list(anatomy.embeddings)
    for part, paths in parts.items():
        for path in paths:
            if _find(model, path) is None:
                raise BillhookError(
                    f"The anatomy of family {anatomy.family!r} names {path!r} as {part}, but "
                    f"{type(model).__name__} has no such module: declare an anatomy that fits with "
                    "bh.declare(bh.Anatomy(...))."
                )


def join(*names: str) -> str:
    """Module names to one path; an empty one stands for the module itself."""
    return ".".join(name for name in names if name)


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
