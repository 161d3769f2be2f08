"""The command line: parse, call, print."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from billhook.declared import split_outside
from billhook.errors import BillhookError, nearest
from billhook.methods import methods
from billhook.recipe import Job

app = typer.Typer(
    name="billhook",
    help="Make trained neural networks smaller and faster; what comes out is a plain model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]  # Typer does not name it
_INTERRUPTED = 130
_out = Console()
_err = Console(stderr=True)


# -- options that commands share --------------------------------------------------------------------------

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local Hugging Face folder, GGUF file, or 'demo'.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite --out, discard an unfinished run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, logs on stderr.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no messages.")]
DataOption = Annotated[
    str, typer.Option("--data", help="Text: demo, wikitext2, c4 or text:PATH (txt, jsonl, parquet, .gz).")
]
SamplesOption = Annotated[int, typer.Option("--samples", help="Calibration sequences (papers: 128).")]
LengthOption = Annotated[int, typer.Option("--length", help="Tokens per calibration sequence (papers: 2048).")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the calibration sample and all else random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Weights: auto (the model's), float32, bfloat16, float16.")]
PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Matrix products of calibration passes: auto, highest, bf16.")
]
MemoryOption = Annotated[
    str | None, typer.Option("--max-memory", help="Resident memory to stay under, for example 2GB.")
]
StorageOption = Annotated[str, typer.Option("--storage", help="dense, or compressed (bitmask + values).")]
EvalOption = Annotated[bool, typer.Option("--eval/--no-eval", help="Measure perplexity before and after.")]
EvalDataOption = Annotated[
    str | None, typer.Option("--eval-data", help="Text for perplexity; default: the held-out part of --data.")
]
EvalLengthOption = Annotated[
    int | None, typer.Option("--eval-length", help="Tokens per evaluation window; default 1024.")
]
EvalWindowsOption = Annotated[int, typer.Option("--eval-windows", help="At most so many evaluation windows; 0: all.")]


def _known_device(text: str) -> str:
    if text != "auto":
        from billhook.system import parse_device

        parse_device(text)
    return text


def _known_dtype(text: str) -> str:
    if text != "auto":
        from billhook.system import parse_dtype

        parse_dtype(text)
    return text


# Scripts pass the same options to every command; where one has no effect it is accepted and not shown.
SeedIgnored = Annotated[int, typer.Option("--seed", hidden=True)]
DeviceIgnored = Annotated[str, typer.Option("--device", hidden=True, callback=_known_device)]
DtypeIgnored = Annotated[str, typer.Option("--dtype", hidden=True, callback=_known_dtype)]

_DATA: str = Job.model_fields["data"].default
_SAMPLES: int = Job.model_fields["samples"].default
_LENGTH: int = Job.model_fields["length"].default


# -- method options, derived from the methods' own declarations -------------------------------------------


def _method_parameters() -> list[inspect.Parameter]:
    """One option per hyperparameter name over all methods."""
    declared: dict[str, dict[str, FieldInfo]] = {}  # option -> method -> field
    for name, cls in methods().items():
        for option, field in cls.model_fields.items():
            declared.setdefault(option, {})[name] = field
    parameters = []
    for option, fields in declared.items():
        every = len(fields) == len(methods())
        kind = _plain_type(next(iter(fields.values())).annotation)
        flag = f"--{option.replace('_', '-')}" + (f"/--no-{option.replace('_', '-')}" if kind is bool else "")
        meanings: dict[str, list[str]] = {}
        for name, field in fields.items():
            meanings.setdefault(field.description or "", []).append(name)
        one = every and len(meanings) == 1
        text = " ".join(
            escape(meaning if one else f"{meaning} [{', '.join(owners)}]")
            for meaning, owners in sorted(meanings.items(), key=lambda item: -len(item[1]))
        )
        annotation = Annotated[kind | None, typer.Option(flag, help=text, rich_help_panel="Method options")]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return parameters


def _plain_type(annotation: Any) -> type[Any]:
    """The type that an option's text is parsed to; the method checks the rest."""
    for kind in (bool, int, float):
        if annotation is kind or kind in typing.get_args(annotation):
            return kind
    return str


