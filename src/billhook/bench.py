"""Measuring models side by side: speed, memory and size in one run, the models taking turns."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from billhook.errors import BillhookError
from billhook.export.folder import Target
from billhook.measure.worker import Worker
from billhook.models.checkpoint import Checkpoint
from billhook.models.load import load, resolve
from billhook.progress import bar
from billhook.report import bench as report
from billhook.report.bench import Bench, Culprit, Measured, Timing
from billhook.system import machine, parse_dtype, versions

SHORT = 0.85  # of the speed-up that the FLOPs promise: a model that reaches less is looked into
_PAUSE = 0.25  # seconds after which the threads of the model before have stopped waiting actively for work


@dataclass(frozen=True)
class _Subject:
    """A model that was found fit to be measured: what its process has to know, and its bytes on disk."""

    label: str
    request: dict[str, Any]
    nbytes: int
    needed: int  # bytes of memory that its weights take at least


def bench(
    models: Sequence[str],
    *,
    out: Path | None = None,
    prompt: int = 512,
    decode: int = 128,
    repeats: int = 5,
    dtype: str = "float32",
    threads: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Bench:
    """Measure language models on the CPU, one sequence at a time, and compare each with the first.

    Each model has a process of its own, which stays: in every round each model runs one prefill and writes `decode`
    tokens, while the others wait. A path that ends in .gguf is run by llama.cpp, everything else by PyTorch.

    Args:
        models: as in `load`; the first is what the others are compared with.
        out: folder to write bench.csv, bench.md, bench.json, plot.svg and index.html into.
        prompt: tokens of the prompt, which are random.
        decode: tokens to write after it, greedily, with the cache.
        repeats: rounds that count; one more comes before them.
        dtype: of the weights: float32, bfloat16, float16, or auto (each model's own). GGUF files keep theirs.
        threads: of the computations, in PyTorch and llama.cpp alike; None takes as many as PyTorch would.
        seed: of the prompts.
        force: overwrite `out`.

    Raises:
        BillhookError: there is no such model, it is not a language model, the prompt does not fit its positions, an
            option is out of range, the models do not fit into memory together, or one cannot be run.
    """
    for name, value, least in (("prompt", prompt, 1), ("decode", decode, 1), ("repeats", repeats, 1)):
        if value < least:
            raise BillhookError(f"{name} must be at least {least}, not {value}.")
    if threads is not None and threads < 1:
        raise BillhookError(f"threads must be at least 1, not {threads}.")
    if not models:
        raise BillhookError("There is no model to measure: name one or more.")
    parse_dtype(dtype)
    target = Target(out) if out is not None else None
    if target is not None and not force:
        target.refuse_foreign("bench.json")
        if target.out.exists():
            raise BillhookError(f"{target.out} exists: choose another --out, or overwrite it with --force.")
    threads = threads or torch.get_num_threads()
    shared = {"prompt": prompt, "decode": decode, "dtype": dtype, "threads": threads, "seed": seed}
    subjects = [_subject(name, label, shared) for name, label in zip(models, _labels(models), strict=True)]
    needed, free = sum(s.needed for s in subjects), psutil.virtual_memory().available
    if needed > free:
        raise BillhookError(
            f"The weights of the models take {needed / 1e9:.1f} GB together, and {free / 1e9:.1f} GB of memory are "
            "free: measure fewer at once, or use --dtype bfloat16."
        )
    result = Bench(
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        dtype=dtype,
        threads=threads,
        seed=seed,
        machine=machine() | {"threads": threads},
        versions=versions() | _llama_cpp(subjects),
    )
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            worker = Worker(subject.label, subject.request)
            stack.callback(worker.close)
            workers.append(worker)
        result.models = _measure(subjects, workers, repeats, prompt, decode)
        _explain(result.models, workers)
    if target is not None:
        folder = target.fresh()
        try:
            report.write(result, folder)
        except BaseException:
            target.discard()
            raise
        target.publish(folder)
    return result


def _measure(
    subjects: Sequence[_Subject], workers: Sequence[Worker], repeats: int, prompt: int, decode: int
) -> list[Measured]:
    loaded, rounds = [], []
    with bar("measure", len(workers) * (repeats + 2)) as step:
        for worker in workers:
            loaded.append(worker.load() | (worker.ask("count") if "folder" in worker.request else {}))
            step(worker.label)
        for _ in range(repeats + 1):
            rounds.append([_turn(worker, len(workers)) for worker in workers])
            step(advance=len(workers))
    rounds = rounds[1:]  # the first one warms up
    measured: list[Measured] = []
    for index, (subject, facts) in enumerate(zip(subjects, loaded, strict=True)):
        turns = [one[index] for one in rounds]
        one = Measured(
            model=subject.label,
            runtime="llama.cpp" if "gguf" in subject.request else "PyTorch",
            prefill=Timing.of([t["prefill"] for t in turns], prompt),
            decode=Timing.of([t["decode"] for t in turns], decode),
            bytes=subject.nbytes,
            **facts,
        )
        measured.append(one)
        if index == 0:
            continue
        first = measured[0]
        # neighbours in time are compared, so that what slows the machine for a while slows both
        one.prefill_speedup = median(r[0]["prefill"] / r[index]["prefill"] for r in rounds)
        one.decode_speedup = median(r[0]["decode"] / r[index]["decode"] for r in rounds)
        if first.flops and one.flops:
            one.flops_speedup = first.flops / one.flops
            one.share = one.prefill_speedup / one.flops_speedup
    return measured


def _turn(worker: Worker, count: int) -> dict[str, float]:
    if count > 1:
        time.sleep(_PAUSE)
    return worker.ask("round")


def _explain(measured: Sequence[Measured], workers: Sequence[Worker]) -> None:
    """Name what takes the time in the models that fall short of what their FLOPs promise."""
    short = [i for i, one in enumerate(measured) if one.share is not None and one.share < SHORT]
    if not short:
        return
    before = workers[0].ask("profile")
    for index in short:
        one = measured[index]
        assert one.flops_speedup is not None
        one.culprit = culprit(before, workers[index].ask("profile"), one.flops_speedup)


def culprit(before: dict[str, Any], after: dict[str, Any], speedup: float) -> Culprit | None:
    """The operation that takes most more time than it would if it were faster by `speedup` than in the first model.

    Args:
        before: operation -> its time in the first model, as `OpTime` has it.
        after: the same of the other model.
        speedup: what the FLOPs promise.

    Returns:
        None where no operation takes more.
    """
    excess = {name: time["seconds"] - _seconds(before, name) / speedup for name, time in after.items()}
    if not excess:
        return None
    name = max(excess, key=lambda n: excess[n])
    if excess[name] <= 0:
        return None
    return Culprit(
        op=name,
        seconds=after[name]["seconds"],
        first_seconds=_seconds(before, name),
        excess=excess[name],
        calls=after[name]["calls"],
        total_excess=sum(_seconds(after, n) for n in after) - sum(_seconds(before, n) for n in before) / speedup,
        shapes=after[name]["shapes"],
    )


def _seconds(times: dict[str, Any], name: str) -> float:
    return float(times[name]["seconds"]) if name in times else 0.0


# -- what can be measured ---------------------------------------------------------------------------------


def _labels(models: Sequence[str]) -> list[str]:
    """The models as they are called in tables: as typed, numbered where one is there twice."""
    seen: dict[str, int] = {}
    labels = []
    for name in models:
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return labels


def _subject(name: str, label: str, shared: dict[str, Any]) -> _Subject:
    if name.lower().endswith(".gguf"):
        return _gguf(Path(name).expanduser(), label, shared)
    folder = resolve(name)
    # without its weights, which only its own process reads
    model: Any
    model, _ = load(folder, stream=True)
    text = model.config.get_text_config()
    if getattr(model, "main_input_name", "") != "input_ids" or not model.can_generate():
        raise BillhookError(f"{name} is a {type(model).__name__}: only language models can be measured for now.")
    positions = getattr(text, "max_position_embeddings", None)
    _refuse_long(name, positions, shared)
    files = Checkpoint.open(folder).files
    nbytes = sum(file.stat().st_size for file in files)
    dtype = parse_dtype(shared["dtype"])
    count = sum(p.numel() for p in model.parameters())
    return _Subject(label, {"folder": str(folder), **shared}, nbytes, count * dtype.itemsize if dtype else nbytes)


def _gguf(path: Path, label: str, shared: dict[str, Any]) -> _Subject:
    if not path.is_file():
        raise BillhookError(f"No model {str(path)!r}: there is no such file.")
    if importlib.util.find_spec("xllamacpp") is None:
        raise BillhookError(f"{path} is run by llama.cpp, which is not installed: pip install 'billhook[gguf]'.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    except Exception as error:  # what is wrong with a file surfaces as many exception types
        raise BillhookError(f"{path} is not a GGUF file of a language model ({type(error).__name__}).") from None
    context = reader.fields.get(f"{architecture}.context_length")
    _refuse_long(label, context.contents() if context is not None else None, shared)
    size = path.stat().st_size
    return _Subject(label, {"gguf": str(path), "vocabulary": vocabulary, **shared}, size, size)


def _refuse_long(name: str, positions: Any, shared: dict[str, Any]) -> None:
    prompt, steps = shared["prompt"], shared["decode"]
    if isinstance(positions, int) and prompt + steps > positions:
        raise BillhookError(
            f"A prompt of {prompt} tokens and {steps} more do not fit the {positions} positions of {name}: "
            "measure with a shorter --prompt or --decode."
        )


def _llama_cpp(subjects: Sequence[_Subject]) -> dict[str, str]:
    if not any("gguf" in subject.request for subject in subjects):
        return {}
    from importlib.metadata import version

    return {"xllamacpp": version("xllamacpp")}
