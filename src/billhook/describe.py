"""What a model is made of, for `billhook inspect`."""

from __future__ import annotations

from typing import Any

from torch import nn

from billhook.anatomy import Anatomy, anatomy_of, sites_of
from billhook.methods import methods
from billhook.models.load import load
from billhook.models.source import Streamed, dtype_of, source_of


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
        "sites": [
            {
                "projection": site.projection,
                "shape": list(site.shape),
                "patterns": [p for p, m in (("2:4", 4), ("4:8", 8)) if site.shape[1] % m == 0],
            }
            for site in blocks[0]
        ],
        "methods": [key for key, cls in methods().items() if family.input == "input_ids" or cls.needs == "nothing"],
    }


def _parameters(model: nn.Module) -> int:
    """Tied parameters count once; those of a streamed model are one where they are one on disk."""
    source = source_of(model)
    named = dict(model.named_parameters())
    if isinstance(source, Streamed):
        named = {source.keys[name]: parameter for name, parameter in named.items()}
    return sum(parameter.numel() for parameter in named.values())


def _groups(model: nn.Module, family: Anatomy) -> dict[str, int]:
    """How many coupled groups of each kind a block has, as far as the configuration tells."""
    config = getattr(model, "config", None)
    groups: dict[str, int] = {}
    if family.mlp:
        output = next(s for s in sites_of(model, family)[0] if s.projection == family.mlp.output)
        groups["neurons"] = output.shape[1]
    if family.attention:
        heads = getattr(config, "num_attention_heads", None)
        if heads:
            groups["heads"] = int(heads)
            groups["KV groups"] = int(getattr(config, "num_key_value_heads", None) or heads)
    hidden = getattr(config, "hidden_size", None)
    if hidden:
        groups["hidden dimensions"] = int(hidden)
    return groups
