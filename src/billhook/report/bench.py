"""The record, the tables and the plot of models that were measured side by side."""

from __future__ import annotations

import csv
import io
import math
import re
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.table import Table
from rich.text import Text

from billhook.report.card import markdown_table, plain
from billhook.report.html import SERIES_LIGHT, document, facts, group, machine_groups, table
from billhook.report.html import _round_up as round_up
from billhook.report.table import _CIRCLE, _SVG_STYLE, _line, _text
from billhook.report.text import MISSING, bytes_text, count_text, percent_text


class Timing(BaseModel):
    """Wall time of one thing done several times."""

    seconds: float  # median
    low: float
    high: float
    per_second: float  # tokens, at the median
    runs: list[float]

    @staticmethod
    def of(runs: list[float], tokens: int) -> Timing:
        """The times of several runs of `tokens` tokens each."""
        middle = median(runs)
        return Timing(seconds=middle, low=min(runs), high=max(runs), per_second=tokens / middle, runs=runs)


class Culprit(BaseModel):
    """The operation whose time is furthest above what the FLOPs promise; times are of one prefill in the profiler."""

    op: str
    seconds: float
    first_seconds: float  # of the same operation in the first model
    excess: float  # seconds more than first_seconds / the speed-up by FLOPs
    total_excess: float  # the same of all operations together
    calls: int
    shapes: str  # of its inputs in the calls that took most of the time


class Measured(BaseModel):
    """One model. What its runtime does not tell is None."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    model: str
    runtime: str
    prefill: Timing
    decode: Timing
    bytes: int  # of the weight files on disk
    dtype: str | None = None  # of the weights in memory
    memory: int | None = None  # bytes, resident peak while loading and in one prefill, above what was there before
    resident: int | None = None  # bytes of it that stay, with the cache of the prompt
    parameters: int | None = None
    nonzero: int | None = None
    flops: int | None = None  # of one prefill; counted from shapes, not measured
    prefill_speedup: float | None = None  # over the first model; median over the rounds
    decode_speedup: float | None = None
    flops_speedup: float | None = None  # FLOPs of the first model / this one's: counted
    share: float | None = None  # prefill_speedup / flops_speedup
    culprit: Culprit | None = None  # only where `share` is low


class Bench(BaseModel):
    """Models measured in one run, one sequence at a time; the first is what the others are compared with."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    models: list[Measured] = Field(default_factory=list)
    prompt: int
    decode: int
    repeats: int
    dtype: str
    threads: int
    seed: int = 0
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


# The words


def protocol(result: Bench) -> str:
    """How it was measured, in sentences."""
    turns = "The models took turns in every round. " if len(result.models) > 1 else ""
    threads = f" {count_text(result.threads, 'thread')}."
    own = " (GGUF files in their own)" if any(one.runtime != "PyTorch" for one in result.models) else ""
    return (
        f"One sequence: a prompt of {count_text(result.prompt, 'random token')}, then "
        f"{count_text(result.decode, 'token')} written greedily with the cache; weights in {result.dtype}{own}. "
        f"{turns}Medians of {count_text(result.repeats, 'round')} after one that warms up.{threads}"
    )


def notes(result: Bench) -> list[str]:
    """What takes the time in each model that is slower than its FLOPs promise."""
    found = []
    for one in result.models:
        if one.culprit is None or one.share is None:
            continue
        why = one.culprit
        first = result.models[0].model
        shapes = f", most of it for inputs {why.shapes}" if why.shapes else ""
        found.append(
            f"{one.model} reaches {percent_text(one.share, 0)} of the speed-up that its FLOPs promise. In PyTorch's "
            f"profiler {why.op} takes {_ms(why.seconds)} of a prefill in {count_text(why.calls, 'call')}{shapes}; it "
            f"takes {_ms(why.first_seconds)} in {first}, so the FLOPs promise {_ms(why.seconds - why.excess)}. All "
            f"operations together take {_ms(why.total_excess)} more than promised, this one {_ms(why.excess)}."
        )
    return found


def _head(result: Bench) -> list[str]:
    head = ["model", "prefill", "tokens/s", "decoding", "tokens/s", "memory", "on disk", "parameters", "nonzero"]
    head.append("FLOPs (counted)")
    if len(result.models) > 1:
        head += ["prefill speed-up", "decoding speed-up", "by FLOPs (counted)", "measured ÷ FLOPs"]
    return head


def _row(result: Bench, one: Measured) -> list[str]:
    row = [
        one.model if one.runtime == "PyTorch" else f"{one.model} ({one.runtime})",
        _spread(one.prefill),
        f"{one.prefill.per_second:,.1f}",
        _spread(one.decode),
        f"{one.decode.per_second:,.1f}",
        MISSING if one.memory is None else bytes_text(one.memory),
        bytes_text(one.bytes),
        MISSING if one.parameters is None else f"{one.parameters:,}",
        MISSING if one.nonzero is None else f"{one.nonzero:,}",
        MISSING if one.flops is None else _large(one.flops),
    ]
    if len(result.models) > 1:
        row += [_times(one.prefill_speedup), _times(one.decode_speedup), _times(one.flops_speedup)]
        row.append(MISSING if one.share is None else f"{one.share:.2f}")
    return row


