"""Which parts of a network can carry gates, what they cost, and how closed ones are removed.

block    residual branches: x + F(x) in a traceable network; attention and MLP of a declared family
channel  channels that one layer makes and others read, in a traceable network; residual streams have many makers
neuron   intermediate neurons of each MLP of a declared family
head     heads of a declared family; with grouped queries a key/value head and its query heads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from billhook.anatomy import anatomy_of, block_names, families, find_blocks
from billhook.anatomy.anatomy import join
from billhook.errors import BillhookError
from billhook.surgery.channels import keep_all_
from billhook.surgery.coupling import ChannelGroup, Tracer, owner_of, trace
from billhook.surgery.shrink import drop_attention_, drop_mlp_, keep_kv_heads_, keep_neurons_
from billhook.surgery.slim import is_slim, settle_, slim_
from billhook.training.gating import Cost, Factor, Place, Unit

Units = Literal["block", "channel", "neuron", "head"]


@dataclass(frozen=True)
class Gateable:
    """Attributes:
    units: what carries gates, in forward order.
    costs: floating-point operations of what can be removed, as they depend on the gates.
    flops: of the whole model on the example.
    remove: takes the decisions of all units (bool [gates]) and removes the closed parts from the model.
    """

    units: list[Unit]
    costs: list[Cost]
    flops: int
    remove: Callable[[Sequence[Tensor]], None]


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of all inputs, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def count_flops(model: nn.Module, example: Any) -> dict[str, int]:
    """Floating-point operations of each module on an example, by name; "" is the model.

    Counted by torch: matrix products, convolutions and fused attention where torch knows it (not on a CPU); two for a
    multiplication with addition.
    """
    modes = [(module, module.training) for module in model.modules()]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            call(model.eval(), example)
    except Exception as error:  # the model's own, on an input that it does not take
        raise BillhookError(
            f"{type(model).__name__} does not run on the example ({str(error).splitlines()[0]}): give an input of the "
            "shape that it takes."
        ) from None
    finally:
        for module, mode in modes:
            module.training = mode
    root = type(model).__name__
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    return {"": counts["Global"]} | {
        name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")
    }


def find_units(kind: Units, model: nn.Module, example: Any) -> Gateable:
    """What of a model can carry gates of this kind.

    Args:
        kind: see the module.
        model: left as it is.
        example: an input: a tensor, a tuple of all inputs, or a mapping of keyword arguments.

    Raises:
        BillhookError: nothing can; the model cannot be traced or its family is not declared; it does not run.
    """
    flops = count_flops(model, example)
    declared = getattr(getattr(model, "config", None), "model_type", None) in families()
    if kind in ("neuron", "head") or (kind == "block" and declared):
        found = _of_family(kind, model, flops)
    elif isinstance(example, Mapping):
        raise BillhookError(f"Gates of units={kind} trace the model: give the example as a tensor or a tuple of all.")
    else:
        found = (_channels if kind == "channel" else _residuals)(model, example, flops)
    if not found.units:
        what = {
            "block": "no residual block x + F(x) whose branch ends in a module of its own",
            "channel": "no channels that one layer makes and others read and that may leave",
        }.get(kind, f"no {kind}s")
        raise BillhookError(f"{type(model).__name__} has {what}, so units={kind} has nothing to gate.")
    return found


# channels


def _channels(model: nn.Module, example: Any, flops: dict[str, int]) -> Gateable:
    tracer = Tracer(model, example)
    readers: dict[str, list[fx.Node]] = {}  # module -> what it reads, once per call
    for node in tracer.graph.nodes:
        if node.op == "call_module":
            readers.setdefault(str(node.target), []).append(node.all_input_nodes[0])
    units: list[Unit] = []
    groups: list[ChannelGroup] = []
    by_axis: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for group in tracer.groups():
        makers = list(dict.fromkeys(owner_of(slot.tensor) for slot in group.producers))
        read = [node for maker in makers for node in readers.get(maker, [])]
        hidden = len(set(read)) == 1 and len(read) == len(makers)
        if group.fixed or group.size < 2 or not hidden or not group.consumers:
            continue
        first = model.get_submodule(makers[0])
        axis = -1 - len(first.kernel_size) if isinstance(first, _ConvNd) else -1
        places = []
        for slot in group.consumers:
            owner = torch.full((slot.length,), group.size)
            owner[slot.index] = torch.arange(group.size)[:, None].expand_as(slot.index)
            module = model.get_submodule(owner_of(slot.tensor))
            columns, along = owner, -1
            if isinstance(module, _ConvNd):
                columns, along = owner.repeat(module.in_channels // slot.length), -1 - len(module.kernel_size)
            as_they_are = torch.equal(columns, torch.arange(group.size))
            places.append(Place(owner_of(slot.tensor), "input", along, None if as_they_are else columns))
        width = tracer.shapes[read[0]][axis]
        for slot in group.slots:
            if slot.tensor.endswith(".weight") and slot.role != "norm":
                by_axis.setdefault((owner_of(slot.tensor), slot.axis), []).append(
                    (len(units), slot.index.shape[1] / slot.length)
                )
        units.append(Unit(group.name, group.size, makers[0], axis, width, tuple(places), True))
        groups.append(group)
    factors: dict[str, list[Factor]] = {}
    for (module_name, _), each in by_axis.items():
        fixed = 1 - sum(units[unit].gates * share for unit, share in each)
        factors.setdefault(module_name, []).append(Factor(fixed, tuple(each)))
    costs = [Cost(flops[name], tuple(found)) for name, found in factors.items() if flops.get(name)]

    def remove(opened: Sequence[Tensor]) -> None:
        keep_all_(model, [(group, stay.nonzero().flatten()) for group, stay in zip(groups, opened, strict=True)])

    return Gateable(units, costs, flops[""], remove)


# residual blocks


@dataclass(frozen=True)
class _Residual:
    """A module that computes act(x + F(x))."""

    end: str  # last module of F, by its name in the block
    act: nn.Module | None


def _residuals(model: nn.Module, example: Any, flops: dict[str, int]) -> Gateable:
    shapes = _single_calls(model, example)
    found: dict[str, _Residual] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        residual = None if not name or name not in shapes or inside else _residual(module)
        if residual is not None and join(name, residual.end) in shapes:
            found[name] = residual
    for name in _refuted(model, example, found):
        del found[name]
    units = []
    for name, residual in found.items():
        conv = any(isinstance(m, _ConvNd) for m in model.get_submodule(name).modules())
        axis = 1 if conv else -1
        place = Place(join(name, residual.end), "output")
        units.append(Unit(name, 1, name, axis, shapes[name][axis], (place,), False))
    costs = [Cost(flops.get(unit.name, 0), (Factor(0.0, ((i, 1.0),)),)) for i, unit in enumerate(units)]

    def remove(opened: Sequence[Tensor]) -> None:
        closed = [unit.name for unit, stay in zip(units, opened, strict=True) if not bool(stay)]
        plain = _identities(model, found)
        for name in reversed(closed):  # the numbers of later ones change when one leaves
            parent, child = model.get_submodule(owner_of(name)), name.rpartition(".")[2]
            if type(parent) is nn.Sequential and name in plain:
                del parent[list(parent._modules).index(child)]
            else:
                setattr(parent, child, nn.Identity() if name in plain else found[name].act)

    return Gateable(units, costs, flops[""], remove)


def _single_calls(model: nn.Module, example: Any) -> dict[str, torch.Size]:
    """Shape of the input of each module that is called once, with one tensor, and returns one of any shape."""
    calls: dict[str, list[torch.Size | None]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            calls.setdefault(name, []).append(args[0].shape if plain else None)

        return record

    hooks = [m.register_forward_hook(recorder(name), with_kwargs=True) for name, m in model.named_modules()]
    _quietly(model, example, hooks)
    return {name: shapes[0] for name, shapes in calls.items() if len(shapes) == 1 and shapes[0] is not None}


def _quietly(model: nn.Module, example: Any, hooks: Sequence[Any]) -> None:
    """Run in evaluation mode, then remove the hooks and restore the modes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            call(model.eval(), example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def _residual(module: nn.Module) -> _Residual | None:
    """Read from the module's own graph whether it is act(x + F(x)), with x untouched and F ending in a module."""
    try:
        graph = trace(module).graph
    except BillhookError:
        return None
    x, *others = [node for node in graph.nodes if node.op == "placeholder"] or [None]
    value = next(node for node in graph.nodes if node.op == "output").args[0]
    if x is None or others or not isinstance(value, fx.Node):
        return None
    act: nn.Module | None = None
    if _operation(module, value) != "add":
        if value.op == "call_module" and type(module.get_submodule(str(value.target))).__module__.endswith(
            "activation"
        ):
            act = module.get_submodule(str(value.target))
        elif value.op != "call_module" and _operation(module, value) == "relu":
            act = nn.ReLU()
        if act is None or len(value.all_input_nodes) != 1:
            return None
        value = value.all_input_nodes[0]
    if _operation(module, value) != "add" or len(value.users) != 1 or len(value.args) != 2 or value.kwargs:
        return None
    for skip, end in (value.args, value.args[::-1]):
        while isinstance(skip, fx.Node) and _operation(module, skip) == "identity":
            skip = skip.all_input_nodes[0]
        if skip is x and isinstance(end, fx.Node) and end.op == "call_module" and len(end.users) == 1:
            return _Residual(str(end.target), act)
    return None


def _operation(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__.lower()
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "?")).rstrip("_")
    return {"iadd": "add"}.get(name, name)