def _with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes **options the options of all methods."""
    signature = inspect.signature(command, eval_str=True)
    fixed = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fixed = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in fixed]

    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    wrapper.__name__ = command.__name__
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = signature.replace(parameters=[*fixed, *_method_parameters()])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in wrapper.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return wrapper


# -- commands ---------------------------------------------------------------------------------------------


@app.command()
@_with_method_options
def prune(
    model: ModelArgument,
    method: Annotated[str, typer.Option("--method", "-m", help="See 'billhook methods'.")],
    out: OutOption,
    data: DataOption = _DATA,
    samples: SamplesOption = _SAMPLES,
    length: LengthOption = _LENGTH,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    precision: PrecisionOption = "auto",
    max_memory: MemoryOption = None,
    storage: StorageOption = "dense",
    recover: Annotated[
        str, typer.Option("--recover", help="Repair afterwards, for example perp or 'perp(rank=8, lr=3e-3)'.")
    ] = "",
    evaluate: EvalOption = True,
    eval_data: EvalDataOption = None,
    eval_length: EvalLengthOption = None,
    eval_windows: EvalWindowsOption = 40,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    **options: Any,
) -> None:
    """Prune a model and write a plain Hugging Face folder with a report.

    Killed? Run the same command again: it goes on after the last finished block.

    Examples:

      billhook prune demo --method sparsegpt --sparsity 0.5 --out out/demo

      billhook prune HuggingFaceTB/SmolLM2-135M --method wanda --pattern 2:4 --out out/w24

      billhook prune ./my-llama --method sparsegpt --sparsity 0.6 --data text:corpus.jsonl --samples 128 --out out/x

      billhook prune demo --method icbs --density 0.5 --budget 10m --out out/i

      billhook prune demo --method wanda --sparsity 0.6 --allocation ecoflap --refine dsnot --recover perp --out out/w
    """
    _start(quiet, as_json, device)
    steps = [{"method": method, **{key: value for key, value in options.items() if value is not None}}]
    if recover:
        from billhook.methods.base import METHODS, SparseMethod
        from billhook.methods.structured import StructuredMethod

        repair = METHODS.parse(recover)
        if isinstance(repair, SparseMethod | StructuredMethod):
            raise BillhookError(
                f"Method {repair.name} removes weights and repairs nothing: give it as --method, or as a step of a "
                "recipe; perp is one that repairs."
            )
        steps.append({"method": repair.name, **repair.options()})
    _run(
        {
            "model": model,
            "out": out,
            "steps": steps,
            "data": data,
            "samples": samples,
            "length": length,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "precision": precision,
            "max_memory": max_memory,
            "storage": storage,
            "eval": evaluate,
            "eval_data": eval_data,
            "eval_length": eval_length,
            "eval_windows": eval_windows or None,
        },
        force,
        as_json,
        quiet,
    )


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Instead of the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the recipe's.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Instead of the recipe's.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Instead of the recipe's.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a recipe: several steps, each a method with its options.

    Example recipe:

      model: demo
      out: out/two-steps
      steps:
        - method: wanda
          sparsity: 0.3
        - method: sparsegpt
          sparsity: 0.6

    Example: billhook run recipe.yaml
    """
    from billhook.recipe import read_recipe

    _hush(quiet)
    job = read_recipe(recipe, out=out, seed=seed, device=device, dtype=dtype)
    _start(quiet, as_json, job.device)
    _run(job, force, as_json, quiet)


