"""Small networks of the sparse-training literature, made of stock layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError, nearest


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides: a shortcut without weights ("option A")."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added = added
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = PadShortcut(outputs - inputs, stride)
            if project:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2 for small images: three stages of n blocks.

    Args:
        depth: 20, 32, 44, 56, ...
        classes: outputs.
        channels: of the image.
        width: channels of the first stage, doubled in each of the next two.
        project: shortcuts by 1x1 convolutions instead of padding.

    Source: He et al., "Deep Residual Learning" (1512.03385), section 4.2.
    """

    def __init__(
        self, depth: int = 20, classes: int = 10, channels: int = 3, width: int = 16, project: bool = False
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise BillhookError(f"A ResNet for small images has depth 6n+2, such as 8, 14, 20 or 56, not {depth}.")
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not index else 1, project))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def vgg(
    widths: Sequence[Any] = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M"), classes: int = 10, channels: int = 3
) -> nn.Sequential:
    """Convolutions with batch norm and ReLU, `M` for max-pooling, then the mean and one linear layer."""
    layers: list[nn.Module] = []
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def mlp(widths: Sequence[int] = (784, 300, 100, 10)) -> nn.Sequential:
    """Linear layers with ReLU between, on flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Bare(nn.Module):
    """A Transformers model that is called with pixels and returns the one tensor that matters.

    Args:
        inner: the model.
        output: name of the tensor.
        multiple: of which height and width must be; what is missing is padded, and cut off an enlarged result.
    """

    def __init__(self, inner: nn.Module, output: str, multiple: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.output = output
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        if self.multiple == 1:
            result: Tensor = self.inner(pixel_values=x)[self.output]
            return result
        height, width = x.shape[2:]
        x = nn.functional.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        result = self.inner(pixel_values=x)[self.output]
        scale = result.shape[2] // x.shape[2]
        return result[:, :, : height * scale, : width * scale]


def vit(
    size: int = 32,
    patch: int = 4,
    hidden: int = 192,
    layers: int = 6,
    heads: int = 3,
    classes: int = 10,
    channels: int = 3,
) -> Bare:
    """A small vision transformer of the Transformers class."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_channels=channels,
        num_labels=classes,
    )
    return Bare(ViTForImageClassification(config), "logits")


class EDSR(nn.Module):
    """Super-resolution by residual blocks without norms, and pixel shuffle.

    Args:
        scale: 2, 3 or 4.
        features, blocks: 64 and 16 are the paper's baseline.
        channels: of the image.

    Source: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution" (1707.02921).
    """

    def __init__(self, scale: int = 2, features: int = 64, blocks: int = 16, channels: int = 3) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise BillhookError(f"EDSR enlarges 2, 3 or 4 times, not {scale}.")
        self.head = nn.Conv2d(channels, features, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, features, 3, padding=1)
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(features, features, 3, padding=1)
        steps = [2, 2] if scale == 4 else [scale]
        up: list[nn.Module] = []
        for step in steps:
            up += [nn.Conv2d(features, features * step**2, 3, padding=1), nn.PixelShuffle(step)]
        self.tail = nn.Sequential(*up, nn.Conv2d(features, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = x
        for block in self.body:
            y = y + block(y)
        enlarged: Tensor = self.tail(x + self.last(y))
        return enlarged


def swin2sr(
    scale: int = 2, features: int = 60, depths: Sequence[int] = (6, 6, 6, 6), heads: int = 6, window: int = 8
) -> Bare:
    """Super-resolution by shifted windows, of the Transformers class; by default as large as SwinIR-light."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    config = Swin2SRConfig(
        embed_dim=features,
        depths=list(depths),
        num_heads=[heads] * len(depths),
        window_size=window,
        mlp_ratio=2.0,
        upscale=scale,
        upsampler="pixelshuffledirect",
        img_range=1.0,
    )
    return Bare(Swin2SRForImageSuperResolution(config), "reconstruction", window)


def llama(hidden: int = 128, layers: int = 4, heads: int = 4, kv_heads: int = 2, mlp: int = 352) -> nn.Module:
    """A small Llama of the Transformers class that reads and writes bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def gpt2(hidden: int = 128, layers: int = 4, heads: int = 4, length: int = 256) -> nn.Module:
    """A small GPT-2 of the Transformers class that reads and writes bytes, at most `length`, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def opt(hidden: int = 128, layers: int = 4, heads: int = 4, length: int = 256) -> nn.Module:
    """A small OPT of the Transformers class that reads and writes bytes, at most `length`, without dropout."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=256,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model: nn.Module = OPTForCausalLM(config)
    return model


NETWORKS: dict[str, tuple[Callable[..., nn.Module], str]] = {  # what makes it, and which kind of task it is for
    "mlp": (mlp, "images"),
    "resnet8": (lambda **options: CifarResNet(8, **options), "images"),
    "resnet20": (lambda **options: CifarResNet(20, **options), "images"),
    "resnet56": (lambda **options: CifarResNet(56, **options), "images"),
    "vgg": (vgg, "images"),
    "vit": (vit, "images"),
    "edsr": (EDSR, "photos"),
    "swin2sr": (swin2sr, "photos"),
    "llama": (llama, "text"),
    "gpt2": (gpt2, "text"),
    "opt": (opt, "text"),
}


def network(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A freshly initialised network by name.

    Raises:
        BillhookError: no such network or option, or a value that it cannot be built with.
    """
    if name not in NETWORKS:
        raise BillhookError(f"No network {name!r}{nearest(name, NETWORKS)}: there are {', '.join(NETWORKS)}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return NETWORKS[name][0](**options)
        except BillhookError:
            raise
        except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
            raise BillhookError(f"Network {name}: {(str(error).splitlines() or ['?'])[0].rstrip('.')}.") from None
