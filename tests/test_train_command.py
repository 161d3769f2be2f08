"""`billhook train`: from recipe to folder, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from billhook import train
from billhook.cli import app
from billhook.errors import BillhookError
from billhook.models.files import DiskFull
from billhook.recipe import parse_as
from billhook.tasks import loop
from billhook.train import TrainJob, execute_training, load_trained
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
    assert again["accuracy"] == record["accuracy"]
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
    assert execute_training(job)[0]["accuracy_before"] is not None
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
