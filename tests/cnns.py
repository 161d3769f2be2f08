"""Small convolutional networks of every coupling, built from explicit widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VGG(nn.Sequential):
    """Two convolutions with BN, a pool, a third, a flatten over 2x2 positions, two linear layers."""

    def __init__(self, widths: list[int], act: type[nn.Module] = nn.ReLU, bn: bool = True) -> None:
        a, b, c, d = widths

        def norm(width: int) -> nn.Module:
            return nn.BatchNorm2d(width) if bn else nn.Identity()

        super().__init__(
            *(nn.Conv2d(3, a, 3, padding=1, bias=not bn), norm(a), act()),
            *(nn.Conv2d(a, b, 3, padding=1), norm(b), act(), nn.MaxPool2d(2)),
            *(nn.Conv2d(b, c, 3, padding=1), norm(c), act(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * c, d), act(), nn.Linear(d, 5)),
        )


class MLP(nn.Module):
    def __init__(self, widths: list[int], act: type[nn.Module] = nn.ReLU, bias: bool = True) -> None:
        super().__init__()
        self.act = act()
        sizes = [6, *widths, 4]
        self.layers = nn.ModuleList([nn.Linear(i, o, bias=bias) for i, o in pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class BasicBlock(nn.Module):
    def __init__(self, into: int, inner: int, out: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = (
            nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    def __init__(self, into: int, first: int, second: int, out: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, first, 1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, stride, 1, bias=False), nn.BatchNorm2d(second)
        self.conv3, self.bn3 = nn.Conv2d(second, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if project else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class BasicNet(nn.Module):
    """Stem and two stages; the second block of each keeps the stage's width, the second stage strides."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        one, a, b, two, c, d = widths
        self.conv, self.bn = nn.Conv2d(3, one, 3, padding=1, bias=False), nn.BatchNorm2d(one)
        self.layer1 = nn.Sequential(BasicBlock(one, a, one, 1, False), BasicBlock(one, b, one, 1, False))
        self.layer2 = nn.Sequential(BasicBlock(one, c, two, 2, True), BasicBlock(two, d, two, 1, False))
        self.linear = nn.Linear(two, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn(self.conv(x)))))
        x = F.avg_pool2d(x, x.size(3))
        out: Tensor = self.linear(x.view(x.size(0), -1))
        return out


class BottleneckNet(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        stem, a, b, stage, c, d = widths
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, padding=1), nn.BatchNorm2d(stem), nn.ReLU())
        self.one = Bottleneck(stem, a, b, stage, 2, True)
        self.two = Bottleneck(stage, c, d, stage, 1, False)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(stage, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.flatten(self.pool(self.two(self.one(self.stem(x)))), 1))
        return out


class PaddedNet(nn.Module):
    """A shortcut without weights: every second pixel, and zeros for the channels that there were not."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        one, inner = widths
        self.one, self.wide = one, one + 4
        self.conv, self.bn = nn.Conv2d(3, one, 3, padding=1, bias=False), nn.BatchNorm2d(one)
        self.conv1, self.bn1 = nn.Conv2d(one, inner, 3, 2, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, one + 4, 3, 1, 1, bias=False), nn.BatchNorm2d(one + 4)
        self.linear = nn.Linear(one + 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0))
        out: Tensor = self.linear(y.mean((2, 3)))
        return out


class DenseNet(nn.Module):
    """Each layer reads all earlier outputs; a norm before the convolution of the transition."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        stem, a, b, c = widths
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(stem, a, 3, padding=1), nn.BatchNorm2d(a)
        self.conv2, self.norm2 = nn.Conv2d(stem + a, b, 3, padding=1), nn.BatchNorm2d(b)
        self.norm, self.transition = nn.BatchNorm2d(stem + a + b), nn.Conv2d(stem + a + b, c, 1)
        self.fc = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        one = torch.relu(self.norm1(self.conv1(x)))
        two = torch.relu(self.norm2(self.conv2(torch.cat([x, one], 1))))
        y = self.transition(F.relu(self.norm(torch.cat((x, one, two), dim=1))))
        out: Tensor = self.fc(F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1))
        return out


