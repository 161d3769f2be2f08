"""Comparing methods: every method at every target on one model, data and protocol."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from billhook.anatomy import anatomy_of
from billhook.calibrate import distributed
from billhook.declared import split_outside
from billhook.errors import BillhookError
from billhook.export import Target
from billhook.measure import evaluate
from billhook.methods import Method
from billhook.methods.base import METHODS
from billhook.models.files import write_atomically
from billhook.models.load import load
from billhook.recipe import Job
from billhook.report import table
from billhook.report.table import Cell, Comparison
from billhook.run import (
    Options,
    check,
    fingerprint_of,
    open_model,
    opened,
    prepare_data,
    refuse_source,
    remembered,
    run_steps,
    staged,
)
from billhook.system import machine, parse_dtype, peak_memory, reset_peak_memory, versions


def compare(job: Job, names: Sequence[str], targets: Sequence[str], *, force: bool = False) -> tuple[Comparison, bool]:
    """Prune `job.model` by each method at each target and measure perplexity.

    Every finished cell is kept, so a killed comparison goes on with the next one. Pruned weights are dropped
    once they are measured.

    Args:
        job: model, data and protocol; its steps are ignored.
        names: methods as users type them, with options and steps after them: `wanda(refine=dsnot)+perp`.
        targets: sparsities such as "0.5", patterns such as "2:4", or what stays of the whole model, "size=0.8" or
            "flops=0.8".
        force: overwrite `job.out`.

    Returns:
        (comparison, already): `already` tells that the folder was there from the same command.

    Raises:
        BillhookError: an unknown method or an impossible target, before any work; or what `execute` raises.
    """
    cells = [(name, target, steps_of(name, target)) for name in names for target in targets]
    target_folder = Target(job.out)
    if not force:
        target_folder.refuse_foreign("table.json")
    torch.manual_seed(job.seed)
    options = replace(Options.of(job), looks={})
    model, tokenizer = load(job.model, dtype=parse_dtype(job.dtype), stream=True)
    refuse_source(model, target_folder)
    family = anatomy_of(model)
    batches, windows, calibration = prepare_data(
        job, model, tokenizer, family, [step for _, _, steps in cells for step in steps]
    )
    if windows is None:
        raise BillhookError("A comparison needs perplexities: use a language model and leave --no-eval out.")
    for _, _, steps in cells:
        fresh, _ = open_model(job.model, steps, parse_dtype(job.dtype))
        check(fresh, steps, batches)

    described = {
        "job": job.model_dump(mode="json"),
        "cells": [(n, t, [s.options() for s in steps]) for n, t, steps in cells],
    }
    fingerprint = fingerprint_of(model, calibration, described)
    if opened(target_folder, fingerprint, force, marker="table.json"):
        return Comparison.model_validate_json((job.out / "table.json").read_text(encoding="utf-8")), True
    eval_data = job.eval_data or job.data
    with staged(target_folder):
        staging = target_folder.staging
        dense = remembered(
            staging / "dense.json",
            lambda: evaluate(
                model, windows, eval_data, device=options.device, max_memory=options.max_memory, label="dense"
            ),
        )
        comparison = Comparison(
            model=job.model, dense=dense, calibration=calibration, machine=machine(), versions=versions()
        )
        for name, target, steps in cells:
            label = re.sub(r"[^\w.-]+", "_", f"{name}-{target.replace(':', 'of')}")
            record = staging / f"{label}.json"
            if distributed.agree(int(record.is_file())):
                comparison.cells.append(Cell.model_validate_json(record.read_text(encoding="utf-8")))
                continue
            reset_peak_memory()
            start = time.perf_counter()
            model, _ = open_model(job.model, steps, parse_dtype(job.dtype))
            records, _ = run_steps(model, steps, batches, staging / label, options)
            seconds, peak = time.perf_counter() - start, peak_memory()
            after = evaluate(
                model, windows, eval_data, device=options.device, max_memory=options.max_memory, label=label
            )
            cell = Cell(
                method=name,
                target=target,
                sparsity=records[-1].sparsity,
                perplexity=after.perplexity,
                seconds=seconds,
                peak_memory=peak,
            )
            if distributed.is_main():
                write_atomically(record, [cell.model_dump_json().encode()])
                shutil.rmtree(staging / label, ignore_errors=True)
            comparison.cells.append(cell)
        if distributed.is_main():
            result = staging / "result"
            shutil.rmtree(result, ignore_errors=True)
            result.mkdir()
            table.write(comparison, result)
            write_atomically(result / "run.json", [f'{{"fingerprint": "{fingerprint}"}}'.encode()])
            target_folder.publish(result)
        distributed.barrier()
    return comparison, False


def steps_of(text: str, target: str) -> list[Method]:
    """The steps of a cell: `wanda`, `wanda(refine=dsnot)`, `magnitude+perp`; the target is the first one's."""
    first, *rest = split_outside(text, "+") or [""]
    if ":" in target:
        goal: dict[str, object] = {"pattern": target}
    elif table.whole(target)[0]:
        key, part = table.whole(target)
        goal = {table.WHOLE[key][0]: part}
    else:
        try:
            goal = {"sparsity": float(target)}
        except ValueError:
            raise BillhookError(f"{target!r} is neither a sparsity such as 0.5 nor a pattern such as 2:4.") from None
    return [METHODS.parse(first, **goal), *(METHODS.parse(one) for one in rest)]
