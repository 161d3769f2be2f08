"""A sparsity curve from model name to folder: one-shot pruning at rising sparsity, and where the quality breaks."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import torch

from billhook.analysis.curve import GRID, essential_sparsity
from billhook.anatomy import anatomy_of
from billhook.calibrate import distributed
from billhook.calibrate.walk import Walk
from billhook.errors import BillhookError
from billhook.export import Target
from billhook.measure import evaluate
from billhook.methods import Method, SparseMethod, method
from billhook.models.files import write_atomically
from billhook.models.load import load
from billhook.recipe import Job
from billhook.report import curve as pages
from billhook.report.curve import CurveReport, MatrixSparsities, PatternPoint
from billhook.run import Options, fingerprint_of, opened, prepare_data, refuse_source, run_steps, staged
from billhook.system import machine, parse_dtype, versions

MARKER = "curve.json"


def sparsity_curve(
    job: Job,
    name: str = "magnitude",
    *,
    eps: float = 1.0,
    grid: Sequence[float] = GRID,
    rho: float = 0.01,
    patterns: Sequence[str] = (),
    seeds: int = 1,
    scope: Literal["row", "layer", "global"] | None = None,
    force: bool = False,
) -> tuple[CurveReport, bool]:
    """Essential sparsity of a language model (Jaiswal et al., NeurIPS 2023): quality is −NLL per token.

    Every measured point is kept, so a killed curve goes on with the next one.

    Args:
        job: model, data and protocol; its steps are ignored.
        name: the method that prunes; magnitude ranks all matrices together, as the paper does.
        eps: allowed rise of the NLL, in percent of the dense model's.
        grid: sparsities to begin with.
        rho: resolution of the result.
        patterns: N:M patterns measured beside the curve.
        seeds: calibration draws per point, for methods that read data.
        scope: of the ranking, where the method has one; magnitude: global.
        force: overwrite `job.out`.

    Returns:
        (report, already): `already` tells that the folder was there from the same command.

    Raises:
        BillhookError: an unknown method or an impossible sparsity or pattern, before any work.
    """
    ranking = {"scope": scope or "global"} if name == "magnitude" else {"scope": scope} if scope else {}

    def made(sparsity: float) -> Method:
        return method(name, sparsity=sparsity, **ranking)

    trials = [made(sparsity) for sparsity in grid]
    of_patterns = [method(name, pattern=pattern) for pattern in patterns]
    if not all(isinstance(one, SparseMethod) for one in trials):
        raise BillhookError(f"Method {name} sets no sparsity, so there is no curve to draw.")
    target = Target(job.out)
    if not force:
        target.refuse_foreign(MARKER)
    options = Options.of(job)
    model, tokenizer = load(job.model, dtype=parse_dtype(job.dtype), stream=True)
    refuse_source(model, target)
    family = anatomy_of(model)
    batches, windows, calibration = prepare_data(job, model, tokenizer, family, trials)
    if windows is None:
        raise BillhookError("A sparsity curve needs perplexities: use a language model and leave --no-eval out.")
    for one in (*trials, *of_patterns):
        one.check(Walk(model, batches, needs="forward"))
    if any(one.requires == "nothing" for one in trials):
        seeds = 1
    vocabulary = int(getattr(model.config, "vocab_size", 0)) or 2
    described = {
        "job": job.model_dump(mode="json"),
        "curve": [name, ranking, eps, list(grid), rho, list(patterns), seeds],
    }
    fingerprint = fingerprint_of(model, calibration, described)
    if opened(target, fingerprint, force, marker=MARKER):
        return CurveReport.model_validate_json((job.out / MARKER).read_text(encoding="utf-8")), True

    with staged(target):
        staging = target.staging
        kept = staging / "points.json"
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        values: dict[str, float] = known.get("values", {})
        shares: dict[str, dict[str, float]] = known.get("shares", {})

        def measure(label: str, one: Method | None, seed: int) -> float:
            """−NLL per token of the model pruned by `one`."""
            if distributed.agree(int(label in values)):
                return values[label]
            torch.manual_seed(job.seed + seed)
            pruned, _ = load(job.model, dtype=parse_dtype(job.dtype), stream=True)
            if one is not None:
                drawn = batches
                if seed and batches:
                    other = job.model_copy(update={"seed": job.seed + seed, "eval": False})
                    drawn, _, _ = prepare_data(other, pruned, tokenizer, family, trials)
                steps, _ = run_steps(pruned, [one], drawn, staging / label, options)
                shares[label] = {site.site: site.sparsity for site in steps[0].sites}
            after = evaluate(
                pruned,
                windows,
                job.eval_data or job.data,
                device=options.device,
                max_memory=options.max_memory,
                label=label,
            )
            values[label] = -math.log(after.perplexity) if after.perplexity > 0 else -math.inf
            if distributed.is_main():
                write_atomically(kept, [json.dumps({"values": values, "shares": shares}).encode()])
                shutil.rmtree(staging / label, ignore_errors=True)
            distributed.barrier()
            return values[label]

        def quality(sparsity: float, seed: int) -> float:
            one = made(sparsity) if sparsity > 0 else None
            return measure(f"sparsity-{sparsity:.9g}-seed-{seed if one else 0}", one, seed if one else 0)

        curve = essential_sparsity(
            quality, eps=eps, eps_mode="relative", grid=grid, rho=rho, chance=-math.log(vocabulary), seeds=seeds
        )
        points = []
        for pattern, one in zip(patterns, of_patterns, strict=True):
            label = f"pattern-{pattern.replace(':', 'of')}"
            drawn = [measure(f"{label}-seed-{seed}", one, seed) for seed in range(seeds)]
            assert isinstance(one, SparseMethod)
            points.append(PatternPoint.of(one.overall, drawn, pattern=pattern))
        report = CurveReport(
            model=job.model,
            method=name,
            metric="−NLL per token",
            protocol=(
                f"{windows.shape[0]} windows of {windows.shape[1]} tokens of {job.eval_data or job.data}; one-shot, no "
                f"training; {seeds} draw(s) of calibration data per point."
            ),
            dense=curve.dense,
            curve=curve,
            nm_points=points,
            matrices=[
                MatrixSparsities(sparsity=float(label.split("-")[1]), matrices=of)
                for label, of in sorted(shares.items())
                if label.startswith("sparsity-") and label.endswith("seed-0")
            ],
            machine=machine(),
            versions=versions(),
        )
        if distributed.is_main():
            result = staging / "result"
            shutil.rmtree(result, ignore_errors=True)
            pages.write(report, result)
            write_atomically(result / "run.json", [json.dumps({"fingerprint": fingerprint}).encode()])
            target.publish(result)
        distributed.barrier()
    return report, False