def _spread(timing: Timing) -> str:
    if len(timing.runs) == 1:
        return _ms(timing.seconds)
    unit = 1e3 if timing.seconds < 1 else 1.0
    return f"{_ms(timing.seconds)} ({_digits(unit * timing.low)}–{_digits(unit * timing.high)})"


def _ms(seconds: float) -> str:
    return f"{_digits(1e3 * seconds)} ms" if abs(seconds) < 1 else f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Three digits, and all of a longer whole number."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _short(model: str) -> str:
    """The last part of a path or hub id."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model


def _large(count: int) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"×{ratio:.2f}"


# The formats


def to_csv(result: Bench) -> str:
    """One line per model with full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    plain_fields = [n for n in Measured.model_fields if n not in ("prefill", "decode", "culprit")]
    timing = ["seconds", "low", "high", "per_second"]
    writer.writerow(
        [*plain_fields, *(f"{kind}_{name}" for kind in ("prefill", "decode") for name in timing), "slow_op"]
    )
    for one in result.models:
        values = [getattr(one, name) for name in plain_fields]
        values += [getattr(kind, name) for kind in (one.prefill, one.decode) for name in timing]
        writer.writerow(["" if v is None else v for v in [*values, one.culprit.op if one.culprit else None]])
    return file.getvalue()


def to_markdown(result: Bench) -> str:
    """The measurements as a Markdown table, with what was done above it and what takes the time below it."""
    rows = [[plain(cell) for cell in _row(result, one)] for one in result.models]
    below = "".join(f"\n{plain(note)}\n" for note in notes(result))
    return f"{plain(protocol(result))}\n\n{markdown_table(_head(result), rows)}\n{below}"


def to_rich(result: Bench) -> Table:
    """The same for a terminal: a column for each model, which fits narrow windows."""
    grid = Table(box=box.SIMPLE_HEAD, caption=protocol(result), caption_justify="left")
    head, *_ = _head(result)
    grid.add_column(head)
    rows = [_row(result, one) for one in result.models]
    short = [_short(one.model) for one in result.models]
    for name, row in zip(short, rows, strict=True):
        title = name if short.count(name) == 1 else row[0]
        grid.add_column(Text(title), justify="right", overflow="fold")
    for index, name in enumerate(_head(result)[1:], 1):
        grid.add_row(name, *(row[index] for row in rows))
    return grid


def to_html(result: Bench) -> str:
    """The measurements as one self-contained HTML document: tables, plot, machine."""
    first = result.models[0].model
    title = f"{count_text(len(result.models), 'model')} measured side by side" if len(result.models) > 1 else first
    head, rows = _head(result), [_row(result, one) for one in result.models]
    parts = [
        "<header>",
        '<p class="mark"><b>billhook</b> bench</p>',
        f"<h1><span>{escape(title)}.</span> {_verdict(result)}</h1>",
        f'<p class="lead">{escape(protocol(result))}</p>',
        *(f'<p class="alert">{escape(note)}</p>' for note in notes(result)),
        "</header>",
        "<main>",
        _section("Speed", rows, head, [0, 1, 2, 3, 4], f"Median (lowest–highest). {_SPEED_WORDS}"),
    ]
    if len(result.models) > 1:
        plots = "\n".join(
            f'<div class="{name}">{plot_svg(result, width, page=True)}</div>'
            for name, width in (("broad", 760), ("narrow", 380))
        )
        parts += [
            _section(f"Speed-up over {first}", rows, head, [0, 10, 11, 12, 13], _SHARE_WORDS),
            "<figure>\n<figcaption><h3>Speed-up over size on disk</h3>"
            f"<p>Filled: prefill. Open: decoding. The dashed line is the speed of {escape(first)}.</p></figcaption>\n"
            f"{plots}\n</figure>",
        ]
    settings = [
        ("Prompt", count_text(result.prompt, "token")),
        ("Written", count_text(result.decode, "token")),
        ("Rounds", str(result.repeats)),
        ("Weights", result.dtype),
        ("Threads", str(result.threads)),
        ("Seed", str(result.seed)),
        *((f"{one.model} runs in", one.runtime) for one in result.models),
    ]
    parts += [
        _section("Size", rows, head, [0, 5, 6, 7, 8, 9], _SIZE_WORDS),
        f'<section>\n<h2>How it was measured</h2>\n<div class="pair">\n{group("Protocol", facts(settings))}\n'
        f"{machine_groups(result.machine, result.versions)}\n</div>\n</section>",
        "</main>",
    ]
    return document(f"billhook bench: {title}", "\n".join(parts), result.versions.get("billhook"))


