"""Coupled channels: what is removed is what computes nothing, and the net that is left is a plain smaller one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.surgery.channels import ChannelGroup, channel_groups, keep_all_, keep_channels_
from billhook.surgery.coupling import fetch
from cnns import NETS, build, inputs


def free(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    return [group for group in channel_groups(model, example) if group.fixed is None]


def silence_(model: nn.Module, group: ChannelGroup, gone: Tensor, side: str) -> None:
    """Make channels compute nothing: zeros wherever they are written, or wherever they are read."""
    slots = group.consumers if side == "readers" else (*group.producers, *group.through)
    for slot in slots:
        if not slot.tensor.endswith(("running_mean", "running_var")):
            fetch(model, slot.tensor).data.index_fill_(slot.axis, slot.index[gone].flatten(), 0)


@pytest.mark.parametrize("name", NETS)
def test_groups_are_those_of_the_architecture(name: str) -> None:
    net, model = NETS[name], build(name)
    groups = free(model, inputs(name))
    sizes = {
        group: net.widths[width] // each if name != "padded" else net.widths[width]
        for group, (width, each) in net.groups.items()
    }
    assert {group.name: group.size for group in groups} == sizes


@settings(max_examples=4, deadline=None)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["readers", "writers"])
@pytest.mark.parametrize("name", NETS)
@given(data=st.data())
def test_removed_channels_are_channels_that_compute_nothing(
    name: str, side: str, train: bool, data: st.DataObject
) -> None:
    net = NETS[name]
    widths = [width + data.draw(st.integers(0, 2)) * 2 for width in net.widths]
    whole = build(name, data.draw(st.integers(0, 99)), widths)
    small, example = copy.deepcopy(whole), inputs(name)
    choices, left = [], list(widths)
    for group in free(whole, example):
        count = data.draw(st.integers(1, group.size))
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        keep, gone = order[:count], order[count:]
        silence_(whole, group, gone, side)
        choices.append((group, keep))
        place, each = net.groups[group.name]
        left[place] -= each * len(gone)
    keep_all_(small, choices)
    whole.train(train)
    small.train(train)
    with torch.no_grad():
        torch.testing.assert_close(small(example), whole(example), rtol=1e-5, atol=1e-5)

    fresh = net.build(left)  # a stock net of the widths that are left
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in fresh.parameters())
    fresh.load_state_dict(small.state_dict())
    fresh.train(train)
    with torch.no_grad():
        torch.testing.assert_close(fresh(example), small(example), rtol=1e-5, atol=1e-6)
    assert str(fresh) == str(small)  # sizes of all modules


@pytest.mark.parametrize("name", NETS)
def test_one_group_after_the_other_is_all_at_once(name: str) -> None:
    model, example = build(name), inputs(name)
    at_once = copy.deepcopy(model)
    groups = free(model, example)
    keep = {group.name: torch.arange(0, group.size, 2) for group in groups}
    keep_all_(at_once, [(group, keep[group.name]) for group in groups])
    for group in groups:
        now = next(g for g in free(model, example) if g.name == group.name)
        keep_channels_(model, now, keep[group.name])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), at_once.state_dict().values(), strict=True)
    )


def test_the_lists_of_a_residual_stage() -> None:
    groups = {group.name: group for group in channel_groups(build("basic"), inputs("basic"))}
    stage = groups["layer2.0.conv2"]
    assert [slot.tensor for slot in stage.producers] == [
        "layer2.0.conv2.weight",
        "layer2.0.shortcut.0.weight",
        "layer2.1.conv2.weight",
    ]
    assert {slot.tensor.rpartition(".")[0] for slot in stage.through} == {
        "layer2.0.bn2",
        "layer2.0.shortcut.1",
        "layer2.1.bn2",
    }
    assert [(slot.tensor, slot.axis) for slot in stage.consumers] == [
        ("layer2.1.conv1.weight", 1),
        ("linear.weight", 1),
    ]
    assert groups["linear"].fixed == "reach the network's output"
    fixed_columns = [g for g in groups.values() if g.fixed == "read the network's input"]
    assert [(g.slots[0].tensor, g.slots[0].axis, g.size) for g in fixed_columns] == [("conv.weight", 1, 3)]


def test_a_flatten_gives_blocks_of_columns_and_a_shuffle_gives_rows_together() -> None:
    groups = {group.name: group for group in channel_groups(build("vgg"), inputs("vgg"))}
    (columns,) = groups["7"].consumers
    assert torch.equal(columns.index, torch.arange(20).view(5, 4))
    groups = {group.name: group for group in channel_groups(build("sr"), inputs("sr"))}
    assert torch.equal(groups["grow"].producers[0].index, torch.arange(12).view(3, 4))
    assert not groups["first"].homogeneous  # gated by a sigmoid of itself
    assert groups["grow"].homogeneous


def test_channels_tied_to_padding_stay() -> None:
    groups = channel_groups(build("padded"), inputs("padded"))
    tied = [g for g in groups if g.fixed and "padding" in g.fixed]
    assert [g.size for g in tied] == [4]
    assert tied[0].producers[0].index.flatten().tolist() == [0, 1, 8, 9]


class Odd(nn.Module):
    """Operations that a removal would break, each behind its own convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm([8, 8, 8])
        self.half, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(8 * 64, 4)
        self.tied = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.kind == "group norm":
            y = self.group_norm(y)
        elif self.kind == "layer norm":
            y = self.layer_norm(y)
        elif self.kind == "constant split":
            one, two = torch.split(y, [3, 5], dim=1)
            y = torch.cat([two, one], 1)
        elif self.kind == "constant view":
            return self.fc(y.view(-1, 512))
        elif self.kind == "index":
            y = torch.cat([y[:, :4], y[:, 4:]], 1)
        elif self.kind == "softmax":
            y = y.softmax(1)
        elif self.kind == "mean over channels":
            y = y - y.mean(1, keepdim=True)
        elif self.kind == "channel shuffle":
            y = y.view(y.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(y.size(0), -1, 8, 8)
        elif self.kind == "functional":
            y = F.conv2d(y, self.tied.weight, padding=1)
        return self.b(y)


@pytest.mark.parametrize(
    "kind",
    [
        *("group norm", "layer norm", "constant split", "constant view", "index", "softmax", "mean over channels"),
        *("channel shuffle", "functional"),
    ],
)
def test_what_a_removal_would_change_is_fixed(kind: str) -> None:
    groups = channel_groups(Odd(kind), torch.randn(1, 3, 8, 8))
    group = next(g for g in groups if g.name == "a" and g.producers)
    assert group.fixed is not None
    with pytest.raises(BillhookError, match="The channels of a cannot leave: they "):
        keep_channels_(Odd(kind), group, torch.tensor([0]))


def test_a_parameter_of_two_modules_is_fixed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    assert all(g.fixed for g in channel_groups(model, torch.randn(2, 4)))


def test_tracing_leaves_the_model_as_it_is() -> None:
    model = build("basic").train()
    model.layer1.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    channel_groups(model, inputs("basic"))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_mistakes_are_said() -> None:
    model, example = build("dense"), inputs("dense")
    first, second = free(model, example)[:2]
    with pytest.raises(BillhookError, match="Nothing would be left of the 4 channels of stem"):
        keep_channels_(model, first, torch.tensor([], dtype=torch.long))
    with pytest.raises(BillhookError, match="distinct and within 0 to 3"):
        keep_channels_(model, first, torch.tensor([0, 4]))
    keep_channels_(model, first, torch.tensor([0, 1]))
    with pytest.raises(BillhookError, match="call channel_groups again"):
        keep_channels_(model, second, torch.tensor([0]))
    with pytest.raises(BillhookError, match="does not run on the example"):
        channel_groups(model, torch.randn(2, 5, 8, 8))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(BillhookError, match=r"Branching cannot be traced by torch\.fx"):
        channel_groups(Branching(), example)
