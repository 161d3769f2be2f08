"""Which parameters of a network may lose weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    Conv1D,
)

TRANSPOSED = (Conv1D, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # weights [in, out, *kernel]


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Weights of linear and convolutional layers, by name, in the order of the modules.

    A language model's output head and whatever is tied to an embedding stay dense; so do biases and norms.

    Args:
        model: any module.
        exclude: patterns such as `fc.*` or `*.downsample.*` of names that stay dense.

    Raises:
        BillhookError: a pattern matches nothing, or nothing is left.
    """
    kept_dense = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and hasattr(head, "weight"):
        kept_dense.add(id(head.weight))
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, _LAYERS) and id(module.weight) not in kept_dense | seen:
            seen.add(id(module.weight))
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found[f"{path}.weight" if path else "weight"] = weight
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise BillhookError(
                f"exclude={pattern!r} matches no prunable weight; their names are like {', '.join(list(found)[:3])}."
            )
    found = {n: p for n, p in found.items() if not any(fnmatchcase(n, pattern) for pattern in exclude)}
    if not found:
        raise BillhookError(
            "There is nothing to prune: the model has no linear or convolutional weight outside embeddings, output "
            "head and what is excluded."
        )
    return found
