"""Networks, images and the training loop of the built-in tasks."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.tasks import (
    Classification,
    Enlarging,
    Images,
    Photos,
    Training,
    Writing,
    load_images,
    load_photos,
    load_text,
    network,
)
from billhook.tasks.images import shifted_and_flipped
from billhook.tasks.networks import CifarResNet
from billhook.tasks.photos import pair, psnr_y
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
        ("llama", {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32}, (2, 10)),
        ("gpt2", {"hidden": 16, "layers": 1, "heads": 2, "length": 10}, (2, 10)),
        ("opt", {"hidden": 16, "layers": 1, "heads": 2, "length": 10}, (2, 10)),
    ],
)
def test_networks(name: str, options: dict[str, object], shape: tuple[int, ...]) -> None:
    model = network(name, **options)
    if len(shape) == 2:
        assert model(torch.zeros(shape, dtype=torch.long)).logits.shape == (2, 10, 256)
    else:
        assert model(torch.zeros(shape)).shape == (2, 10)
    again = network(name, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [("edsr", {"features": 8, "blocks": 2}), ("swin2sr", {"features": 8, "depths": [2], "heads": 2, "window": 4})],
)
def test_networks_that_enlarge(name: str, options: dict[str, object], scale: int) -> None:
    model = network(name, scale=scale, **options)
    assert model(torch.zeros(1, 3, 6, 5)).shape == (1, 3, 6 * scale, 5 * scale)


def test_a_training_in_two_stretches_is_the_whole_one() -> None:
    whole = network("resnet8", width=4, channels=1, classes=2)
    parts = copy.deepcopy(whole)
    training = Training(Classification(toy()), epochs=4, batch=16, lr=0.05, momentum=0.0)
    training(whole)
    training(parts, bh.Stretch(0, 0.375))
    training(parts, bh.Stretch(0.375, 1))
    for (key, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_seeds_change_the_order_and_nothing_else_does() -> None:
    training = Training(Classification(toy()), epochs=2, batch=16)
    first, _ = training._batch(7, 0)
    assert torch.equal(first, training._batch(7, 0)[0])
    assert not torch.equal(first, training._batch(7, 1)[0])
    epoch = torch.cat([training._batch(step, 0)[0] for step in range(6)])
    assert sorted(epoch.tolist()) == list(range(96))


def test_pruning_while_training_learns() -> None:
    training = Training(Classification(toy()), epochs=8, batch=16, lr=0.05)
    model = network("resnet8", width=8, channels=1, classes=2)
    pruner = training.prune(model, bh.GraNet(sparsity=0.7, update_every=2))
    assert pruner.sparsity == pytest.approx(0.7, abs=1e-3)
    assert training.measure(model) > 0.9


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
    with pytest.raises(BillhookError, match=r"Network vgg: .*negative"):
        network("vgg", widths=(-1,))
    with pytest.raises(BillhookError, match="Network mlp"):
        network("mlp", depth=3)
    with pytest.raises(BillhookError, match="depth 6n"):
        CifarResNet(21)
    with pytest.raises(BillhookError, match="No images"):
        load_images("mnist-c")
    model, training = network("mlp", widths=(64, 16, 2)), Training(Classification(toy()), epochs=30, batch=16, lr=1e20)
    with pytest.raises(BillhookError, match="not finite"):
        training(model)


# -- photographs -----------------------------------------------------------------------------------------------


def waves(size: tuple[int, int], phase: float) -> torch.Tensor:
    """A smooth picture, uint8 [3, height, width]."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    parts = [torch.sin(x / 7 + phase + c) + torch.cos(y / 5 - phase * c) for c in range(3)]
    return ((torch.stack(parts) + 2) * 63).to(torch.uint8)


def photos() -> Photos:
    return Photos([waves((50, 60), p) for p in (0.0, 0.5, 1.0)], [waves((41, 37), 0.3)])


def test_psnr_is_that_of_the_definition() -> None:
    one, other = (torch.randint(16, 236, (3, 9, 7), generator=torch.Generator().manual_seed(s)).float() for s in (0, 1))
    y = [16 + (65.481 * x[0] + 128.553 * x[1] + 24.966 * x[2]).double() / 255 for x in (one, other)]
    difference = (y[0] - y[1])[2:7, 2:5]
    want = 10 * math.log10(255**2 / float((difference**2).mean()))
    assert psnr_y(one, other, border=2) == pytest.approx(want, rel=1e-6)
    assert psnr_y(one, one, border=0) == math.inf


def test_the_small_picture_is_pillows_bicubic() -> None:
    photo = waves((42, 66), 0.7)
    small, large = pair(photo[:, :41, :], 3)
    assert large.shape == (3, 39, 66)
    image = Image.fromarray(large.permute(1, 2, 0).numpy()).resize((22, 13), Image.Resampling.BICUBIC)
    want = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert int((small.int() - want.int()).abs().max()) <= 1


