"""Coupled channels of a network that torch.fx can trace.

Every position along an axis of a weight has a label. One pass over the traced graph joins labels: those of a
convolution's inputs with those of what it reads, those of two summands, those that a pixel shuffle interleaves.
Positions with the same label leave together; channels whose labels sit in the same places are one group.

Own code, because groups from the dependency graph of torch-pruning 1.6, the kept library for this, leave networks that
do not run where there are grouped convolutions, pixel shuffles, or chunks that are joined again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from billhook.errors import BillhookError

Role = Literal["produce", "shift", "scale", "norm", "consume"]
"""What a slot does to a channel.

produce: makes it (rows of a convolution or linear layer, and their bias)
scale:   multiplies it (a depthwise kernel, PReLU's slope, a factor per channel)
shift:   is added to it (the bias of a depthwise convolution, a summand per channel)
norm:    a vector of a BatchNorm or InstanceNorm
consume: reads it (columns)
"""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the channels of a group sit in one tensor."""

    tensor: str  # dotted name of a parameter or buffer
    axis: int
    role: Role
    index: Tensor  # [channels, k] long: the k positions of each channel along the axis
    length: int  # of the axis

    def rows(self, tensor: Tensor) -> Tensor:
        """What each channel has in this tensor, [channels, k * the rest]."""
        return tensor.movedim(self.axis, 0)[self.index.to(tensor.device)].flatten(1)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are interchangeable: each has its slices in the same tensors, and these leave together."""

    name: str  # of the module that makes them first; with " #2" if that makes several groups
    size: int  # channels
    slots: tuple[Slot, ...]  # in the order in which the graph meets them
    fixed: str | None  # why none of them may leave, or None
    homogeneous: bool  # whether a positive factor passes from producers to consumers (ReLU yes, GELU no)

    def of(self, *roles: Role) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role in roles)

    @property
    def producers(self) -> tuple[Slot, ...]:
        return self.of("produce")

    @property
    def through(self) -> tuple[Slot, ...]:
        return self.of("shift", "scale", "norm")

    @property
    def consumers(self) -> tuple[Slot, ...]:
        return self.of("consume")


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a model; it shares the model's modules.

    Raises:
        BillhookError: its forward pass cannot be traced.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # whatever the model's own code does with a symbolic value
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BillhookError(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}): its forward pass must not branch on "
            "values. Give a submodule that can be, such as its backbone."
        ) from None


def fetch(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(model.get_submodule(owner_of(name)), name.rpartition(".")[2])
    return tensor


def owner_of(name: str) -> str:
    return name.rpartition(".")[0]


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


# Tracing


@dataclass(frozen=True)
class _Flow:
    """What is known of a tensor in the graph: the labels along its channel axis, or why they are not known."""

    axis: int = -1
    labels: tuple[int, ...] = ()
    closed: str | None = None


class _Labels:
    """Disjoint sets of integers."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def fresh(self, count: int) -> tuple[int, ...]:
        start = len(self._parent)
        self._parent += range(start, start + count)
        return tuple(range(start, start + count))

    def find(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def join(self, first: int, second: int) -> None:
        a, b = self.find(first), self.find(second)
        self._parent[max(a, b)] = min(a, b)


# A factor s > 0 on a channel passes through as s (exactly), or does not. A name in neither set is unknown.
_HOMOGENEOUS = frozenset(
    """relu leaky_relu prelu identity dropout dropout1d dropout2d dropout3d feature_dropout contiguous clone detach abs
    neg float double half to max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate
    upsample upsamplingbilinear2d upsamplingnearest2d zeropad1d zeropad2d zeropad3d reflectionpad1d reflectionpad2d
    replicationpad1d replicationpad2d replicationpad3d circularpad2d""".split()  # noqa: SIM905 -- a page of quotes
)
_BENT = frozenset(
    """relu6 hardtanh hardswish hardsigmoid sigmoid logsigmoid tanh gelu silu mish elu celu selu softplus softsign
    hardshrink softshrink threshold clamp exp sqrt rsqrt square log pow""".split()  # noqa: SIM905
)
_BINARY = {"add": True, "sub": True, "mul": False, "div": False, "truediv": False, "maximum": True, "minimum": True}
_ALIASES = {
    "maxpool": "max_pool",
    "avgpool": "avg_pool",
    "adaptiveavgpool": "adaptive_avg_pool",
    "adaptivemaxpool": "adaptive_max_pool",
    "leakyrelu": "leaky_relu",
    "pixelshuffle": "pixel_shuffle",
    "pixelunshuffle": "pixel_unshuffle",
}


class Tracer(fx.Interpreter):
    """Runs a model once and follows its channels.

    After the construction: the graph in `traced`, and `shapes` by node.
    """

    def __init__(self, model: nn.Module, example: Tensor | tuple[Any, ...]) -> None:
        graph_module = trace(model)
        super().__init__(graph_module)
        self.traced = graph_module
        self.shapes: dict[fx.Node, torch.Size] = {}
        self._model = model
        self._labels = _Labels()
        self._flows: dict[fx.Node, Any] = {}
        self._slots: dict[tuple[str, int], tuple[Role, tuple[int, ...]]] = {}
        self._fixed: list[tuple[tuple[int, ...], str]] = []
        self._bent: list[tuple[int, ...]] = []
        self._shared = _shared_parameters(model)
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            graph_module.eval()
            with torch.no_grad():
                self.run(*_doubled(example if isinstance(example, tuple) else (example,)))
        except BillhookError:
            raise
        except Exception as error:  # the model's own, on an input that it does not take
            raise BillhookError(
                f"{type(model).__name__} does not run on the example ({str(error).splitlines()[0]}): give an input of "
                "the shape that it takes."
            ) from None
        finally:
            for module, mode in modes:
                module.training = mode

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        self._flows[n] = self._checked(self._step(n, result), result)
        return result

    def groups(self) -> list[ChannelGroup]:
        find = self._labels.find
        places: dict[int, dict[tuple[str, int], list[int]]] = {}
        for key, (_, labels) in self._slots.items():
            for position, label in enumerate(labels):
                places.setdefault(find(label), {}).setdefault(key, []).append(position)
        fixed: dict[int, str] = {}
        for labels, reason in self._fixed:
            for label in labels:
                fixed.setdefault(find(label), reason)
        bent = {find(label) for labels in self._bent for label in labels}
        alike: dict[Any, list[int]] = {}
        for root, where in places.items():
            signature = (tuple((key, len(positions)) for key, positions in where.items()), root in fixed, root in bent)
            alike.setdefault(signature, []).append(root)
        result, taken = [], dict[str, int]()
        for (where, is_fixed, is_bent), roots in alike.items():
            slots = []
            for key, _ in where:
                role, labels = self._slots[key]
                index = torch.tensor([places[root][key] for root in roots])
                slots.append(Slot(key[0], key[1], role, index, len(labels)))
            made = next((slot for slot in slots if slot.role == "produce"), None)
            name = owner_of(made.tensor) if made else f"input of {owner_of(slots[0].tensor)}"
            taken[name] = taken.get(name, 0) + 1
            name += f" #{taken[name]}" if taken[name] > 1 else ""
            result.append(
                ChannelGroup(name, len(roots), tuple(slots), fixed[roots[0]] if is_fixed else None, not is_bent)
            )
        return result

    # labels

    def _fix(self, labels: Sequence[int], reason: str) -> None:
        self._fixed.append((tuple(labels), reason))

    def _slot(self, tensor: str, axis: int, role: Role, labels: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The labels along an axis of a tensor, joined with `labels` if given."""
        key = (tensor, axis)
        if key not in self._slots:
            width = fetch(self._model, tensor).shape[axis]
            self._slots[key] = (role, self._labels.fresh(width) if labels is None else labels)
            if tensor in self._shared:
                self._fix(self._slots[key][1], f"are in {tensor}, which several modules share")
        known = self._slots[key][1]
        if labels is not None:
            self._tie(known, labels)
        return known

    def _tie(self, first: Sequence[int], second: Sequence[int]) -> None:
        for a, b in zip(first, second, strict=True):
            self._labels.join(a, b)

    def _seal(self, flows: Iterable[Any], reason: str) -> _Flow:
        """Nothing is known beyond this point: no channel that enters may leave the network."""
        for flow in flows:
            if isinstance(flow, list):
                self._seal(flow, reason)
            elif isinstance(flow, _Flow):
                self._fix(flow.labels, reason)
        return _Flow(closed=reason)

    # one node

    def _step(self, node: fx.Node, result: Any) -> Any:
        flows: list[Any] = [self._flows[n] for n in node.all_input_nodes]
        if node.op == "placeholder":
            return _Flow(closed="read the network's input")
        if node.op == "output":
            return self._seal(flows, "reach the network's output")
        if node.op == "get_attr":
            return None  # the operation that reads it decides
        name = self._operation(node)
        if not isinstance(result, Tensor) and not (isinstance(result, (tuple, list)) and name in ("chunk", "split")):
            if name in ("size", "getattr", "dim", "numel", "getitem", "eq", "floordiv", "mul", "add", "sub", "int"):
                return None
            return self._seal(flows, f"enter {node.name}, which is not known to keep channels apart")
        output: Any = result
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            flow = flows[0]
            if is_parametrized(module) or not isinstance(flow, _Flow) or len(flows) > 1:
                return self._seal(flows, f"enter {node.target}, which is not known to keep channels apart")
            if isinstance(module, _ConvNd):
                return self._conv(node, module, flow, output)
            if isinstance(module, nn.Linear):
                return self._linear(node, module, flow, output)
            if isinstance(module, (_BatchNorm, _InstanceNorm)):
                return self._norm(node, module, flow)
            if isinstance(module, nn.PReLU) and module.num_parameters > 1 and flow.closed is None:
                self._slot(f"{node.target}.weight", 0, "scale", flow.labels)
            if isinstance(module, (nn.PixelShuffle, nn.PixelUnshuffle)):
                factor = getattr(module, "upscale_factor", None) or getattr(module, "downscale_factor", None)
                return self._shuffle(flow, name, int(factor or 1), output)
            if isinstance(module, nn.Flatten):
                return self._reshape(node, flow, output, free=True)
        if name in _BINARY:
            return self._binary(node, name, output)
        live = [flow for flow in flows if isinstance(flow, list) or (isinstance(flow, _Flow) and not flow.closed)]
        if not live and name != "cat":
            return next((flow for flow in flows if isinstance(flow, _Flow)), None)
        rule: Callable[[fx.Node, Any, Any], Any] | None = getattr(self, f"_on_{name}", None)
        # what else an operation reads must not carry channels, and no weight whose width this class cannot follow
        alone = len(live) == 1 and flows[0] is live[0] and all(n.op != "get_attr" for n in node.all_input_nodes)
        spatial = any(word in name for word in ("pool", "pad", "upsampl", "interpolate"))
        if rule is not None and (alone or name == "cat"):
            return rule(node, flows[0], result)
        if alone and isinstance(flows[0], _Flow) and not (spatial and name != "pad" and flows[0].axis != 1):
            if name in _BENT:
                self._bent.append(flows[0].labels)
                return flows[0]
            if name in _HOMOGENEOUS:
                return flows[0]
        return self._seal(flows, f"enter {node.name}, which is not known to keep channels apart")

    def _operation(self, node: fx.Node) -> str:
        """The name of what a node does, the same for module, function and method."""
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            if not type(module).__module__.startswith("torch.nn"):
                return "?"
            name = type(module).__name__.lower()
            for old, new in _ALIASES.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            return name
        if node.op == "call_method":
            return str(node.target).rstrip("_")
        if not str(getattr(node.target, "__module__", None) or "torch").startswith(("torch", "_operator", "builtins")):
            return "?"
        name = str(getattr(node.target, "__name__", "?")).rstrip("_")
        in_place = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
        return in_place.get(name, {"concat": "cat", "concatenate": "cat", "multiply": "mul"}.get(name, name))

    def _checked(self, flow: Any, result: Any) -> Any:
        """A rule that got a shape wrong must not cost a channel: nothing may leave then."""
        if isinstance(flow, _Flow) and flow.closed is None and isinstance(result, Tensor):
            axis = flow.axis
            if not 0 <= axis < result.ndim or result.shape[axis] != len(flow.labels):
                return self._seal([flow], "enter an operation that moves them in an unknown way")
        return flow

    def _conv(self, node: fx.Node, module: _ConvNd, flow: _Flow, result: Tensor) -> _Flow:
        name, transposed = str(node.target), isinstance(module, _ConvTransposeNd)
        axis = result.ndim - len(module.kernel_size) - 1
        if flow.closed is None and flow.axis != axis:
            flow = self._seal([flow], f"enter {name} along an axis that is not its channels'")
        if transposed and module.groups > 1:
            return self._seal([flow], f"enter {name}, a transposed convolution in groups")
        if is_depthwise(module):
            out = self._slot(f"{name}.weight", 0, "scale")
            if flow.closed is not None:
                self._fix(out, flow.closed)
            else:
                each = module.out_channels // module.groups
                self._tie([label for label in flow.labels for _ in range(each)], out)
        else:
            into = self._slot(f"{name}.weight", 0 if transposed else 1, "consume")
            self._read(flow, into * module.groups)
            out = self._slot(f"{name}.weight", 1 if transposed else 0, "produce")
            share = len(out) // module.groups
            self._tie(out, out[:share] * module.groups)
        if module.bias is not None:
            self._slot(f"{name}.bias", 0, "shift" if is_depthwise(module) else "produce", out)
        return _Flow(axis, out)

    def _linear(self, node: fx.Node, module: nn.Linear, flow: _Flow, result: Tensor) -> _Flow:
        name = str(node.target)
        if flow.closed is None and flow.axis != result.ndim - 1:
            flow = self._seal([flow], f"enter {name} along an axis that is not its features'")
        self._read(flow, self._slot(f"{name}.weight", 1, "consume"))
        out = self._slot(f"{name}.weight", 0, "produce")
        if module.bias is not None:
            self._slot(f"{name}.bias", 0, "produce", out)
        return _Flow(result.ndim - 1, out)

    def _read(self, flow: _Flow, columns: tuple[int, ...]) -> None:
        if flow.closed is not None:
            self._fix(columns, flow.closed)
        else:
            self._tie(flow.labels, columns)

    def _norm(self, node: fx.Node, module: Any, flow: _Flow) -> _Flow:
        vectors = [v for v in ("weight", "bias", "running_mean", "running_var") if getattr(module, v) is not None]
        if not vectors:
            return self._seal([flow], f"enter {node.target}, whose width is not in any tensor")
        if flow.closed is None and flow.axis != 1:
            return self._seal([flow], f"enter {node.target} along an axis that is not its features'")
        for vector in vectors:
            labels = self._slot(f"{node.target}.{vector}", 0, "norm", flow.labels or None)
            if flow.closed is not None:
                self._fix(labels, flow.closed)
        return flow

    def _binary(self, node: fx.Node, name: str, result: Tensor) -> _Flow:
        """Elementwise on two operands, with broadcasting."""
        full: list[_Flow] = []
        unknown: list[str] = []
        attributes: list[str] = []
        scalars = 0
        for operand in node.args[:2]:
            if not isinstance(operand, fx.Node) or operand not in self.shapes:
                scalars += 1
                continue
            flow = self._flows[operand]
            if flow is None and operand.op == "get_attr":
                attributes.append(str(operand.target))
            elif not isinstance(flow, _Flow):
                unknown.append("meet a value of unknown origin")
            elif flow.closed is not None:
                unknown.append(flow.closed)
            elif len(flow.labels) > 1 or result.shape[flow.axis + result.ndim - len(self.shapes[operand])] == 1:
                full.append(_Flow(flow.axis + result.ndim - len(self.shapes[operand]), flow.labels))
        if not full or len({flow.axis for flow in full}) > 1:
            return self._seal(full, unknown[0] if unknown else f"meet others along another axis in {node.name}")
        axis, labels = full[0].axis, full[0].labels
        for flow in full[1:]:
            self._tie(labels, flow.labels)
        for reason in unknown:
            self._fix(labels, reason)
        for attribute in attributes:
            tensor = fetch(self._model, attribute)
            own = axis - (result.ndim - tensor.ndim)
            if own >= 0 and tensor.shape[own] == len(labels):
                self._slot(attribute, own, "shift" if _BINARY[name] else "scale", labels)
            if name != "mul":
                self._bent.append(labels)
        maps = sum(isinstance(operand, fx.Node) and operand in self.shapes for operand in node.args[:2])
        beside = maps - len(attributes) > len(full)  # a map of one channel, or of unknown ones
        if beside or (bool(scalars) if name != "mul" else len(full) > 1):
            self._bent.append(labels)
        return _Flow(axis, labels)

    # one operation each: (node, flow of the first operand, result) -> flow

    def _on_cat(self, node: fx.Node, flow: Any, result: Tensor) -> _Flow:
        parts = node.args[0]
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
            return self._seal([flow], f"enter {node.name}, whose parts are not known")
        dim %= result.ndim
        flows: list[_Flow] = [self._flows[part] for part in parts if isinstance(part, fx.Node)]
        known = [f for f in flows if isinstance(f, _Flow) and f.closed is None]
        if not known or (len(known) < len(flows) and dim != known[0].axis) or len({f.axis for f in known}) > 1:
            reasons = [f.closed for f in flows if isinstance(f, _Flow) and f.closed is not None]
            return self._seal(flows, reasons[0] if reasons else f"are joined along another axis in {node.name}")
        if dim != known[0].axis:
            for other in known[1:]:
                self._tie(known[0].labels, other.labels)
            return known[0]
        labels: tuple[int, ...] = ()
        for part, f in zip(parts, flows, strict=True):
            if isinstance(f, _Flow) and f.closed is None:
                labels += f.labels
            else:
                fresh = self._labels.fresh(self.shapes[part][dim])
                self._fix(fresh, f.closed if isinstance(f, _Flow) and f.closed else "are of unknown origin")
                labels += fresh
        return _Flow(dim, labels)

    def _on_chunk(self, node: fx.Node, flow: _Flow, result: Any) -> Any:
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if not isinstance(dim, int):
            return self._seal([flow], f"are split by {node.name} along an unknown axis")
        dim %= result[0].ndim
        if dim != flow.axis:
            return [flow for _ in result]
        width = len(flow.labels) // len(result)
        if (
            node.target == "split"
            or getattr(node.target, "__name__", "") == "split"
            or width * len(result) != len(flow.labels)
        ):
            return self._seal([flow], f"are split by {node.name} at constant positions")
        self._tie(flow.labels, flow.labels[:width] * len(result))  # equal parts stay equal: one channel of each leaves
        return [_Flow(dim, flow.labels[k * width : (k + 1) * width]) for k in range(len(result))]

    _on_split = _on_chunk

    def _on_getitem(self, node: fx.Node, flow: Any, result: Any) -> Any:
        where = node.args[1]
        if isinstance(flow, list):
            if isinstance(where, int):
                return flow[where]
            return self._seal(flow, f"enter {node.name}, which is not known to keep channels apart")
        shape = self.shapes[node.all_input_nodes[0]]
        parts = list(where) if isinstance(where, tuple) else [where]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
        parts += [slice(None)] * (len(shape) - len(parts))
        plain = all(isinstance(part, (slice, int)) for part in parts) and len(parts) == len(shape)
        if not plain or parts[flow.axis] != slice(None):
            return self._seal([flow], f"are indexed at constant positions by {node.name}")
        return _Flow(flow.axis - sum(isinstance(part, int) for part in parts[: flow.axis]), flow.labels)

    def _on_mean(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [given] if isinstance(given, int) else given
        before = len(self.shapes[node.all_input_nodes[0]])
        if not isinstance(dims, (list, tuple)) or any(int(d) % before == flow.axis for d in dims):
            return self._seal([flow], f"are reduced together by {node.name}")
        gone = 0 if result.ndim == before else sum(int(d) % before < flow.axis for d in dims)
        return _Flow(flow.axis - gone, flow.labels)

    _on_sum = _on_std = _on_amax = _on_amin = _on_mean

    def _on_var(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        self._bent.append(flow.labels)
        return self._on_mean(node, flow, result)

    def _on_pad(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        pad = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        at = 2 * (result.ndim - 1 - flow.axis)
        if not isinstance(pad, (list, tuple)):
            return self._seal([flow], f"are padded by an unknown amount in {node.name}")
        low, high = pad[at : at + 2] if len(pad) > at else (0, 0)
        plain = isinstance(low, int) and isinstance(high, int) and low >= 0 and high >= 0
        if not plain or ((low or high) and mode != "constant"):
            return self._seal([flow], f"are padded in {node.name} by what is not a constant")
        if value:
            self._bent.append(flow.labels)
        ends = [self._labels.fresh(int(low)), self._labels.fresh(int(high))]
        for end in ends:
            self._fix(end, f"are tied to the constant width of the padding in {node.name}")
        return _Flow(flow.axis, ends[0] + flow.labels + ends[1])

    def _shuffle(self, flow: _Flow, name: str, factor: int, result: Tensor) -> _Flow:
        if flow.closed is not None or flow.axis != result.ndim - 3:
            return self._seal([flow], flow.closed or "are shuffled along another axis")
        square = factor * factor
        if name == "pixel_unshuffle":
            return _Flow(flow.axis, tuple(label for label in flow.labels for _ in range(square)))
        first = flow.labels[::square]
        self._tie(flow.labels, [label for label in first for _ in range(square)])
        return _Flow(flow.axis, first)

    def _on_pixel_shuffle(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        factor = node.kwargs.get("upscale_factor", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(factor, int):
            return self._seal([flow], f"are shuffled by an unknown factor in {node.name}")
        return self._shuffle(flow, "pixel_shuffle", factor, result)

    def _on_transpose(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        if len(node.args) != 3 or not all(isinstance(a, int) for a in node.args[1:]):
            return self._seal([flow], f"are moved by {node.name} to an unknown axis")
        axes: Any = node.args[1:]
        one, two = (a % result.ndim for a in axes)
        return _Flow({one: two, two: one}.get(flow.axis, flow.axis), flow.labels)

    def _on_permute(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        order: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        if len(order) != result.ndim or not all(isinstance(a, int) for a in order):
            return self._seal([flow], f"are moved by {node.name} to an unknown axis")
        return _Flow([int(a) % result.ndim for a in order].index(flow.axis), flow.labels)

    def _on_flatten(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        return self._reshape(node, flow, result, free=True)

    _on_squeeze = _on_unsqueeze = _on_flatten

    def _on_view(self, node: fx.Node, flow: _Flow, result: Tensor) -> _Flow:
        return self._reshape(node, flow, result, free=False)

    _on_reshape = _on_view

    def _reshape(self, node: fx.Node, flow: _Flow, result: Tensor, free: bool) -> _Flow:
        """The channel axis alone, or merged with all or some axes after it.

        free: the new shape follows from the old one. Otherwise it is in the node's arguments, where a constant for
        the channels would not follow when some leave.
        """
        if flow.closed is not None:
            return flow
        before = self.shapes[node.all_input_nodes[0]]
        lead = math.prod(before[: flow.axis])
        width = len(flow.labels)
        for axis in range(result.ndim):
            if math.prod(result.shape[:axis]) != lead or result.shape[axis] % width or result.shape[axis] == 0:
                continue
            times = result.shape[axis] // width
            behind = [math.prod(before[flow.axis + 1 : end]) for end in range(flow.axis + 1, len(before) + 1)]
            if times not in behind:
                continue
            if not free:
                sizes: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
                if len(sizes) != result.ndim or (isinstance(sizes[axis], int) and sizes[axis] != -1):
                    break
                if any(size == -1 for k, size in enumerate(sizes) if k != axis and isinstance(size, int)) and (
                    not isinstance(sizes[axis], fx.Node)
                ):
                    break
            return _Flow(axis, tuple(label for label in flow.labels for _ in range(times)))
        return self._seal([flow], f"are reshaped in {node.name} in a way that does not follow their number")


def _doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch of 1 twice: axes of length 1 would not show which one a reshape moves."""
    if all(not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] == 1 for x in inputs):
        return tuple(torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim >= 2 else x for x in inputs)
    return inputs


def _shared_parameters(model: nn.Module) -> set[str]:
    """Names of parameters that more than one module holds."""
    owners: dict[int, set[int]] = {}
    names: dict[int, set[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(id(module))
            names.setdefault(id(parameter), set()).add(f"{prefix}.{name}" if prefix else name)
    return {name for key, found in owners.items() if len(found) > 1 for name in names[key]}