class MobileNet(nn.Module):
    """Inverted residual with a depthwise convolution, and one that doubles the channels."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        stem, wide, last = widths
        self.stem, self.bn = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        self.expand, self.bn1 = nn.Conv2d(stem, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide)
        self.project, self.bn3 = nn.Conv2d(wide, stem, 1, bias=False), nn.BatchNorm2d(stem)
        self.twice, self.prelu = nn.Conv2d(stem, 2 * stem, 3, groups=stem), nn.PReLU(2 * stem)
        self.head, self.fc = nn.Conv2d(2 * stem, last, 1), nn.Linear(last, 5)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        y = self.act(self.bn2(self.depthwise(self.act(self.bn1(self.expand(x))))))
        x = x + self.bn3(self.project(y))
        out: Tensor = self.fc(torch.relu(self.head(self.prelu(self.twice(x)))).mean([2, 3]))
        return out


class SR(nn.Module):
    """Super-resolution: a global residual, chunks, channel attention, a shared convolution, a pixel shuffle."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        body, squeeze, up = widths
        half = body // 2
        self.first = nn.Conv2d(3, body, 3, padding=1)
        self.left, self.shared = nn.Conv2d(half, half, 3, padding=1), nn.Conv2d(body, body, 3, padding=1)
        self.down, self.up = nn.Linear(body, squeeze), nn.Linear(squeeze, body)
        self.grow, self.last = nn.Conv2d(body, 4 * up, 3, padding=1), nn.Conv2d(up, 3, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.scale = nn.Parameter(torch.ones(body, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu(self.first(x), 0.1)
        one, two = first.chunk(2, dim=1)
        y = torch.cat([self.left(one), two], dim=1)
        y = self.shared(torch.relu(self.shared(torch.relu(y))))
        b, c = y.size()[:2]
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3)))))).view(b, c, 1, 1)
        y = first + self.scale * (y * gate)
        out: Tensor = self.last(torch.relu(self.shuffle(self.grow(y))))
        return out + F.interpolate(x, scale_factor=2)


class Grouped(nn.Module):
    """A convolution in two groups between plain ones, and a transposed one."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        a, b, c = widths
        self.a, self.b = nn.Conv2d(3, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(b)
        self.c, self.d = nn.ConvTranspose2d(b, c, 2, 2), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(torch.relu(self.c(torch.relu(self.norm(self.b(torch.tanh(self.a(x))))))))
        return out


class Gated(nn.Module):
    """A SwiGLU block with a residual around it, on [batch, tokens, features]."""

    def __init__(self, widths: list[int], bias: bool = True) -> None:
        super().__init__()
        (inner,) = widths
        self.gate, self.up = nn.Linear(6, inner, bias), nn.Linear(6, inner, bias)
        self.down = nn.Linear(inner, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Net:
    """A class, the widths it is built with by default, and which free group goes with which width.

    `groups`: name of a group -> (index of the width, channels of that width per channel of the group).
    """

    build: Callable[[list[int]], nn.Module]
    widths: list[int]
    groups: dict[str, tuple[int, int]]
    shape: tuple[int, ...] = (3, 8, 8)


NETS = {
    "vgg": Net(VGG, [4, 6, 5, 7], {"0": (0, 1), "3": (1, 1), "7": (2, 1), "12": (3, 1)}),
    "mlp": Net(MLP, [7, 5], {"layers.0": (0, 1), "layers.1": (1, 1)}, (6,)),
    "basic": Net(
        BasicNet,
        [4, 3, 5, 6, 4, 5],
        {
            "conv": (0, 1),
            "layer1.0.conv1": (1, 1),
            "layer1.1.conv1": (2, 1),
            "layer2.0.conv1": (4, 1),
            "layer2.0.conv2": (3, 1),
            "layer2.1.conv1": (5, 1),
        },
    ),
    "bottleneck": Net(
        BottleneckNet,
        [4, 3, 5, 6, 4, 5],
        {
            "stem.0": (0, 1),
            "one.conv1": (1, 1),
            "one.conv2": (2, 1),
            "one.conv3": (3, 1),
            "two.conv1": (4, 1),
            "two.conv2": (5, 1),
        },
    ),
    "padded": Net(PaddedNet, [6, 4], {"conv": (0, 1), "conv1": (1, 1)}),
    "dense": Net(DenseNet, [4, 3, 5, 6], {"stem": (0, 1), "conv1": (1, 1), "conv2": (2, 1), "transition": (3, 1)}),
    "mobile": Net(MobileNet, [4, 6, 5], {"stem": (0, 1), "expand": (1, 1), "head": (2, 1)}),
    "sr": Net(SR, [8, 4, 3], {"first": (0, 2), "down": (1, 1), "grow": (2, 1)}),
    "grouped": Net(Grouped, [6, 8, 5], {"a": (0, 2), "b": (1, 2), "c": (2, 1)}),
    "gated": Net(Gated, [7], {"gate": (0, 1)}, (3, 6)),
}


def build(name: str, seed: int = 0, widths: list[int] | None = None) -> nn.Module:
    """A net with random norms (statistics too), so that nothing is hidden by their initial values."""
    torch.manual_seed(seed)
    net = NETS[name]
    return random_norms(net.build(widths or net.widths))


def random_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def inputs(name: str, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, *NETS[name].shape, generator=torch.Generator().manual_seed(seed))