@app.command(name="eval")
def eval_(
    model: ModelArgument,
    data: DataOption = _DATA,
    length: Annotated[int | None, typer.Option("--length", help="Tokens per window; default 1024.")] = None,
    windows: Annotated[
        int, typer.Option("--windows", help="At most so many windows, from the start of the text; 0: all.")
    ] = 40,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    max_memory: MemoryOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity: non-overlapping windows of held-out text, mean token loss, exponentiated.

    The papers' protocol is --data wikitext2 --length 2048 --windows 0.

    Examples:

      billhook eval out/demo

      billhook eval demo --data wikitext2 --length 2048 --windows 0 --json
    """
    _start(quiet, as_json, device)
    from billhook.run import evaluate_model

    result = evaluate_model(
        model, data, length=length, windows=windows or None, device=device, dtype=dtype, max_memory=max_memory
    )
    if as_json:
        _print_json({"model": model, **json.loads(result.model_dump_json())})
    elif not quiet:
        _out.print(
            f"[bold]perplexity {result.perplexity:.4f}[/]  "
            + escape(
                f"{model}, {result.data}: {result.windows} windows of {result.length} tokens, {result.dtype}, "
                f"{result.seconds:.0f} s"
            ),
            soft_wrap=True,
        )
    else:
        _out.print(f"{result.perplexity:.6f}")


@app.command()
def compare(
    model: ModelArgument,
    method_names: Annotated[str, typer.Option("--methods", help="Names, comma-separated.")],
    out: OutOption,
    sparsity: Annotated[str, typer.Option("--sparsity", help="Sparsities, comma-separated.")] = "",
    pattern: Annotated[str, typer.Option("--pattern", help="N:M patterns, comma-separated.")] = "",
    target_size: Annotated[
        str, typer.Option("--target-size", help="Fractions of the parameters that stay, comma-separated.")
    ] = "",
    target_flops: Annotated[
        str, typer.Option("--target-flops", help="Fractions of a forward pass's FLOPs that stay, comma-separated.")
    ] = "",
    data: DataOption = _DATA,
    samples: SamplesOption = _SAMPLES,
    length: LengthOption = _LENGTH,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    precision: PrecisionOption = "auto",
    max_memory: MemoryOption = None,
    eval_data: EvalDataOption = None,
    eval_length: EvalLengthOption = None,
    eval_windows: EvalWindowsOption = 40,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare methods on one model, data and protocol: one table, one plot, CSV and HTML.

    Killed? Run the same command again: finished cells are kept.

    Examples:

      billhook compare demo --methods magnitude,wanda,sparsegpt --sparsity 0.5,0.6 --pattern 2:4 --out out/table

      billhook compare demo --methods fasp,slicegpt,shortgpt --target-size 0.9,0.8 --out out/sizes
    """
    _start(quiet, as_json, device)
    from billhook.compare import compare as run_comparison
    from billhook.recipe import job
    from billhook.report.table import FLOPS, SIZE, to_markdown

    names = _list(method_names)
    targets = _list(sparsity) + _list(pattern)
    for key, fractions in ((SIZE, target_size), (FLOPS, target_flops)):
        targets += [f"{key}{_fraction(fraction)}" for fraction in _list(fractions)]
    if not names or not targets:
        raise BillhookError(
            "Nothing to compare: give --methods and --sparsity, --pattern, --target-size or --target-flops, "
            "comma-separated."
        )
    settings = job(
        model=model,
        out=out,
        steps=[{"method": name} for name in names],
        data=data,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        dtype=dtype,
        precision=precision,
        max_memory=max_memory,
        eval_data=eval_data,
        eval_length=eval_length,
        eval_windows=eval_windows or None,
    )
    result, already = run_comparison(settings, names, targets, force=force)
    if not _is_main():
        return
    if as_json:
        _print_json({"out": str(out), **json.loads(result.model_dump_json())})
    elif not quiet:
        _out.print(to_markdown(result), markup=False, soft_wrap=True)
        _say(("Already there: " if already else "Written: ") + str(out / "index.html"))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML: images, photos or text, network, ..., out.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write, instead of the recipe's.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="As in the recipe: granet(sparsity=0.9).")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the recipe's.")] = None,
    force: ForceOption = False,
    device: DeviceIgnored = "auto",
    dtype: DtypeIgnored = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on images, photographs or text while pruning it: for trying methods of sparse training.

    Killed? Run the same command again: it goes on from its last minute.

    Examples:

      billhook train recipe.yaml

      billhook train recipe.yaml --method "rigl(sparsity=0.95)" --out out/rigl
    """
    _start(quiet, as_json, device)
    from billhook.recipe import parse_as, text_of
    from billhook.train import TrainJob, execute_training

    job = parse_as(TrainJob, text_of(recipe), str(recipe), out=out, method=method, seed=seed)
    record, already = execute_training(job, force=force)
    if as_json:
        _print_json({"out": str(job.out), **record})
    elif not quiet:
        summary = record["summary"]
        _say(f"{summary[0].upper()}{summary[1:]} at sparsity {record['total_sparsity']:.2%}.")
        _say(("Already there: " if already else "Written: ") + str(job.out))


@app.command(name="sparsity-curve")
def sparsity_curve_(
    model: ModelArgument,
    out: OutOption,
    method: Annotated[str, typer.Option("--method", "-m", help="What prunes; see 'billhook methods'.")] = "magnitude",
    eps: Annotated[float, typer.Option("--eps", help="Allowed rise of the token loss, in percent.")] = 1.0,
    grid: Annotated[str, typer.Option("--grid", help="Sparsities to begin with, comma-separated.")] = "",
    rho: Annotated[float, typer.Option("--rho", help="Resolution of the result.")] = 0.01,
    pattern: Annotated[str, typer.Option("--pattern", help="N:M patterns beside the curve, comma-separated.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", help="Calibration draws per point.")] = 1,
    scope: Annotated[str | None, typer.Option("--scope", help="Ranking: row, layer, global (magnitude).")] = None,
    data: DataOption = _DATA,
    samples: SamplesOption = _SAMPLES,
    length: LengthOption = _LENGTH,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    precision: PrecisionOption = "auto",
    max_memory: MemoryOption = None,
    eval_data: EvalDataOption = None,
    eval_length: EvalLengthOption = None,
    eval_windows: Annotated[int, typer.Option("--eval-windows", help="Evaluation windows per point; 0: all.")] = 8,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find how much of a model goes for free: one-shot quality over sparsity, and its knee (essential sparsity).

    Killed? Run the same command again: measured points are kept.

    Examples:

      billhook sparsity-curve demo --out out/curve

      billhook sparsity-curve demo --method wanda --seeds 3 --pattern 2:4,4:8 --out out/curve-wanda
    """
    _start(quiet, as_json, device)
    from billhook.analysis.curve import GRID
    from billhook.curve import sparsity_curve
    from billhook.recipe import job

    try:
        levels = [float(level) for level in _list(grid)] or list(GRID)
    except ValueError:
        raise BillhookError(f"--grid {grid!r} is not a list of sparsities such as 0.1,0.2,0.3.") from None
    settings = job(
        model=model,
        out=out,
        steps=[{"method": method}],
        data=data,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        dtype=dtype,
        precision=precision,
        max_memory=max_memory,
        eval_data=eval_data,
        eval_length=eval_length,
        eval_windows=eval_windows or None,
    )
    report, already = sparsity_curve(
        settings,
        method,
        eps=eps,
        grid=levels,
        rho=rho,
        patterns=_list(pattern),
        seeds=seeds,
        scope=scope,  # type: ignore[arg-type]  # the method checks it
        force=force,
    )
    if not _is_main():
        return
    if as_json:
        _print_json({"out": str(out), **json.loads(report.model_dump_json())})
    elif not quiet:
        found = report.curve
        _out.print(
            f"[bold]essential sparsity {found.s_eps:.3f}[/]  (loss within {eps:g}% of the dense model's; "
            f"the curve is {found.flag}" + (f", knee at {found.tau_hinge:.3f})" if found.tau_hinge else ")"),
            soft_wrap=True,
        )
        for warning in (*found.warnings, *report.warnings):
            _say(warning)
        _say(("Already there: " if already else "Written: ") + str(out / "index.html"))


@app.command(name="methods")
def list_methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one method's card.")] = None,
    seed: SeedIgnored = 0,
    device: DeviceIgnored = "auto",
    dtype: DtypeIgnored = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List all methods and their parts, or show one's card: paper, hyperparameters, needs, when to use it.

    Example: billhook methods wanda
    """
    from billhook.methods.card import KINDS, card, declared, describe

    known = declared()
    if name is not None and name not in known:
        raise BillhookError(f"No method {name!r}{nearest(name, known)}: there are {', '.join(known)}.")
    if as_json:
        if name:
            _print_json(describe(known[name]))
        else:
            of_kind = {k: [describe(cls) for cls in known.values() if cls.kind == k] for k in KINDS}
            _print_json({f"{kind}s": cards for kind, cards in of_kind.items()})
    elif name:
        from rich.markdown import Markdown

        _out.print(Markdown(card(known[name])))
    else:
        for kind, does in KINDS.items():
            table = Table(kind, f"{does}:", "needs", box=None, padding=(0, 2, 1, 0))
            for key, cls in known.items():
                if cls.kind == kind:
                    table.add_row(f"[bold]{key}[/]", cls.summary, getattr(cls, "needs", "calibration"))
            _out.print(table)


@app.command(name="inspect")
def inspect_(
    model: ModelArgument,
    seed: SeedIgnored = 0,
    device: DeviceIgnored = "auto",
    dtype: DtypeIgnored = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a model is made of: blocks, sites, groups, parameters, and what billhook can do with it.

    Example: billhook inspect demo
    """
    from billhook.describe import describe_model

    _hush(quiet)
    facts = describe_model(model)
    if as_json:
        _print_json(facts)
        return
    _out.print(f"[bold]{escape(facts['model'])}[/]: {facts['architecture']}, family {facts['family']}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key in ("blocks", "parameters", "prunable", "dtype", "bytes", "groups"):
        value = facts[key]
        text = ", ".join(f"{k} {_extent(v)}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, f"{text:,}" if isinstance(text, int) else str(text))
    _out.print(table)
    sites = Table("site (per block)", "out × in", "2:4", "4:8", box=None, padding=(0, 2, 0, 0))
    for site in facts["sites"]:
        marks = ["yes" if p in site["patterns"] else "no" for p in ("2:4", "4:8")]
        sites.add_row(site["projection"], " × ".join(map(_extent, site["shape"])), *marks)
    _out.print(sites)
    _out.print(f"methods: {', '.join(facts['methods'])}")


def _extent(value: int | list[int]) -> str:
    """A number that all blocks share, or from where to where it goes."""
    return str(value) if isinstance(value, int) else f"{value[0]} to {value[1]}"


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models to time; speed-ups are over the first.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for CSV, HTML and plot.")] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt (prefill).")] = 512,
    decode: Annotated[int, typer.Option("--decode", help="Tokens generated after it.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Rounds; the models take turns in each.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; default: torch's choice.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    seed: SeedOption = 0,
    device: DeviceIgnored = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how fast, how large and how hungry models are on this machine, taking turns.

    Examples:

      billhook bench demo out/f out/s

      billhook bench demo out/f --dtype bfloat16 --threads 2 --out out/speed
    """
    _start(quiet, as_json, device)
    from billhook.bench import bench as run_bench
    from billhook.report.bench import notes, to_rich

    result = run_bench(
        models,
        out=out,
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        dtype=dtype,
        threads=threads,
        seed=seed,
        force=force,
    )
    if as_json:
        _print_json(json.loads(result.model_dump_json()))
    elif not quiet:
        _out.print(to_rich(result))
        for note in notes(result):
            _say(note)
        if out is not None:
            _say(f"Written: {out / 'index.html'}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder.")],
    format_: Annotated[
        Literal["hf", "gguf", "onnx"],
        typer.Option("--format", help="hf: plain dense safetensors; gguf: for llama.cpp; onnx: for ONNX Runtime."),
    ] = "hf",
    quantize: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option("--quantize", help="Number format of a GGUF file.")
    ] = "f16",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="What to write; default DIR-hf, DIR-f16.gguf or DIR-onnx.")
    ] = None,
    onnx_cache: Annotated[
        bool, typer.Option("--onnx-cache", help="Give the ONNX graph a key/value cache, for generation.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the product in its runtime and compare before success.")
    ] = True,
    force: ForceOption = False,
    seed: SeedIgnored = 0,
    device: DeviceIgnored = "auto",
    dtype: DtypeIgnored = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn a model folder into what another runtime loads, and try it there before saying success.

    Examples:

      billhook export out/w24 --format hf                  # from compressed storage back to plain weights

      billhook export out/f --format gguf                  # runs in llama.cpp

      billhook export out/f --format gguf --quantize q8_0

      billhook export out/s --format onnx                  # runs in ONNX Runtime
    """
    _hush(quiet)
    place = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    told: dict[str, Any] = {"format": format_}
    if format_ == "gguf":
        from billhook.export.gguf import export_gguf

        target = out or place.with_name(f"{place.name}-{quantize}.gguf")
        written = export_gguf(folder, target, kind=quantize, force=force, verify=verify)
        told |= {"architecture": written.architecture, "bytes": written.nbytes, "notes": written.notes}
        if written.check is not None:
            told["check"] = dataclasses.asdict(written.check)
            agreed = written.check.agreement
            if not as_json and not quiet and agreed is not None:
                _say(f"llama.cpp ({written.architecture}) agrees on {agreed:.0%} of {written.check.tokens} tokens.")
        for note in [] if as_json or quiet else written.notes:
            _say(note)
    elif format_ == "onnx":
        from billhook.export.onnx import export_onnx

        target = out or place.with_name(place.name + "-onnx")
        product = export_onnx(folder, target, cache=onnx_cache, force=force)
        told |= {"bytes": product.nbytes, "difference": product.difference, "inputs": product.inputs}
    else:
        from billhook.run import export_plain

        target = out or place.with_name(place.name + "-hf")
        export_plain(folder, target, force=force)
    if as_json:
        _print_json({"out": str(target), **told})
    elif not quiet:
        _say(f"Written: {target}")


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BillhookError(f"{text!r} is not a fraction such as 0.8.") from None


# -- helpers ----------------------------------------------------------------------------------------------


def _run(values: dict[str, Any] | Job, force: bool, as_json: bool, quiet: bool) -> None:
    from billhook.recipe import job
    from billhook.report.text import summary
    from billhook.run import execute

    settings = values if isinstance(values, Job) else job(**values)
    report, already = execute(settings, force=force)
    if not _is_main():
        return
    if as_json:
        _print_json({"out": str(settings.out), **json.loads(report.model_dump_json())})
    elif not quiet:
        _out.print(summary(report))
        for note in (note for step in report.steps for note in step.notes):
            _say(note)
        _say(("Already there: " if already else "Written: ") + str(settings.out))
        _say(f"Report:  {settings.out / 'report.html'}")


def _start(quiet: bool, as_json: bool, device: str) -> None:
    """Logging, progress and processes, before any work."""
    from billhook import progress
    from billhook.calibrate import distributed
    from billhook.system import parse_device

    distributed.start(parse_device(device))
    visible = not quiet and _is_main()
    progress.enable(visible and (sys.stderr.isatty() or not as_json))
    _hush(not visible)


def _hush(quiet: bool) -> None:
    """Logging to stderr. Warnings of Transformers are about code, not about what the user of a command can change."""
    import transformers

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("billhook").setLevel(logging.ERROR if quiet else logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _list(text: str) -> list[str]:
    return split_outside(text, ",")


def _say(text: str) -> None:
    """A line as it is: paths are neither wrapped nor read as markup."""
    _out.print(text, markup=False, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def main() -> None:
    """Entry point of the console script: a user's mistake is one sentence and exit code 2."""
    from billhook.calibrate import distributed

    try:
        code = app(standalone_mode=False)
    except BillhookError as error:
        code = _fail(str(error))
    except _UsageError as error:
        code = _misuse(error)
    except typer.Abort:
        code = 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except OSError as error:  # a file that is gone or closed to us, a full disk outside of a run
        where = f"{error.filename}: " if error.filename else ""
        reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
        code = _fail(f"{where}{reason}.")
    finally:
        distributed.stop()
    if code == _INTERRUPTED:
        _err.print("Interrupted: run the same command again to go on.", highlight=False)
    try:
        sys.stdout.flush()
    except OSError:  # whoever read the output has left: nothing more goes to them, at the interpreter's exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.exit(code)


def _fail(message: str) -> int:
    _err.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    return 2


def _misuse(error: typer.BadParameter) -> int:
    """A command line that cannot be parsed, in the form of every other mistake; without arguments, the help."""
    words = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(words)
        return 2
    option = getattr(error, "option_name", None)
    command = error.ctx.command if error.ctx else None
    if option and command and words.startswith("No such option"):
        known = [name for parameter in command.params for name in parameter.opts]
        words = f"No option {option!r}{nearest(option, known)}"
    words = " ".join(words.split())
    if error.ctx and not words.endswith("?"):
        words = f"{words.rstrip('.')}; see '{error.ctx.command_path} --help'."
    return _fail(words)
