"""Photographs in memory, and enlarging them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.tasks.task import Task, device_of

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_LEAST = 8  # photographs that a held-out part is cut from, at least
# What scikit-image ships that is a colour photograph; the last two are for testing.
_SAMPLES = ("coffee", "rocket", "astronaut", "chelsea")


@dataclass(frozen=True)
class Photos:
    """A training and a test part.

    Attributes:
        train, test: uint8 [3, height, width] each, sizes of their own.
    """

    train: Sequence[Tensor]
    test: Sequence[Tensor]

    def first(self, train: int) -> Photos:
        """Only the first so many to train on."""
        return Photos(self.train[:train], self.test)


def load_photos(name: str, test: str | None = None) -> Photos:
    """Photographs by name.

    Args:
        name: a folder of image files, or scikit-image for the four that this package ships.
        test: a folder of those to test on; without it every fifth file of `name` is held out.

    Raises:
        BillhookError: no folder, no photographs in it, too few to hold some out, or one that cannot be read.
    """
    if name == "scikit-image":
        photos = _samples()
        return Photos(photos[:2], _read_folder(Path(test)) if test else photos[2:])
    photos = _read_folder(Path(name))
    if test is not None:
        return Photos(photos, _read_folder(Path(test)))
    if len(photos) < _LEAST:
        raise BillhookError(
            f"{name} holds {len(photos)} photographs, too few to hold some out for testing: name a folder of others "
            "as test_photos."
        )
    return Photos([p for i, p in enumerate(photos) if i % 5], photos[::5])


def _read_folder(folder: Path) -> list[Tensor]:
    try:
        from PIL import Image
    except ImportError:
        raise BillhookError("Reading photographs needs the package pillow: pip install 'billhook[images]'.") from None
    folder = folder.expanduser()
    if not folder.is_dir():
        raise BillhookError(f"There is no folder {folder} of photographs.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS)
    if not files:
        raise BillhookError(f"{folder} holds no photographs: no file ends with {', '.join(_ENDINGS)}.")
    found = []
    for file in files:
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise BillhookError(f"{file} is not a readable photograph ({error}): remove it or fetch it anew.") from None
        pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        found.append(pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous())
    return found


def _samples() -> list[Tensor]:
    try:
        from skimage import data
    except ImportError:
        raise BillhookError("The photographs of scikit-image need that package: pip install scikit-image.") from None
    return [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).contiguous() for name in _SAMPLES]


class Enlarging(Task):
    """Super-resolution: patches made smaller by a bicubic filter are to be made large again; L1 loss.

    Judged as the papers of super-resolution do: by the mean PSNR in dB on the luminance (Y of BT.601), with results
    rounded to 8 bits and a border of `scale` pixels left out.

    Args:
        photos: to train and to test on.
        scale: how many times larger: 2, 3 or 4.
        patch: pixels of a side of the small patches that a step sees.
        augment: flip and turn patches.
    """

    kind = "photos"
    metric = "psnr"
    optimizer = "adam"
    lr = 2e-4
    batch = 16
    weight_decay = 0.0

    def __init__(self, photos: Photos, scale: int = 2, patch: int = 48, augment: bool = True) -> None:
        self.scale, self.patch, self.augment = scale, patch, augment
        self.photos = photos
        large = patch * scale
        for photo in photos.train:
            if min(photo.shape[1:]) < large:
                height, width = photo.shape[1:]
                raise BillhookError(
                    f"A photograph of {width} x {height} pixels is too small for patches of {large}: lower patch, now "
                    f"{patch}, or remove it."
                )
        # an epoch sees as many patches as would cover the photographs once
        shares = [max(1, round(p.shape[1] * p.shape[2] / large**2)) for p in photos.train]
        self._photo_of = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
        self.examples = len(self._photo_of)
        self.tests = f"{len(photos.test):,} test photographs"

    @cached_property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [pair(photo, self.scale) for photo in self.photos.train]

    @cached_property
    def _test_pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [pair(photo, self.scale) for photo in self.photos.test]

    def loss(self, model: nn.Module, chosen: Tensor, draws: torch.Generator) -> Tensor:
        inputs, targets = [], []
        for index in self._photo_of[chosen].tolist():
            small, large = self._pairs[index]
            corner = [int(torch.randint(n - self.patch + 1, (), generator=draws)) for n in small.shape[1:]]
            parts = [
                image[:, corner[0] * s : (corner[0] + self.patch) * s, corner[1] * s : (corner[1] + self.patch) * s]
                for image, s in ((small, 1), (large, self.scale))
            ]
            if self.augment:
                turns, flip = torch.randint(4, (), generator=draws), torch.rand((), generator=draws) < 0.5
                parts = [torch.rot90(p.flip(2) if flip else p, int(turns), (1, 2)) for p in parts]
            inputs.append(parts[0])
            targets.append(parts[1])
        device = device_of(model)
        x, y = (torch.stack(t).to(device).float() / 255 for t in (inputs, targets))
        return nn.functional.l1_loss(model(x), y)

    def measure(self, model: nn.Module) -> float:
        device = device_of(model)
        found = []
        for small, large in self._test_pairs:
            made = model(small[None].to(device).float() / 255)[0]
            found.append(psnr_y((made * 255).round().clamp(0, 255).cpu(), large.float(), border=self.scale))
        return sum(found) / len(found)

    def say(self, value: float) -> str:
        return f"PSNR {value:.2f} dB"


def pair(photo: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """The photograph `scale` times smaller, and as much of it as that shows: uint8 [3, h, w], [3, h·scale, w·scale]."""
    height, width = (n // scale for n in photo.shape[1:])
    large = photo[:, : height * scale, : width * scale]
    small = nn.functional.interpolate(large[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return small.round().clamp(0, 255).to(torch.uint8), large


@cache
def _weights_of_y() -> Tensor:
    return torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255


def psnr_y(one: Tensor, other: Tensor, border: int) -> float:
    """PSNR in dB on Y of BT.601 between two images.

    Args:
        one, other: [3, height, width], values 0 to 255.
        border: pixels that are left out on each side.
    """
    difference = torch.einsum("chw,c->hw", (one - other).double(), _weights_of_y())
    inner = difference[border : difference.shape[0] - border, border : difference.shape[1] - border]
    mean_square = float(inner.square().mean())
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
