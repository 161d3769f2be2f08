"""Running: a method on a model in Python, or a whole job with files, resume, evaluation and report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from billhook.anatomy import Anatomy, anatomy_of
from billhook.calibrate import data, distributed
from billhook.calibrate.capture import Batch
from billhook.calibrate.journal import Journal
from billhook.calibrate.precision import Precision, resolve
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.export import Target, assemble, expand, write_pages
from billhook.measure import evaluate, folder_size, has_perplexity, model_size
from billhook.methods import Method
from billhook.models.checkpoint import Checkpoint
from billhook.models.files import DiskFull, room, write_atomically
from billhook.models.load import load
from billhook.models.source import Streamed, dtype_of, source_of
from billhook.recipe import Job
from billhook.record import FILE, Calibration, Evaluation, Report, Size, StepRecord
from billhook.surgery.slim import FILE as MODELLING_FILE
from billhook.surgery.slim import auto_class, is_slim, only_renames, settle_, slim_
from billhook.system import machine, parse_bytes, parse_device, parse_dtype, peak_memory, versions

log = logging.getLogger("billhook")


@dataclass
class Options:
    """How a walk runs; the same for every step."""

    anatomy: Anatomy | None = None
    device: torch.device | str | None = None
    precision: Precision = "auto"
    max_memory: int | None = None
    looks: dict[str, dict[str, float]] | None = None  # shared by runs over one model and the same data

    @classmethod
    def of(cls, job: Job) -> Options:
        """What a job says of it.

        Raises:
            BillhookError: no such device, or not an amount of memory.
        """
        limit = parse_bytes(job.max_memory) if job.max_memory else None
        return cls(device=parse_device(job.device), precision=job.precision, max_memory=limit)


def prune(
    model: nn.Module,
    method: Method | Sequence[Method],
    batches: Sequence[Batch] = (),
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    force: bool = False,
    anatomy: Anatomy | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    max_memory: int | None = None,
) -> Report:
    """Prune a model in place.

    Args:
        model: a Transformers model, or any `nn.Module` for which `anatomy` is given.
        method: for example `bh.Wanda(sparsity=0.5)`; several are applied one after the other.
        batches: calibration batches, for example from `bh.calibration`; may be empty for methods without data.
        out: write the result there as a Hugging Face folder; needed for a streamed model. The same call after a
            kill goes on where it stopped.
        tokenizer: saved with the model (a streamed model's is copied from its folder).
        force: overwrite `out`.
        anatomy: see `bh.Anatomy`.
        device: where blocks are computed; default: where the model is.
        precision: "auto", "highest", or "bf16" for the matrix products of the calibration passes.
        max_memory: bytes of resident memory to stay under.

    Returns:
        The report: sparsity and error per site, time per block, sizes.

    Raises:
        BillhookError: what cannot work, said before the work where it can be known.
    """
    steps = [method] if isinstance(method, Method) else list(method)
    options = Options(anatomy, device, precision, max_memory)
    start = time.perf_counter()
    before = _size(model)
    report = _blank(model, steps, options, getattr(model, "name_or_path", "") or type(model).__name__)
    tensors = [b for b in batches if isinstance(b, Tensor)]
    if tensors and not tensors[0].is_floating_point():
        report.calibration = Calibration(
            data="given",
            samples=sum(len(b) for b in tensors),
            length=tensors[0].shape[-1],
            seed=0,
            fingerprint=data.fingerprint(tensors),
        )
    if out is None:
        report.steps, report.resumed = run_steps(model, steps, batches, None, options)
        report.size_before, report.size_after = before, _size(model)
        return _closed(report, start)

    target = Target(Path(out))
    refuse_source(model, target)
    report.fingerprint = _fingerprint(model, report, {})
    if opened(target, report.fingerprint, force):
        return Report.read(target.out)
    with staged(target):
        report.steps, report.resumed = run_steps(model, steps, batches, target.staging, options)
        report.size_before = before
        _publish(model, tokenizer, report, target, "dense", start)
    return report


def execute(job: Job, *, force: bool = False) -> tuple[Report, bool]:
    """Run a job from model name to finished folder.

    Returns:
        (report, already): `already` tells that the folder was there from the same command.

    Raises:
        BillhookError: what cannot work; says what to do.
    """
    start = time.perf_counter()
    steps = job.methods()
    options = Options.of(job)
    torch.manual_seed(job.seed)
    target = Target(job.out)
    if not force:
        target.refuse_foreign()
    model, tokenizer = open_model(job.model, steps, parse_dtype(job.dtype))
    refuse_source(model, target)
    family = anatomy_of(model)
    batches, windows, calibration = prepare_data(job, model, tokenizer, family, steps)
    if job.eval and windows is None and distributed.is_main():
        log.warning("%s predicts no next token: its quality, a perplexity, is not measured.", type(model).__name__)
    if windows is not None and not force and any(method.trains for method in steps):
        _refuse_overlap(batches, windows)
    if batches:  # without any, nothing comes before the steps' own checks
        check(model, steps, batches)

    report = _blank(model, steps, options, job.model)
    report.seed, report.storage, report.calibration = job.seed, job.storage, calibration
    extra = {"storage": job.storage, "eval": [job.eval, job.eval_data, job.eval_length, job.eval_windows]}
    report.fingerprint = _fingerprint(model, report, extra)
    if opened(target, report.fingerprint, force):
        return Report.read(target.out), True
    with staged(target):
        eval_data = job.eval_data or job.data
        if windows is not None:
            report.before = remembered(
                target.staging / "before.json",
                lambda: _evaluate(model, windows, eval_data, options, "dense perplexity"),
            )
        report.size_before = _size(model)
        report.steps, report.resumed = run_steps(model, steps, batches, target.staging, options)
        if windows is not None:
            report.after = _evaluate(model, windows, eval_data, options, "pruned perplexity")
        _publish(model, tokenizer, report, target, job.storage, start)
    return report, False


def check(model: nn.Module, steps: Sequence[Method], batches: Sequence[Batch]) -> None:
    """Refuse what cannot work on this model, before any work; a method that reshapes checks the reshaped model.

    Steps after the first one that reshapes meet a model that is not known yet: they check when it is their turn.
    """
    for method in steps:
        if method.reshapes:
            reshape(model)
        method.check(Walk(model, batches, needs="forward"))
        if method.reshapes:
            break


# -- parts of a run ---------------------------------------------------------------------------------------


def run_steps(
    model: nn.Module,
    steps: Sequence[Method],
    batches: Sequence[Batch],
    staging: Path | None,
    options: Options,
) -> tuple[list[StepRecord], bool]:
    """Apply the methods in order; returns their records and whether anything was taken over from a killed run."""
    records: list[StepRecord] = []
    resumed = False
    originals = _originals(model, steps, options)
    for number, method in enumerate(steps, start=1):
        started = time.perf_counter()
        if method.reshapes:
            reshape(model)
        journal = Journal(staging / f"step-{number}") if staging else None
        walk = Walk(
            model,
            batches,
            anatomy=options.anatomy,
            device=options.device,
            precision=_precision(method, options),
            needs=method.requires,
            journal=journal,
            max_memory=options.max_memory,
            label=method.name,
        )
        walk.originals = originals if number > 1 else None
        walk.looks = options.looks if number == 1 else None  # later steps see another model
        method.check(walk)
        if method.finishes_outside or not walk.replayed():
            method.prune(walk)
        resumed |= walk.resumed_at > 0
        records.append(
            StepRecord(
                method=method.name,
                options=method.options(),
                precision=walk.precision,
                blocks=walk.block_records,
                sites=walk.site_records,
                seconds=time.perf_counter() - started,
                notes=walk.notes,
            )
        )
    renamed = settle_(model)
    source = source_of(model)
    if renamed and isinstance(source, Streamed):
        source.rename(renamed)
    return records, resumed


def reshape(model: nn.Module) -> None:
    """Give a model slim blocks, for methods that remove whole parts.

    Raises:
        BillhookError: the model is streamed, and its matrices would have to be taken apart first.
    """
    source = source_of(model)
    if isinstance(source, Streamed) and not is_slim(model) and not only_renames(anatomy_of(model)):
        raise BillhookError(
            f"{type(model).__name__} stores several matrices as one, so to remove parts it has to be in memory: open "
            "it with bh.load(name), without stream."
        )
    renamed = slim_(model)
    if isinstance(source, Streamed):  # also where nothing gets another name: widths are going to change
        source.rename(renamed)


def open_model(name: str, steps: Sequence[Method], dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """Open a model with its weights on disk, or in memory where a step has to take its matrices apart."""
    model, tokenizer = load(name, dtype=dtype, stream=True)
    if any(method.reshapes for method in steps) and not is_slim(model) and not only_renames(anatomy_of(model)):
        model, tokenizer = load(name, dtype=dtype)
    return model, tokenizer


def _precision(method: Method, options: Options) -> Precision:
    """What the user asked for; where that is "auto", float32 for a method that rounding could hurt."""
    return "highest" if options.precision == "auto" and method.exact_passes else options.precision


def _originals(model: nn.Module, steps: Sequence[Method], options: Options) -> Callable[[str], Tensor] | None:
    """Where later steps find the weights as they were before the first; None where none of them asks.

    Raises:
        BillhookError: one asks, and by then the blocks have other shapes.
    """
    if not any(method.wants_original for method in steps[1:]):
        return None
    narrowed = next((number for number, method in enumerate(steps) if method.reshapes), len(steps))
    late = next((method for method in steps[narrowed + 1 :] if method.wants_original), None)
    if late is not None:
        raise BillhookError(
            f"{late.title} compares blocks with those from before the run, and {steps[narrowed].title} gives them "
            "other shapes: choose options of it that look at the loss of the model, such as objective=global."
        )
    source = source_of(model)
    if isinstance(source, Streamed):
        refs, dtype = dict(source.refs), source.dtype
        return lambda name: refs[name].read().to(dtype)
    blocks = anatomy_of(model, options.anatomy).blocks
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(blocks)}
    return kept.__getitem__


def _publish(model: nn.Module, tokenizer: Any, report: Report, target: Target, storage: str, start: float) -> None:
    """Assemble the folder, complete the report and put both in place; the first process only."""
    if distributed.is_main():
        result = target.staging / "result"
        assemble(model, tokenizer, result, storage)
        report.size_after = folder_size(result)
        report.modelling = MODELLING_FILE if is_slim(model) else None
        _closed(report, start)
        write_pages(report, result, target.out.name)
        target.publish(result)
    else:
        _closed(report, start)
    distributed.barrier()


def refuse_source(model: nn.Module, target: Target) -> None:
    """Raise where writing the result would delete the model that is read."""
    source = source_of(model)
    if isinstance(source, Streamed) and source.checkpoint.folder.resolve().is_relative_to(target.out.resolve()):
        raise BillhookError(f"{target.out} holds the model that is pruned: choose another --out.")


def opened(target: Target, fingerprint: str, force: bool, marker: str = FILE) -> bool:
    """`Target.open` by the first process, its outcome in every process."""
    already = False
    trouble: BillhookError | None = None
    if distributed.is_main():
        try:
            already = target.open(fingerprint, force, marker)
        except BillhookError as error:
            trouble = error
    code = distributed.agree(2 if trouble else int(already))
    if code == 2:
        raise trouble or BillhookError("The first process reported an error.")
    return code == 1


@contextmanager
def staged(target: Target) -> Iterator[None]:
    """A user's mistake leaves nothing behind; a full disk, a kill or a crash leaves what can be resumed."""
    try:
        with room(target.staging):
            yield
    except DiskFull:
        raise
    except BillhookError:
        if distributed.is_main():
            target.discard()
        raise


def prepare_data(
    job: Job, model: nn.Module, tokenizer: Any, family: Anatomy, steps: Sequence[Method]
) -> tuple[list[Tensor], Tensor | None, Calibration | None]:
    """Calibration batches, evaluation windows and the calibration's description."""
    if family.input != "input_ids":
        if all(method.requires == "nothing" for method in steps):
            return [], None, None
        raise BillhookError(
            f"{job.model} takes {family.input}, and the command line calibrates on text only: call bh.prune(model, "
            "method, batches) with batches of images, or use a method without data such as magnitude."
        )
    if tokenizer is None:
        raise BillhookError(f"{job.model} has no tokenizer beside its weights, so text cannot be fed to it.")
    limit = position_limit(model)
    for name, length in (("length", job.length), ("eval_length", job.eval_length)):
        if limit and length and length > limit:
            raise BillhookError(
                f"{name}={length} is more than the {limit} positions of the model: use at most {limit}."
            )
    batch = 1 if job.max_memory else None
    if distributed.world() > 1:  # every process gets a batch
        share = max(1, job.samples // distributed.world())
        batch = min(batch or max(1, data.BATCH_TOKENS // job.length), share)
    batches = data.calibration(job.data, tokenizer, samples=job.samples, length=job.length, seed=job.seed, batch=batch)
    calibration = Calibration(
        data=job.data,
        samples=job.samples,
        length=job.length,
        seed=job.seed,
        fingerprint=data.fingerprint(batches),
    )
    if not job.eval or not has_perplexity(model):
        return batches, None, calibration
    length = job.eval_length or min(1024, limit or 1024)
    windows = data.evaluation(job.eval_data or job.data, tokenizer, length=length)[: job.eval_windows]
    return batches, windows, calibration


_RUN = 16  # tokens: shorter runs recur in any two texts


def _refuse_overlap(batches: Sequence[Tensor], windows: Tensor) -> None:
    """Raise where a method would be trained on the text that it is judged on."""
    judged = {tuple(row[i : i + _RUN]) for row in windows.tolist() for i in range(len(row) - _RUN + 1)}
    runs = [
        tuple(row[i : i + _RUN]) for b in batches for row in b.tolist() for i in range(0, len(row) - _RUN + 1, _RUN)
    ]
    share = sum(run in judged for run in runs) / max(len(runs), 1)
    if share > 0.02:
        raise BillhookError(
            f"{share:.0%} of the calibration text is also in the evaluation text, and this run trains on it: choose "
            "other --data or --eval-data, or insist with --force."
        )


def position_limit(model: nn.Module) -> int | None:
    """How many positions the model was made for, where its configuration says so."""
    value = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return int(value) if value else None


def _evaluate(model: nn.Module, windows: Tensor, name: str, options: Options, label: str) -> Evaluation:
    return evaluate(model, windows, name, device=options.device, max_memory=options.max_memory, label=label)


def remembered(path: Path, make: Any) -> Evaluation:
    """A measurement that a resumed run does not make again."""
    known = distributed.agree(int(path.is_file()))
    if known:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    result: Evaluation = make()
    if distributed.is_main():
        write_atomically(path, [result.model_dump_json().encode()])
    return result


def _blank(model: nn.Module, steps: Sequence[Method], options: Options, name: str) -> Report:
    family = anatomy_of(model, options.anatomy)
    dtype = dtype_of(model)
    first = next(model.parameters()).device
    known = isinstance(model, transformers.PreTrainedModel)
    device = torch.device(options.device or ("cpu" if first.type == "meta" else first))
    return Report(
        billhook=versions().get("billhook", "0"),
        model=name,
        family=family.family,
        loader=auto_class(model) if known else None,
        recipe=[{"method": method.name, **method.options()} for method in steps],
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        precision="/".join(dict.fromkeys(resolve(_precision(method, options), device, dtype) for method in steps)),
        processes=distributed.world(),
        versions=versions(),
        machine=machine(),
    )


def _closed(report: Report, start: float) -> Report:
    report.seconds = time.perf_counter() - start
    report.peak_memory = peak_memory()
    return report


def _size(model: nn.Module) -> Size:
    source = source_of(model)
    return folder_size(source.checkpoint.folder) if isinstance(source, Streamed) else model_size(model)


def _fingerprint(model: nn.Module, report: Report, extra: dict[str, Any]) -> str:
    """What makes two commands the same: model, recipe, data, and how it is computed."""
    how = [report.recipe, report.seed, report.device, report.dtype, report.precision, extra]
    return fingerprint_of(model, report.calibration, how)


def fingerprint_of(model: nn.Module, calibration: Calibration | None, described: Any) -> str:
    """A short hash of a model's weights (by file or shape), the calibration data, and anything that is JSON."""
    source = source_of(model)
    identity: Any
    if isinstance(source, Streamed):
        identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.checkpoint.files]
    else:
        identity = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    data_hash = calibration.model_dump() if calibration else None
    text = json.dumps([identity, data_hash, described, versions().get("billhook")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate_model(
    name: str,
    text: str = "demo",
    *,
    length: int | None = None,
    windows: int | None = 40,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: str | None = None,
) -> Evaluation:
    """Perplexity of a model by name on held-out text, block by block from disk.

    Raises:
        BillhookError: no such model or text, not a language model, or too little text.
    """
    if windows is not None and windows < 1:
        raise BillhookError(f"windows={windows} is not possible: give at least 1, or 0 for all the text.")
    limit_bytes = parse_bytes(max_memory) if max_memory else None
    where = parse_device(device)
    model, tokenizer = load(name, dtype=parse_dtype(dtype), stream=True)
    family = anatomy_of(model)
    if family.input != "input_ids" or tokenizer is None or not has_perplexity(model):
        raise BillhookError(f"{name} is not a language model with a tokenizer, so it has no perplexity.")
    limit = position_limit(model)
    if limit and length and length > limit:
        raise BillhookError(f"length={length} is more than the {limit} positions of the model: use at most {limit}.")
    ids = data.evaluation(text, tokenizer, length=length or min(1024, limit or 1024))[:windows]
    return evaluate(model, ids, text, device=where, max_memory=limit_bytes)


def export_plain(folder: Path, out: Path, *, force: bool = False) -> None:
    """Write a billhook folder's weights as plain safetensors, with all its other files.

    Raises:
        BillhookError: `folder` is not a model folder, or `out` exists and `force` is not given.
    """
    checkpoint = Checkpoint.open(folder)
    target = Target(out)
    if out.exists() and not force:
        raise BillhookError(f"{out} exists: choose another --out, or overwrite it with --force.")
    result = target.fresh()
    try:
        result.mkdir()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path not in checkpoint.files and path.name != "model.safetensors.index.json":
                shutil.copyfile(path, result / path.name)
        expand(folder, result)
        if (folder / FILE).is_file():
            report = Report.read(folder)
            report.storage = "dense"
            report.size_after = folder_size(result)
            write_pages(report, result, out.name)
    except BaseException:
        target.discard()
        raise
    target.publish(result)
