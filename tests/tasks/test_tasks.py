"""Networks, images and the training loop of the built-in tasks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import billhook as bh
from billhook.errors import BillhookError
from billhook.tasks import Images, Training, load_images, network
from billhook.tasks.loop import shifted_and_flipped
from billhook.tasks.networks import CifarResNet
from idx import write_idx


def toy(n: int = 96, size: int = 8) -> Images:
    """Two kinds of noise that differ in the mean of the upper half."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 120, (2 * n, size, size), generator=g).to(torch.uint8)
    y = torch.arange(2 * n) % 2
    x[y == 1, : size // 2] += 90
    return Images.of(x[:n], y[:n], x[n:], y[n:])


def test_resnet_20_is_the_published_one() -> None:
    model = network("resnet20")
    assert sum(p.numel() for p in model.parameters()) == 269_722
    keys = set(model.state_dict())
    assert {"conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= keys
    assert network("resnet56")(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mlp", {"widths": (64, 16, 10)}, (2, 1, 8, 8)),
        ("resnet8", {"width": 4, "channels": 1, "project": True}, (2, 1, 8, 8)),
        ("vgg", {"widths": (8, "M", 8), "channels": 1}, (2, 1, 8, 8)),
        ("vit", {"size": 8, "hidden": 16, "layers": 1, "heads": 2, "channels": 1}, (2, 1, 8, 8)),
    ],
)
def test_networks(name: str, options: dict[str, object], shape: tuple[int, ...]) -> None:
    model = network(name, **options)
    assert model(torch.zeros(shape)).shape == (2, 10)
    again = network(name, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_edsr_enlarges(scale: int) -> None:
    model = network("edsr", scale=scale, features=8, blocks=2)
    assert model(torch.zeros(1, 3, 6, 5)).shape == (1, 3, 6 * scale, 5 * scale)


def test_a_training_in_two_stretches_is_the_whole_one() -> None:
    whole = network("resnet8", width=4, channels=1, classes=2)
    parts = copy.deepcopy(whole)
    training = Training(toy(), epochs=4, batch=16, lr=0.05, momentum=0.0)
    training(whole)
    training(parts, bh.Stretch(0, 0.375))
    training(parts, bh.Stretch(0.375, 1))
    for (key, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_seeds_change_the_order_and_nothing_else_does() -> None:
    training = Training(toy(), epochs=2, batch=16)
    first, _ = training._batch(7, 0)
    assert torch.equal(first, training._batch(7, 0)[0])
    assert not torch.equal(first, training._batch(7, 1)[0])
    epoch = torch.cat([training._batch(step, 0)[0] for step in range(6)])
    assert sorted(epoch.tolist()) == list(range(96))


def test_pruning_while_training_learns() -> None:
    images = toy()
    training = Training(images, epochs=8, batch=16, lr=0.05)
    model = network("resnet8", width=8, channels=1, classes=2)
    pruner = training.prune(model, bh.GraNet(sparsity=0.7, update_every=2))
    assert pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    assert training.accuracy(model) > 0.9


def test_augmentation_moves_whole_images() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(40, 1, 1, 1) + 1
    y = shifted_and_flipped(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    centre = {float(v) for v in y[:, 0, 3, 3]}
    assert len(centre) > 5  # shifted by different amounts
    flipped = (y[:, 0, 4, 5] < y[:, 0, 4, 4]).float().mean()
    assert 0.2 < flipped < 0.8


def test_idx_files(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="has no file train-images-idx3"):
        load_images(f"idx:{tmp_path}")
    for part, n in (("train", 6), ("t10k", 3)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", (torch.rand(n, 4, 4) * 255).to(torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", torch.arange(n, dtype=torch.uint8))
    images = load_images(f"idx:{tmp_path}")
    assert images.train.shape == (6, 1, 4, 4)
    assert abs(float(images.train.mean())) < 1e-5
    assert images.test_labels.tolist() == [0, 1, 2]
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"nonsense")
    with pytest.raises(BillhookError, match="not a whole file"):
        load_images(f"idx:{tmp_path}")


def test_refusals() -> None:
    with pytest.raises(BillhookError, match="did you mean 'resnet20'"):
        network("resnet2")
    with pytest.raises(BillhookError, match="Network mlp"):
        network("mlp", depth=3)
    with pytest.raises(BillhookError, match="depth 6n"):
        CifarResNet(21)
    with pytest.raises(BillhookError, match="No images"):
        load_images("mnist-c")
    model, training = network("mlp", widths=(64, 16, 2)), Training(toy(), epochs=30, batch=16, lr=1e20)
    with pytest.raises(BillhookError, match="not finite"):
        training(model)
