"""Named points of a slim block at which its activations can be multiplied: what a gate at zero does, removal does too.

attention.in    what query, key and value read, after the norm         keep_reads_(block, "attention", ...)
attention.out   what the attention adds to the stream, with its bias   keep_writes_(block, "attention", ...)
mlp.in          what gate and up read, after the norm                  keep_reads_(block, "mlp", ...)
mlp.mid         the neurons                                            keep_neurons_(block, ...)
mlp.out         what the MLP adds to the stream, with its bias         keep_writes_(block, "mlp", ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from billhook.surgery.modeling_slim import SlimBlock


def points(block: nn.Module) -> dict[str, int]:
    """The points of a block and how many channels each has, in the order of execution."""
    assert isinstance(block, SlimBlock)
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    found: dict[str, int] = {}
    if attention is not None:
        found |= {"attention.in": attention.q_proj.in_features, "attention.out": attention.o_proj.out_features}
    if mlp is not None:
        found |= {"mlp.in": mlp.up_proj.in_features, "mlp.mid": mlp.down_proj.in_features}
        found["mlp.out"] = mlp.down_proj.out_features
    return found


@contextmanager
def gated(blocks: Sequence[nn.Module], gate: Callable[[int, str], Tensor]) -> Iterator[None]:
    """While inside, activations are multiplied by `gate(block, point)`, [channels], cast to their dtype.

    `gate` is asked in every forward pass.
    """
    handles = []

    def before(index: int, point: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * gate(index, point).to(args[0].dtype), *args[1:])

        return hook

    def after(index: int, point: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output * gate(index, point).to(output.dtype)

        return hook

    try:
        for index, block in enumerate(blocks):
            for point in points(block):
                place = block.get_submodule(_PLACES[point])
                if point.endswith("out"):
                    handles.append(place.register_forward_hook(after(index, point)))
                else:
                    handles.append(place.register_forward_pre_hook(before(index, point)))
        yield
    finally:
        for handle in handles:
            handle.remove()


_PLACES = {
    "attention.in": "self_attn",
    "attention.out": "self_attn.o_proj",
    "mlp.in": "mlp",
    "mlp.mid": "mlp.down_proj",
    "mlp.out": "mlp.down_proj",
}
