"""Labelled images in memory, and naming what they show."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.tasks.task import Task, device_of

_FASHION = ("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist")
_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@dataclass(frozen=True)
class Images:
    """A training and a test part.

    Attributes:
        train, test: float32 [n, channels, height, width], with mean 0 and deviation 1 per channel of the training part.
        train_labels, test_labels: int64 [n].
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def of(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
        """From uint8 images [n, height, width(, channels)]; normalises."""

        def channels_first(x: Tensor) -> Tensor:
            x = x[..., None] if x.ndim == 3 else x
            return x.permute(0, 3, 1, 2).float() / 255

        train, test = channels_first(train), channels_first(test)
        mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
        return Images((train - mean) / deviation, train_labels.long(), (test - mean) / deviation, test_labels.long())

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def first(self, train: int, test: int | None = None) -> Images:
        """Only the first so many images."""
        return Images(self.train[:train], self.train_labels[:train], self.test[:test], self.test_labels[:test])


class Classification(Task):
    """Naming what images show: cross-entropy, judged by the share of test images that are named right.

    Args:
        images: to train and to test on.
        augment: shift training images by up to an eighth of their size, and flip them.
    """

    kind = "images"
    metric = "accuracy"
    optimizer = "sgd"
    lr = 0.1
    batch = 128
    weight_decay = 5e-4

    def __init__(self, images: Images, augment: bool = True) -> None:
        self.images = images
        self.augment = augment
        self.examples = len(images.train)
        self.tests = f"{len(images.test):,} test images"

    def loss(self, model: nn.Module, chosen: Tensor, draws: torch.Generator) -> Tensor:
        x = self.images.train[chosen]
        if self.augment:
            x = shifted_and_flipped(x, draws)
        device = device_of(model)
        return nn.functional.cross_entropy(model(x.to(device)), self.images.train_labels[chosen].to(device))

    def measure(self, model: nn.Module) -> float:
        device, right = device_of(model), 0
        for x, y in zip(*(torch.split(t, 500) for t in (self.images.test, self.images.test_labels)), strict=True):
            right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        return right / len(self.images.test)

    def say(self, value: float) -> str:
        return f"accuracy {value:.2%}"


def shifted_and_flipped(x: Tensor, draws: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its size in both directions (zeros come in), and flipped or not."""
    n, _, height, width = x.shape
    reach = height // 8
    shift = torch.randint(0, 2 * reach + 1, (2, n), generator=draws)
    flip = torch.rand(n, generator=draws) < 0.5
    padded = nn.functional.pad(x, (reach,) * 4)
    rows = (torch.arange(height) + shift[0][:, None])[:, :, None]
    columns = torch.arange(width).expand(n, width)
    columns = (torch.where(flip[:, None], columns.flip(1), columns) + shift[1][:, None])[:, None, :]
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows, columns].permute(0, 3, 1, 2).contiguous()


def load_images(name: str) -> Images:
    """Images by name.

    Args:
        name: fashion-mnist (from the Debian package dataset-fashion-mnist, or `idx:FOLDER`), cifar10 (from the hub), or
            `idx:FOLDER` with four files of the MNIST format, gzipped or not.

    Raises:
        BillhookError: unknown name, or data that is not there.
    """
    if name.startswith("idx:"):
        return _idx(Path(name[4:]))
    if name == "fashion-mnist":
        folder = next((Path(p) for p in _FASHION if Path(p).is_dir()), None)
        if folder is None:
            raise BillhookError(
                "Fashion-MNIST is not on this machine: install the Debian package dataset-fashion-mnist, or give a "
                "folder with its four files as idx:FOLDER."
            )
        return _idx(folder)
    if name == "cifar10":
        return _cifar10()
    raise BillhookError(f"No images {name!r}: there are fashion-mnist, cifar10 and idx:FOLDER.")


def _cifar10() -> Images:
    try:
        from datasets import load_dataset

        parts = [load_dataset("uoft-cs/cifar10", split=split).with_format("numpy") for split in ("train", "test")]
    except ImportError:
        raise BillhookError("cifar10 needs the package datasets: pip install 'billhook[data]'.") from None
    except Exception as error:  # hub, network, cache and server each raise kinds of their own
        raise BillhookError(
            f"CIFAR-10 could not be had from the hub ({type(error).__name__}): give a folder of images in the MNIST "
            "format as idx:FOLDER, or use fashion-mnist."
        ) from None
    tensors = [torch.from_numpy(np.stack(part[key])) for part in parts for key in ("img", "label")]
    return Images.of(*tensors)


def _idx(folder: Path) -> Images:
    tensors = []
    for part in _PARTS:
        path = next((p for p in sorted(folder.glob(f"{part}*")) if p.is_file()), None)
        if path is None:
            raise BillhookError(
                f"{folder} has no file {part}-ubyte(.gz): give a folder with the four files of MNIST's format."
            )
        data = path.read_bytes()
        try:
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            rank = data[3]
            shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
            tensors.append(torch.frombuffer(bytearray(data[4 + 4 * rank :]), dtype=torch.uint8).view(shape))
        except (OSError, EOFError, IndexError, struct.error, RuntimeError, ValueError):
            raise BillhookError(f"{path} is not a whole file of MNIST's format: fetch it anew.") from None
    return Images.of(*tensors)