_SPEED_WORDS = "Prefill reads the prompt and computes the next token; decoding writes one token after the other."
_SHARE_WORDS = (
    "Speed-ups are medians over the rounds of the first model's time divided by this model's time in the same round. "
    "FLOPs of a prefill are counted from the shapes of its matrix products and attention, not measured; zeros count "
    "like other weights. The last column is the prefill speed-up divided by the one that the FLOPs promise."
)
_SIZE_WORDS = (
    "Memory is the peak of resident memory, as the operating system tells it, while the model is loaded and reads the "
    "prompt once, less what its process held before. FLOPs are of one prefill, counted from shapes."
)


def _section(title: str, rows: list[list[str]], head: list[str], columns: list[int], note: str) -> str:
    content = table([head[i] for i in columns], [[row[i] for i in columns] for row in rows], "grid")
    return (
        f'<section>\n<h2>{escape(title)}</h2>\n<div class="wide">{content}</div>\n'
        f'<p class="note">{escape(note)}</p>\n</section>'
    )


def _verdict(result: Bench) -> str:
    others = [one for one in result.models if one.prefill_speedup is not None]
    if not others:
        return ""
    best = max(others, key=lambda one: one.prefill_speedup or 0.0)
    words = f"{best.model} has the fastest prefill, {_times(best.prefill_speedup)} of the speed of "
    if best.prefill_speedup is not None and best.prefill_speedup <= 1:
        words = f"None has a faster prefill than {result.models[0].model}."
    else:
        words += f"{result.models[0].model}; it decodes at {_times(best.decode_speedup)}."
    return f"<span>{escape(words)}</span>"


def write(result: Bench, folder: Path) -> None:
    """Write bench.csv, bench.md, bench.json, plot.svg and index.html into `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("bench.csv", to_csv(result)),
        ("bench.md", to_markdown(result)),
        ("bench.json", result.model_dump_json(indent=1) + "\n"),
        ("plot.svg", plot_svg(result)),
        ("index.html", to_html(result)),
    ):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


# The plot


def plot_svg(result: Bench, width: int = 760, page: bool = False) -> str:
    """Speed-up over the first model against bytes on disk, as SVG: filled marks for prefill, open ones for decoding.

    Args:
        result: what was measured.
        width: width, px.
        page: leave out the style and the background, which a page from `to_html` brings itself.
    """
    height = 360
    left, right, top, bottom = 56.0, width - 16.0, 18.0, height - 46.0
    points = [(one, one.prefill_speedup or 1.0, one.decode_speedup or 1.0) for one in result.models]
    largest = max((one.bytes for one in result.models), default=1) or 1
    highest = 1.12 * max((max(p, d) for _, p, d in points), default=1.0)

    def x(size: float) -> float:
        return left + (right - left - 24) * size / largest

    def y(speedup: float) -> float:
        return bottom - (bottom - top) * speedup / highest

    parts = []
    step = round_up(highest / 6)
    for i in range(math.floor(highest / step) + 1):
        parts.append(_line((left, right), y(i * step), "rule", "#dde2de"))
        parts.append(_text(left - 8, y(i * step) + 4, f"×{i * step:g}", "end"))
    step = round_up(largest / max(3, (right - left) / 110))
    for i in range(math.floor(largest / step + 1e-9) + 1):
        parts.append(_text(x(i * step), bottom + 20, bytes_text(i * step).replace(".0 ", " "), "middle"))
    parts.append(_text((left + right) / 2, bottom + 40, "size on disk", "middle"))
    parts.append(_line((left, right), y(1.0), "dense", "#56615b", ' stroke-dasharray="5 4"'))
    taken: list[tuple[float, float]] = []
    for index, (one, prefill, decode) in enumerate(points):
        colour = index % len(SERIES_LIGHT)
        at = x(one.bytes)
        for kind, value in (("decoding", decode), ("prefill", prefill)):
            filled = f'class="c{colour} edge" fill="{SERIES_LIGHT[colour]}" stroke="#fdfdfb"'
            hollow = f'class="k{colour}" stroke="{SERIES_LIGHT[colour]}" fill="none" stroke-width="2"'
            words = f"{one.model}: {kind} ×{value:.3g}, {bytes_text(one.bytes)}"
            parts.append(
                f'<path transform="translate({at:.1f} {y(value):.1f})" {filled if kind == "prefill" else hollow} '
                f'd="{_CIRCLE}"><title>{escape(words)}</title></path>'
            )
        place = y(prefill) + 4
        while any(abs(at - other) < 140 and abs(place - height) < 15 for other, height in taken):
            place += 15
        taken.append((at, place))
        name = _short(one.model)
        name = name if len(name) <= 22 else f"{name[:21]}…"
        away, anchor = (10, "start") if at < (left + right) / 2 else (-10, "end")
        parts.append(_text(at + away, place, name, anchor, ink=True))
    size = 'width="100%"' if page else f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    if not page:
        parts = [_SVG_STYLE, '<rect class="paper" width="100%" height="100%" fill="#fdfdfb"/>', *parts]
    label = "Speed-up over the first model against size on disk; the numbers are in the tables"
    top_tag = f'<svg class="lines" role="img" aria-label="{label}" {size} viewBox="0 0 {width} {height}">'
    return "\n".join([top_tag, *parts, "</svg>\n"])
