"""`billhook train`: from recipe to folder, resumed, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import billhook as bh
from billhook import train
from billhook.cli import app
from billhook.errors import BillhookError
from billhook.models.files import DiskFull
from billhook.recipe import parse_as
from billhook.tasks import loop
from billhook.train import TrainJob, execute_training, load_trained
from billhook.training.prunable import prunable
from idx import write_idx


@pytest.fixture
def images(tmp_path: Path) -> str:
    g = torch.Generator().manual_seed(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for part, n in (("train", 96), ("t10k", 40)):
        x = torch.randint(0, 120, (n, 8, 8), generator=g).to(torch.uint8)
        y = (torch.arange(n) % 2).to(torch.uint8)
        x[y == 1, :4] += 90
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", x)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", y)
    return f"idx:{folder}"


def recipe(images: str, out: Path, **more: Any) -> TrainJob:
    values = {
        "images": images,
        "network": {"name": "resnet8", "width": 4, "channels": 1, "classes": 2},
        "epochs": 4,
        "batch": 16,
        "lr": 0.05,
        "out": out,
        **more,
    }
    return TrainJob(**values)


@pytest.mark.parametrize("method", [None, "granet(sparsity=0.5, update_every=2)"])
def test_a_folder_comes_out(images: str, tmp_path: Path, method: str | None) -> None:
    record, already = execute_training(recipe(images, tmp_path / "out", method=method))
    assert not already
    assert record["total_sparsity"] == pytest.approx(0.5 if method else 0.0, abs=1e-2)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "training.json", "run.json"}
    model = load_trained(tmp_path / "out")
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 2)
    again, already = execute_training(recipe(images, tmp_path / "out", method=method))
    assert already
    assert again["after"] == record["after"]
    with pytest.raises(BillhookError, match="another billhook command"):
        execute_training(recipe(images, tmp_path / "out", method=method, lr=0.01))


def test_a_killed_training_goes_on_to_the_same_bits(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "rigl(sparsity=0.6, update_every=2)"
    execute_training(recipe(images, tmp_path / "whole", method=method))
    monkeypatch.setattr(loop, "_KEEP_SECONDS", 0.0)
    written = loop._write
    calls = 0

    def write(*arguments: Any) -> None:
        nonlocal calls
        written(*arguments)
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        execute_training(recipe(images, tmp_path / "killed", method=method))
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(loop, "_write", written)
    execute_training(recipe(images, tmp_path / "killed", method=method))
    first, second = (load_trained(tmp_path / name).state_dict() for name in ("whole", "killed"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_from_an_earlier_training(images: str, tmp_path: Path) -> None:
    execute_training(recipe(images, tmp_path / "dense"))
    job = recipe(images, tmp_path / "sparse", start=tmp_path / "dense", method="one-shot(sparsity=0.5)", epochs=1)
    assert execute_training(job)[0]["before"] is not None
    other = recipe(images, tmp_path / "x", start=tmp_path / "dense", network={"name": "mlp", "widths": [64, 2]})
    with pytest.raises(BillhookError, match="of another network"):
        execute_training(other)
    with pytest.raises(BillhookError, match="no weights"):
        execute_training(recipe(images, tmp_path / "x", start=tmp_path / "nowhere"))
    with pytest.raises(BillhookError, match="not written by billhook train"):
        load_trained(tmp_path)
    assert not list(tmp_path.glob("x*"))


def test_a_full_disk_is_one_sentence(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    job = recipe(images, tmp_path / "x", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(train, "save_file", full)
        with pytest.raises(DiskFull, match=r"The disk that holds .*x\.partial is full: free some room"):
            execute_training(job)
    assert not (tmp_path / "x").exists()
    execute_training(job)
    assert load_trained(tmp_path / "x")


def test_wrong_recipes(images: str, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=r"r, line 2: key 'epoch' is not known \(did you mean 'epochs'"):
        parse_as(TrainJob, "network: {name: mlp}\nepoch: 3\nout: x\n", "r")
    with pytest.raises(BillhookError, match=r"r: network is missing: name and options"):
        parse_as(TrainJob, "out: x\n", "r")
    with pytest.raises(BillhookError, match=r"line 2: epochs=-1 is not possible"):
        parse_as(TrainJob, "network: {name: mlp}\nepochs: -1\nout: x\n", "r")
    with pytest.raises(BillhookError, match="did you mean 'granet'"):
        execute_training(recipe(images, tmp_path / "x", method="granit(sparsity=0.9)"))
    with pytest.raises(BillhookError, match="has no option 'sparse'"):
        execute_training(recipe(images, tmp_path / "x", method="granet(sparse=0.9)"))
    with pytest.raises(BillhookError, match="no name"):
        execute_training(recipe(images, tmp_path / "x", network={"depth": 3}))
    assert not (tmp_path / "x.partial").exists()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(8):
        pixels = torch.rand(1, 3, 6, 8, generator=g)
        pixels = torch.nn.functional.interpolate(pixels, (36, 48), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((pixels.permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return folder


def test_photographs(photos: Path, tmp_path: Path) -> None:
    network = {"name": "edsr", "scale": 2, "features": 8, "blocks": 1}
    values = {"photos": str(photos), "network": network, "patch": 12, "batch": 4, "epochs": 2, "out": tmp_path / "out"}
    record, _ = execute_training(TrainJob(**values, method="iss-p(sparsity=0.5, least=100)", lr=1e-3))
    assert record["metric"] == "psnr"
    assert re.fullmatch(r"PSNR \d+\.\d\d dB on 2 test photographs", record["summary"])
    assert record["total_sparsity"] > 0.3
    assert load_trained(tmp_path / "out")(torch.zeros(1, 3, 5, 6)).shape == (1, 3, 10, 12)


def test_text_and_a_small_llama(corpus: Path, tmp_path: Path) -> None:
    network = {"name": "llama", "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 32}
    values = {"text": f"text:{corpus}", "network": network, "length": 32, "epochs": 1, "batch": 8}
    record, _ = execute_training(TrainJob(**values, out=tmp_path / "out", method="gmp(sparsity=0.5, update_every=1)"))
    assert record["summary"].startswith("perplexity ")
    assert " per byte on " in record["summary"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # as any model of Transformers
    for name, weight in load_trained(tmp_path / "out").named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    again = TrainJob(**values, out=tmp_path / "again", start=tmp_path / "out")
    assert execute_training(again)[0]["before"] == pytest.approx(record["after"])


def test_text_and_a_pretrained_model(make_folder: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    folder = make_folder()
    values = {"text": f"text:{corpus}", "length": 16, "epochs": 1, "batch": 8}
    network = {"name": "pretrained", "model": str(folder)}
    record, _ = execute_training(
        TrainJob(**values, network=network, out=tmp_path / "out", method="one-shot(sparsity=0.5)")
    )
    assert record["before"] > 1
    assert " per token on " in record["summary"]
    assert record["total_sparsity"] == pytest.approx(0.5, abs=0.01)
    model, tokenizer = bh.load(tmp_path / "out")
    assert tokenizer is not None
    assert record["sparsity"].keys() == prunable(model).keys()
    assert load_trained(tmp_path / "out").config.model_type == "llama"
    with pytest.raises(BillhookError, match="start's folder as its model"):
        execute_training(TrainJob(**values, network=network, start=folder, out=tmp_path / "x"))


def test_several_processes_are_refused(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BillhookError, match="without torchrun"):
        execute_training(recipe(images, tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def test_data_and_network_must_fit(images: str, photos: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    for wrong, message in (
        ({"images": images, "text": f"text:{corpus}", "network": {"name": "llama"}}, "names images and text"),
        (
            {"images": images, "network": {"name": "edsr"}},
            "Network edsr is for a recipe with photos; for images",
        ),
        ({"photos": str(photos), "network": {"name": "vgg"}}, "for photos there are edsr, swin2sr"),
        ({"images": images, "test_photos": str(photos), "network": {"name": "mlp"}}, "test_photos belongs"),
        ({"images": images, "network": {"name": "pretrained", "model": "demo"}}, "recipe with text"),
        ({"text": f"text:{corpus}", "network": {"name": "pretrained"}}, "recipe with text"),
        ({"images": images, "network": {"name": "resnet8"}}, "does not take this data"),
        ({"images": images, "network": {"name": "mlp"}, "optimizer": "adma"}, "No optimizer 'adma'"),
    ):
        with pytest.raises(BillhookError, match=message):
            execute_training(TrainJob(**wrong, out=out))
        assert not list(tmp_path.glob("x*"))


def test_the_command(images: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"images: '{images}'\nnetwork: {{name: mlp, widths: [64, 16, 2]}}\nepochs: 1\nbatch: 16\n"
        f"out: {tmp_path / 'o'}\n"
    )
    result = CliRunner().invoke(app, ["train", str(path), "--method", "gmp(sparsity=0.5, update_every=1)", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["total_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml")]).exit_code != 0
