"""A training of a built-in task, from recipe to folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from billhook.errors import BillhookError, nearest
from billhook.export.folder import Target
from billhook.models.files import room, write_atomically
from billhook.system import machine, versions
from billhook.tasks import Training, load_images, network
from billhook.training import PRUNERS, SparseTraining, Stretch
from billhook.training.prunable import prunable
from billhook.training.runs import RUNS, SeveralRuns

FILE = "training.json"  # in every folder that a training has written
WEIGHTS = "model.safetensors"


class TrainJob(BaseModel):
    """A training as data; the keys of a recipe for `billhook train`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    images: str = Field("fashion-mnist", description="fashion-mnist, cifar10, or idx:FOLDER")
    network: dict[str, Any] = Field(description="name and options of a network: {name: resnet20, width: 16}")
    method: str | None = Field(None, description="what prunes, with its options: granet(sparsity=0.9); nothing: dense")
    start: Path | None = Field(None, description="folder of an earlier training to go on from")
    epochs: float = Field(10, gt=0, description="of the whole training; of each run for methods that own several")
    batch: int = Field(128, ge=2, description="images per step")
    lr: float = Field(0.1, gt=0, description="peak learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    augment: bool = Field(True, description="shift and flip images")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the training that the learning rate rises")
    clip: float | None = Field(None, gt=0, description="norm to which gradients are clipped")
    train_images: int | None = Field(None, ge=1, description="only the first so many")
    seed: int = Field(0, ge=0, lt=2**31, description="of the first weights and the data order")
    out: Path = Field(description="folder to write")


def execute_training(job: TrainJob, *, force: bool = False) -> tuple[dict[str, Any], bool]:
    """Train as the recipe says and write a folder: weights, the network's name, and what was measured.

    A killed training goes on from its last minute when the same job is executed again.

    Returns:
        (record, already): `already` tells that the folder was there from the same recipe.

    Raises:
        BillhookError: unknown names, data that is not there, or a folder that must not be overwritten.
        DiskFull: there is no room; what was trained until then stays resumable.
    """
    options = dict(job.network)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise BillhookError("The recipe's network has no name: write 'network: {name: resnet20}', for example.")
    method: Any = None if job.method is None else trained_by(job.method)
    model = network(name, seed=job.seed, **options)
    if job.start is not None:
        _load(model, job.start)
    values = job.model_dump(mode="json")
    fingerprint = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    target = Target(job.out)
    images = load_images(job.images)
    images = images.first(job.train_images) if job.train_images else images
    if target.open(fingerprint, force, marker=FILE):
        return json.loads((target.out / FILE).read_text(encoding="utf-8")), True

    with room(target.staging):
        settings = {key: getattr(job, key) for key in ("epochs", "batch", "lr", "momentum", "weight_decay", "augment")}
        training = Training(images, **settings, warmup=job.warmup, clip=job.clip, label=job.method or "dense")
        before = training.accuracy(model) if job.start is not None else None
        begin = time.perf_counter()
        if method is None:
            training.run(model, Stretch(seed=job.seed), keep=target.staging / "state.safetensors")
        elif isinstance(method, SeveralRuns):
            method.run(model, train=training, evaluate=training.accuracy, out=target.staging / "runs")
        else:
            training.prune(model, method, seed=job.seed, keep=target.staging / "state.safetensors")
        record: dict[str, Any] = {
            "fingerprint": fingerprint,
            "recipe": values,
            "accuracy_before": before,
            "accuracy": training.accuracy(model),
            "test_images": len(images.test),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sparsity": {n: 1 - int(w.count_nonzero()) / w.numel() for n, w in prunable(model).items()},
            "seconds": time.perf_counter() - begin,
            "versions": versions(),
            "machine": machine(),
        }
        weights = prunable(model).values()
        record["total_sparsity"] = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        result = target.staging / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, result / WEIGHTS)
        for file, content in ((FILE, record), ("run.json", {"fingerprint": fingerprint})):
            write_atomically(result / file, [json.dumps(content, indent=1).encode()])
        target.publish(result)
    return record, False


def trained_by(text: str) -> SparseTraining | SeveralRuns:
    """A pruner, or a method of several runs, from text such as `granet(sparsity=0.9)`.

    Raises:
        BillhookError: no such name, or a wrong option.
    """
    name = text.split("(")[0].strip()
    if name in RUNS.known():
        return RUNS.parse(text)
    if name not in PRUNERS.known():
        known = sorted({*RUNS.known(), *PRUNERS.known()})
        raise BillhookError(f"No method of training {name!r}{nearest(name, known)}: there are {', '.join(known)}.")
    return PRUNERS.parse(text)


def load_trained(folder: str | Path) -> nn.Module:
    """The network of a folder that `billhook train` wrote.

    Raises:
        BillhookError: the folder is something else.
    """
    folder = Path(folder)
    try:
        recipe = json.loads((folder / FILE).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError):
        raise BillhookError(f"{folder} was not written by billhook train: it has no readable {FILE}.") from None
    options = dict(recipe["network"])
    model = network(options.pop("name"), **options)
    _load(model, folder)
    return model


def _load(model: nn.Module, folder: Path) -> None:
    path = folder / WEIGHTS
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise BillhookError(f"There are no weights {path} to start from.") from None
    except (SafetensorError, OSError) as error:
        raise BillhookError(f"{path} is not a readable safetensors file ({error}).") from None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            raise BillhookError(f"{path} has no {name} of shape {list(shape)}: it is of another network.")
    with torch.no_grad():
        model.load_state_dict(state)