def _refuted(model: nn.Module, example: Any, found: dict[str, _Residual]) -> list[str]:
    """Blocks that are not act(x) when their branch is zero, because they change x in place, for example."""
    entered: dict[str, Tensor] = {}
    wrong: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: entered.update({name: args[0].clone()})

    def leave(name: str, act: nn.Module | None) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, output: Tensor) -> None:
            expected = entered.pop(name)
            if not torch.equal(output, expected if act is None else act(expected)):
                wrong.append(name)

        return compare

    hooks: list[Any] = []
    for name, residual in found.items():
        block = model.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(enter(name)))
        hooks.append(block.register_forward_hook(leave(name, residual.act)))
        end = block.get_submodule(residual.end)
        hooks.append(end.register_forward_hook(lambda module, args, output: torch.zeros_like(output)))
    _quietly(model, example, hooks)
    return wrong


def _identities(model: nn.Module, found: dict[str, _Residual]) -> set[str]:
    """Blocks that are the identity when closed: without act, or with a ReLU after what another ReLU let through."""

    class Whole(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return module_qualified_name in found or super().is_leaf_module(m, module_qualified_name)

    def positive(node: fx.Node) -> bool:
        if node.op == "call_module" and str(node.target) in found:
            return isinstance(found[str(node.target)].act, nn.ReLU)
        name = _operation(model, node)
        if any(word in name for word in ("pool", "dropout", "identity", "flatten", "contiguous")):
            return positive(node.all_input_nodes[0])
        return name in ("relu", "relu6", "sigmoid", "abs")

    plain = {name for name, residual in found.items() if residual.act is None}
    try:
        graph = Whole().trace(model)
    except Exception:  # what cannot be traced keeps its ReLUs, which is right too
        return plain
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in found and isinstance(found[name].act, nn.ReLU):
            plain |= {name} if positive(node.all_input_nodes[0]) else set()
    return plain


# declared families


def _of_family(kind: Units, model: Any, flops: dict[str, int]) -> Gateable:
    anatomy = anatomy_of(model)
    attention, mlp = anatomy.attention, anatomy.mlp
    if attention is None or mlp is None:
        raise BillhookError(
            f"The anatomy of family {anatomy.family!r} names no attention and MLP, so units={kind} has nothing to "
            "gate: declare both with bh.declare(bh.Anatomy(...))."
        )
    if is_slim(model):
        raise BillhookError("The blocks of this model were narrowed before: attach gates to the original model.")
    units: list[Unit] = []
    costs: list[Cost] = []
    removals: list[tuple[int, Callable[[nn.Module, Tensor], None]]] = []

    def add(index: int, part: str, source: str, place: Place, gates: int, whole: int, removal: Any) -> None:
        channels = _width_in(model.get_submodule(source))
        costs.append(Cost(whole, (Factor(0.0, ((len(units), 1 / gates),)),)))
        units.append(Unit(part, gates, source, -1, channels, (place,), kind != "block"))
        removals.append((index, removal))

    for index, name in enumerate(block_names(model, anatomy)):
        output, down = join(name, attention.output), join(name, mlp.output)
        source, read = join(name, attention.inputs[0]), join(name, mlp.inputs[0])
        inside = [join(name, attention.module)] + [output] * (not output.startswith(join(name, attention.module)))
        whole = sum(flops.get(part, 0) for part in inside)
        dense = sum(flops.get(join(name, part), 0) for part in (*mlp.inputs, mlp.output))
        if kind == "head":
            heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
            width = _width_in(model.get_submodule(output))
            owner = torch.arange(heads).repeat_interleave(width // heads)
            add(index, join(name, attention.module), source, Place(output, "input", -1, owner), heads, whole, _heads)
        elif kind == "neuron":
            width = _width_in(model.get_submodule(down))
            add(index, down, read, Place(down, "input"), width, dense, _neurons)
        else:
            add(index, join(name, attention.module), source, Place(output, "output"), 1, whole, _attention)
            add(index, down, read, Place(down, "output"), 1, dense, _mlp)

    def remove(opened: Sequence[Tensor]) -> None:
        if all(bool(stay.all()) for stay in opened):
            return
        slim_(model)
        blocks = find_blocks(model, anatomy_of(model))
        for (index, removal), stay in zip(removals, opened, strict=True):
            if not bool(stay.all()):
                removal(blocks[index], stay.nonzero().flatten().cpu())
        settle_(model)

    return Gateable(units, costs, flops[""], remove)


def _heads(block: nn.Module, keep: Tensor) -> None:
    keep_kv_heads_(block, keep)


def _neurons(block: nn.Module, keep: Tensor) -> None:
    keep_neurons_(block, keep)


def _attention(block: nn.Module, keep: Tensor) -> None:
    drop_attention_(block)


def _mlp(block: nn.Module, keep: Tensor) -> None:
    drop_mlp_(block)


def _width_in(module: Any) -> int:
    """Inputs of a linear layer of either layout."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)
