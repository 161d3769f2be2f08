"""What a model is made of, for `billhook inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from billhook.anatomy import Anatomy, Site, anatomy_of, sites_of
from billhook.methods import methods
from billhook.models.load import load
from billhook.models.source import Streamed, dtype_of, source_of
from billhook.surgery.slim import is_slim

Extent = int | list[int]  # one number, or [fewest, most] where blocks differ


def describe_model(name: str) -> dict[str, Any]:
    """Blocks, sites, coupled groups, parameters, and the methods that apply.

    Raises:
        BillhookError: no such model, or its architecture is not declared.
    """
    model, _ = load(name, stream=True)
    family = anatomy_of(model)
    blocks = sites_of(model, family)
    source = source_of(model)
    parameters = _parameters(model)
    prunable = sum(site.numel for block in blocks for site in block)
    return {
        "model": name,
        "architecture": type(model).__name__,
        "family": family.family,
        "blocks": len(blocks),
        "parameters": parameters,
        "prunable": prunable,
        "prunable_share": prunable / parameters,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "bytes": source.checkpoint.nbytes if isinstance(source, Streamed) else None,
        "streams": isinstance(source, Streamed),
        "groups": _groups(model, family),
        "sites": _sites(blocks),
        "methods": [key for key, cls in methods().items() if family.input == "input_ids" or cls.needs == "nothing"],
    }


def _parameters(model: nn.Module) -> int:
    """Tied parameters count once; those of a streamed model are one where they are one on disk."""
    source = source_of(model)
    named = dict(model.named_parameters())
    if isinstance(source, Streamed):
        named = {source.keys[name]: parameter for name, parameter in named.items()}
    return sum(parameter.numel() for parameter in named.values())


def _groups(model: Any, family: Anatomy) -> dict[str, Extent]:
    """How many coupled groups of each kind a block has, as far as the configuration tells."""
    if is_slim(model):
        per_block = [_of_slim(dims) for dims in model.config.slim["layers"]]
        return {name: _extent([block[name] for block in per_block]) for name in per_block[0]}
    config = getattr(model, "config", None)
    groups: dict[str, Extent] = {}
    if family.mlp:
        output = next(s for s in sites_of(model, family)[0] if s.projection == family.mlp.output)
        groups["neurons"] = output.shape[1]
    heads = getattr(config, "num_attention_heads", None)
    if family.attention and heads:
        groups["heads"] = int(heads)
        groups["KV groups"] = int(getattr(config, "num_key_value_heads", None) or heads)
    hidden = getattr(config, "hidden_size", None)
    if hidden:
        groups["hidden dimensions"] = int(hidden)
    return groups


def _of_slim(dims: dict[str, Any]) -> dict[str, int]:
    attention, mlp = dims["attention"], dims["mlp"]
    return {
        "neurons": mlp["width"] if mlp else 0,
        "heads": attention["heads"] if attention else 0,
        "KV groups": attention["kv_heads"] if attention else 0,
        "hidden dimensions": dims["stream"][0],
    }


def _sites(blocks: Sequence[Sequence[Site]]) -> list[dict[str, Any]]:
    by_projection: dict[str, list[Site]] = {}
    for site in (site for block in blocks for site in block):
        by_projection.setdefault(site.projection, []).append(site)
    return [
        {
            "projection": projection,
            "shape": [_extent([site.shape[dim] for site in sites]) for dim in (0, 1)],
            "patterns": [p for p, m in (("2:4", 4), ("4:8", 8)) if all(site.shape[1] % m == 0 for site in sites)],
        }
        for projection, sites in by_projection.items()
    ]


def _extent(values: Sequence[int]) -> Extent:
    return values[0] if min(values) == max(values) else [min(values), max(values)]
