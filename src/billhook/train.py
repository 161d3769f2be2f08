"""A training of a built-in task, from recipe to folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from billhook.errors import BillhookError, nearest
from billhook.export.folder import Target
from billhook.models.files import room, write_atomically
from billhook.models.load import load
from billhook.system import machine, versions
from billhook.tasks import (
    NETWORKS,
    Classification,
    Enlarging,
    Task,
    Training,
    load_images,
    load_photos,
    load_text,
    network,
)
from billhook.training import PRUNERS, SparseTraining, Stretch
from billhook.training.prunable import prunable
from billhook.training.runs import RUNS, SeveralRuns

FILE = "training.json"  # in every folder that a training has written
WEIGHTS = "model.safetensors"


class TrainJob(BaseModel):
    """A training as data; the keys of a recipe for `billhook train`."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    images: str | None = Field(None, description="to classify: fashion-mnist (if nothing else), cifar10, idx:FOLDER")
    photos: str | None = Field(None, description="to enlarge: a folder of photographs, or scikit-image")
    test_photos: str | None = Field(None, description="folder of photographs to test on; every fifth of photos")
    text: str | None = Field(None, description="to write on: demo, wikitext2 or text:PATH")
    network: dict[str, Any] = Field(
        description="name and options of a network: {name: resnet20, width: 16}; for text also {name: pretrained, "
        "model: MODEL}"
    )
    method: str | None = Field(None, description="what prunes, with its options: granet(sparsity=0.9); nothing: dense")
    start: Path | None = Field(None, description="folder of an earlier training to go on from")
    epochs: float = Field(10, gt=0, description="of the whole training; of each run for methods that own several")
    batch: int | None = Field(None, ge=2, description="examples per step: images 128, patches 16, windows of text 16")
    optimizer: str | None = Field(None, description="sgd (images), adam (photos) or adamw (text)")
    lr: float | None = Field(None, gt=0, description="peak learning rate: images 0.1, photos 2e-4, text 1e-3")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of sgd")
    weight_decay: float | None = Field(None, ge=0, description="weight decay: images 5e-4, photos 0, text 0.1")
    augment: bool = Field(True, description="shift and flip images; flip and turn patches of photos")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the training that the learning rate rises")
    hold: float = Field(0, ge=0, lt=1, description="fraction that it then stays at its peak")
    clip: float | None = Field(None, gt=0, description="norm to which gradients are clipped")
    train_images: int | None = Field(None, ge=1, description="only the first so many images or photographs")
    patch: int = Field(48, ge=8, description="photos: pixels of a side of the small patches")
    length: int = Field(256, ge=2, description="text: tokens of a window")
    seed: int = Field(0, ge=0, lt=2**31, description="of the first weights and the data order")
    out: Path = Field(description="folder to write")


_PRETRAINED = "pretrained"
_SETTINGS = ("epochs", "batch", "optimizer", "lr", "momentum", "weight_decay", "warmup", "hold", "clip")  # of Training


def execute_training(job: TrainJob, *, force: bool = False) -> tuple[dict[str, Any], bool]:
    """Train as the recipe says and write a folder: weights, the network's name, and what was measured.

    A killed training goes on from its last minute when the same job is executed again.

    Returns:
        (record, already): `already` tells that the folder was there from the same recipe.

    Raises:
        BillhookError: several processes, unknown names, data that is not there or does not fit the network, or a folder
            that must not be overwritten.
        DiskFull: there is no room; what was trained until then stays resumable.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BillhookError(
            "billhook train works in one process: start it without torchrun (in a loop of your own, pruners work under "
            "DistributedDataParallel)."
        )
    method: Any = None if job.method is None else trained_by(job.method)
    kind = _kind(job)
    model, tokenizer = _network(job, kind)
    if job.start is not None:
        _load(model, job.start)
    values = job.model_dump(mode="json")
    fingerprint = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    target = Target(job.out)
    task = _task(job, kind, tokenizer)
    settings = {key: getattr(job, key) for key in _SETTINGS}
    training = Training(task, **settings, label=job.method or "dense")
    training.try_out(model)
    if target.open(fingerprint, force, marker=FILE):
        return json.loads((target.out / FILE).read_text(encoding="utf-8")), True

    with room(target.staging):
        known = job.start is not None or tokenizer is not None
        before = training.measure(model) if known else None
        begin = time.perf_counter()
        if method is None:
            training.run(model, Stretch(seed=job.seed), keep=target.staging / "state.safetensors")
        elif isinstance(method, SeveralRuns):
            method.run(model, train=training, evaluate=training.score, out=target.staging / "runs")
        else:
            training.prune(model, method, seed=job.seed, keep=target.staging / "state.safetensors")
        value = training.measure(model)
        record: dict[str, Any] = {
            "fingerprint": fingerprint,
            "recipe": values,
            "metric": task.metric,
            "before": before,
            "after": value,
            "summary": f"{task.say(value)} on {task.tests}",
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
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(result)
            if tokenizer is not None:
                tokenizer.save_pretrained(result)
        else:
            save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, result / WEIGHTS)
        for file, content in ((FILE, record), ("run.json", {"fingerprint": fingerprint})):
            write_atomically(result / file, [json.dumps(content, indent=1).encode()])
        target.publish(result)
    return record, False


def _kind(job: TrainJob) -> str:
    given = [name for name in ("images", "photos", "text") if getattr(job, name) is not None]
    if len(given) > 1:
        raise BillhookError(f"The recipe names {' and '.join(given)}: a training has one kind of data.")
    kind = given[0] if given else "images"
    if kind != "photos" and job.test_photos is not None:
        raise BillhookError("test_photos belongs to a recipe with photos, and this one has none.")
    return kind


def _network(job: TrainJob, kind: str) -> tuple[nn.Module, Any]:
    """The network, and its tokenizer if it has one."""
    options = dict(job.network)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise BillhookError("The recipe's network has no name: write 'network: {name: resnet20}', for example.")
    if name == _PRETRAINED:
        source = options.pop("model", None)
        if kind != "text" or not isinstance(source, str) or options:
            raise BillhookError(
                "A pretrained network is a language model for a recipe with text: write 'network: {name: pretrained, "
                "model: demo}'."
            )
        if job.start is not None:
            raise BillhookError("A pretrained network is where the training starts: name start's folder as its model.")
        model: Any
        model, tokenizer = load(source, dtype=torch.float32)
        if tokenizer is None or model.get_output_embeddings() is None:
            raise BillhookError(f"{source} is no language model with a tokenizer, which a training on text needs.")
        return model, tokenizer
    built = network(name, seed=job.seed, **options)
    made_for = NETWORKS[name][1]
    if made_for != kind:
        fitting = ", ".join(n for n, (_, k) in NETWORKS.items() if k == kind)
        raise BillhookError(f"Network {name} is for a recipe with {made_for}; for {kind} there are {fitting}.")
    return built, None


def _task(job: TrainJob, kind: str, tokenizer: Any) -> Task:
    if kind == "photos":
        photos = load_photos(str(job.photos), job.test_photos)
        photos = photos.first(job.train_images) if job.train_images else photos
        return Enlarging(photos, job.network.get("scale", 2), job.patch, job.augment)
    if kind == "text":
        return load_text(str(job.text), tokenizer, job.length)
    images = load_images(job.images or "fashion-mnist")
    return Classification(images.first(job.train_images) if job.train_images else images, job.augment)


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
    if options["name"] == _PRETRAINED:
        return load(folder)[0]
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