def test_patches_of_a_step_belong_together() -> None:
    """A network that does nothing but enlarge by copying is exact where pictures are constant in patches."""
    flat = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    task = Enlarging(Photos([flat, flat // 2], [flat]), scale=2, patch=16)
    assert task.examples == 2 * 4
    copying = nn.Upsample(scale_factor=2)
    copying.register_parameter("nothing", nn.Parameter(torch.zeros(())))
    assert float(task.loss(copying, torch.arange(8), torch.Generator().manual_seed(0))) < 1e-6
    assert task.measure(copying) == math.inf
    seen = []

    def look(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        seen.append(arguments[0])

    task = Enlarging(photos(), scale=2, patch=12)
    copying.register_forward_pre_hook(look)
    for _ in range(2):
        task.loss(copying, torch.arange(4), torch.Generator().manual_seed(3))
    assert torch.equal(*seen)
    assert len({float(x.mean()) for x in seen[0]}) == 4


def test_enlarging_is_learnt() -> None:
    task = Enlarging(photos(), scale=2, patch=12)
    training = Training(task, epochs=12, batch=4, lr=3e-3)
    model = network("edsr", features=8, blocks=1)
    before = training.measure(model)
    pruner = training.prune(model, bh.ISSP(sparsity=0.5, least=100))
    assert pruner.sparsity > 0.4
    assert training.measure(model) > before + 5
    assert training.score(model) == training.measure(model)


def test_folders_of_photographs(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    with pytest.raises(BillhookError, match="no folder"):
        load_photos(str(folder))
    folder.mkdir()
    with pytest.raises(BillhookError, match="holds no photographs"):
        load_photos(str(folder))
    for i in range(7):
        Image.fromarray(waves((20, 30), i).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    with pytest.raises(BillhookError, match="7 photographs, too few"):
        load_photos(str(folder))
    Image.fromarray(waves((20, 30), 7)[0].numpy()).save(folder / "7.png")  # a grey one
    found = load_photos(str(folder))
    assert [len(found.train), len(found.test)] == [6, 2]
    assert torch.equal(found.test[0], waves((20, 30), 0))
    assert found.train[-1].shape == (3, 20, 30)
    assert len(load_photos(str(folder), str(folder)).test) == 8
    with pytest.raises(BillhookError, match="30 x 20 pixels is too small for patches of 32"):
        Enlarging(found, scale=2, patch=16)
    (folder / "8.jpg").write_bytes(b"no photograph")
    with pytest.raises(BillhookError, match=r"8\.jpg is not a readable photograph"):
        load_photos(str(folder))


# -- text --------------------------------------------------------------------------------------------------------


def test_writing_is_learnt(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the {a} sees the {b} and is glad." for a in "abcdefgh" for b in "abcdefgh"))
    task = load_text(f"text:{path}", length=32)
    assert task.unit == "byte"
    training = Training(task, epochs=20, batch=8, lr=3e-3)
    model = network("llama", hidden=16, layers=1, heads=2, kv_heads=1, mlp=32)
    before = training.measure(model)
    assert before == pytest.approx(256, rel=0.1)
    pruner = training.prune(model, bh.GMP(sparsity=0.5, update_every=2))
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
    assert not any("lm_head" in name or "embed" in name for name in pruner.masks)
    after = training.measure(model)
    assert after < 20
    assert training.score(model) == -after
    with pytest.raises(BillhookError, match=r"part of .* has \d+ tokens, fewer than a window of 5000"):
        load_text(f"text:{path}", length=5000)


def test_perplexity_is_that_of_the_definition() -> None:
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    model = network("llama", hidden=16, layers=1, heads=2, kv_heads=1, mlp=32).double().eval()
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])
        assert Writing(ids, ids).measure(model) == pytest.approx(float(torch.exp(-logs.mean())), rel=1e-5)


# -- the recipe of a training ---------------------------------------------------------------------------------


def test_the_rate_rises_stays_and_falls() -> None:
    training = Training(Classification(toy()), warmup=0.1, hold=0.4)
    assert training.rate(0.05) == pytest.approx(0.5)
    assert training.rate(0.1) == training.rate(0.49) == 1.0
    assert training.rate(0.75) == pytest.approx(0.5)
    assert training.rate(1.0) == pytest.approx(0.0)
    with pytest.raises(BillhookError, match="less than 1"):
        Training(Classification(toy()), warmup=0.5, hold=0.5)
    with pytest.raises(BillhookError, match="No optimizer 'adma'"):
        Training(Classification(toy()), optimizer="adma")


def test_what_a_task_asks_for_unless_told() -> None:
    pictures, letters = Training(Enlarging(photos(), patch=12)), Training(Writing(*(torch.zeros(9, 4).long(),) * 2))
    assert (pictures.of_optimizer, pictures.peak, pictures.per_step) == ("adam", 2e-4, 15)
    assert (letters.of_optimizer, letters.peak, letters.per_step) == ("adamw", 1e-3, 9)
    assert isinstance(letters._optimizer(nn.Linear(2, 2)), torch.optim.AdamW)
    assert letters._optimizer(nn.Linear(2, 2)).param_groups[0]["weight_decay"] == 0.1


def test_data_that_does_not_fit_is_refused_before_work() -> None:
    training = Training(Classification(toy()))
    training.try_out(network("resnet8", width=4, channels=1, classes=2))
    with pytest.raises(BillhookError, match=r"The network does not take this data \(.*channels"):
        training.try_out(network("resnet8", width=4))
    with pytest.raises(BillhookError, match="does not take this data"):
        training.try_out(network("mlp", widths=(32, 2)))
