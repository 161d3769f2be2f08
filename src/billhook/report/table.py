"""The tables and the plot of a comparison: every method at every target, judged by one protocol."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from billhook.record import Calibration, Evaluation
from billhook.report.card import markdown_table, plain
from billhook.report.html import SERIES_DARK, SERIES_LIGHT, document, facts, group, machine_groups, table
from billhook.report.text import (
    MISSING,
    bytes_text,
    calibration_text,
    count_text,
    data_text,
    listing,
    percent_text,
    perplexity_text,
    protocol_text,
    seconds_text,
)

# What a target that starts with the key is a fraction of, the option of methods that means, and the words for it
SIZE, FLOPS = "size=", "flops="
WHOLE = {SIZE: ("target_size", "size"), FLOPS: ("target_flops", "FLOPs")}


class Cell(BaseModel):
    """What one method reached at one target."""

    # A model that pruning broke has an infinite perplexity or NaN: JSON has no such numbers, so they are strings
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    method: str
    target: str  # sparsity as a fraction, "0.5", a pattern, "2:4" (N kept of M), "size=0.8" or "flops=0.8"
    sparsity: float  # reached, fraction of weights that are zero in the pruned matrices
    perplexity: float
    seconds: float  # wall time of pruning, without evaluation
    peak_memory: int  # bytes


class Comparison(BaseModel):
    """Several methods on one model, with the same calibration data and the same evaluation.

    Two cells of the same method and target are one cell measured again: the last one counts.
    """

    model_config = ConfigDict(extra="ignore")

    model: str
    dense: Evaluation  # of the model before pruning; the cells were measured by the same protocol
    calibration: Calibration | None = None
    cells: list[Cell] = Field(default_factory=list)
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


# The parts of a table


def methods(comparison: Comparison) -> list[str]:
    """The methods in order of appearance: the rows."""
    return list(dict.fromkeys(cell.method for cell in comparison.cells))


def targets(comparison: Comparison) -> list[str]:
    """The targets, fractions in ascending order before patterns before sizes and FLOPs: the columns."""

    def order(target: str) -> tuple[int, float, float]:
        key, part = whole(target)
        if key:
            return 2 + list(WHOLE).index(key), -part, 0.0
        fraction = _fraction(target)
        if fraction is not None:
            return 0, fraction, 0.0
        kept, _, of = target.partition(":")
        return (1, float(of), float(kept)) if kept.isdecimal() and of.isdecimal() else (2, 0.0, 0.0)

    return sorted(dict.fromkeys(cell.target for cell in comparison.cells), key=order)


def whole(target: str) -> tuple[str, float]:
    """("size=", 0.8) of "size=0.8"; ("", 0) of a target that is not about the whole model."""
    key = next((key for key in WHOLE if target.startswith(key)), "")
    return key, float(target.removeprefix(key)) if key else 0.0


def target_text(target: str) -> str:
    """A target as a column title: "0.5" is "50%", patterns stay."""
    key, part = whole(target)
    if key:
        return f"{100 * part:.6g}% of the {WHOLE[key][1]}"
    fraction = _fraction(target)
    return target if fraction is None else f"{100 * fraction:.6g}%"


def best(comparison: Comparison) -> set[tuple[str, str]]:
    """(method, target) of the lowest perplexity of every target; NaN and infinite ones never win."""
    cells = _cells(comparison)
    winners = set()
    for target in targets(comparison):
        column = {key: cell.perplexity for key, cell in cells.items() if key[1] == target}
        low = min((value for value in column.values() if math.isfinite(value)), default=None)
        winners |= {key for key, value in column.items() if value == low}
    return winners


def _cells(comparison: Comparison) -> dict[tuple[str, str], Cell]:
    return {(cell.method, cell.target): cell for cell in comparison.cells}


def _fraction(target: str) -> float | None:
    try:
        fraction = float(target)
    except ValueError:
        return None
    return fraction if math.isfinite(fraction) else None


def _rows(comparison: Comparison, write: Callable[[Cell], str]) -> list[list[str]]:
    cells = _cells(comparison)
    columns = targets(comparison)
    return [
        [
            method,
            *(write(cells[method, target]) if (method, target) in cells else MISSING for target in columns),
        ]
        for method in methods(comparison)
    ]


def _verdict(comparison: Comparison) -> str:
    """Which method is best where, in words; empty where nothing competes."""
    if len(methods(comparison)) < 2:
        return ""
    winners = best(comparison)
    places: dict[str, list[str]] = {}
    for target in targets(comparison):
        names = listing([method for method in methods(comparison) if (method, target) in winners])
        if names:
            places.setdefault(names, []).append(target_text(target))
    count = len(targets(comparison))
    texts = [f"{names} at {'every target' if len(at) == count > 1 else listing(at)}" for names, at in places.items()]
    return f"Lowest perplexity: {'; '.join(texts)}." if texts else ""


def _protocol(comparison: Comparison) -> str:
    text = protocol_text(comparison.dense)
    if comparison.calibration is not None:
        text += f" Calibration: {calibration_text(comparison.calibration)}."
    return text


# The formats


def to_csv(comparison: Comparison) -> str:
    """One line per cell with full precision, after one of the dense model; NaN and inf are written so."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Cell.model_fields)
    writer.writerow(["dense", "", "", comparison.dense.perplexity, "", ""])
    for cell in comparison.cells:
        writer.writerow(cell.model_dump().values())
    return file.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The perplexities as a Markdown table: rows are methods, columns targets, the best of a column bold."""
    winners = best(comparison)

    def write(cell: Cell) -> str:
        text = perplexity_text(cell.perplexity)
        return f"**{text}**" if (cell.method, cell.target) in winners else text

    head = ["method", *(plain(target_text(target)) for target in targets(comparison))]
    rows = [[plain(method), *rest] for method, *rest in _rows(comparison, write)]
    caption = (
        f"Perplexity of {comparison.model} after pruning; dense model: "
        f"{perplexity_text(comparison.dense.perplexity)}. The best of each column is bold. "
        f"{_protocol(comparison)}"
    )
    return f"{plain(caption)}\n\n{markdown_table(head, rows)}\n"


def to_json(comparison: Comparison) -> str:
    """The whole record as JSON; NaN and infinite numbers become the strings "NaN", "Infinity", "-Infinity".

    `Comparison.model_validate_json` reads it back.
    """
    return json.dumps(_strict(comparison.model_dump()), indent=1, ensure_ascii=False) + "\n"


def _strict(value: Any) -> Any:
    """`value` without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def to_html(comparison: Comparison) -> str:
    """The comparison as one self-contained HTML document: table, plot, times, memory, machine."""
    rows, columns = methods(comparison), targets(comparison)
    head = ["method", *(target_text(target) for target in columns)]
    perplexities = _rows(comparison, lambda cell: perplexity_text(cell.perplexity))
    bold = {(rows.index(method), columns.index(target) + 1) for method, target in best(comparison)}
    title = f"{count_text(len(rows), 'pruning method')} on {comparison.model}"

    def grid(name: str, write: Callable[[Cell], str], marked: set[tuple[int, int]]) -> str:
        content = table(head, _rows(comparison, write), "grid", marked)
        return f'<h3>{name}</h3>\n<div class="wide">{content}</div>'

    dense = f"Dense model: {perplexity_text(comparison.dense.perplexity)}. The best of each column is bold."
    plots = "\n".join(
        f'<div class="{name}">{plot_svg(comparison, width, page=True)}</div>'
        for name, width in (("broad", 760), ("narrow", 380))
    )
    data = [("Model", comparison.model), ("Evaluation", data_text(comparison.dense.data, "evaluation"))]
    if comparison.calibration is not None:
        data += [
            ("Calibration", calibration_text(comparison.calibration)),
            ("Fingerprint", comparison.calibration.fingerprint),
        ]
    lead = f'<p class="lead">{escape(_protocol(comparison))}</p>'
    verdict = f"<span>{escape(_verdict(comparison))}</span>" if _verdict(comparison) else ""
    body = f"""<header>
<p class="mark"><b>billhook</b> comparison</p>
<h1><span>{escape(title)}.</span> {verdict}</h1>
{lead}
</header>
<main>
<section>
<h2>Perplexity</h2>
<p class="note">{dense}</p>
<div class="wide">{table(head, perplexities, "grid", bold)}</div>
<figure>
<figcaption><h3>Perplexity over the sparsity reached</h3><p>{escape(_plot_words(comparison))}</p></figcaption>
{plots}
</figure>
</section>
<section>
<h2>Cost of pruning</h2>
{grid("Wall time", lambda cell: seconds_text(cell.seconds), set())}
{grid("Peak memory", lambda cell: bytes_text(cell.peak_memory), set())}
</section>
<section>
<h2>How it was measured</h2>
<div class="pair">
{group("Data", facts(data))}
{machine_groups(comparison.machine, comparison.versions)}
</div>
</section>
</main>"""
    return document(title, body, comparison.versions.get("billhook"))


def write(comparison: Comparison, folder: Path) -> None:
    """Write table.csv, table.md, table.json, plot.svg and index.html into `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("table.csv", to_csv(comparison)),
        ("table.md", to_markdown(comparison)),
        ("table.json", to_json(comparison)),
        ("plot.svg", plot_svg(comparison)),
        ("index.html", to_html(comparison)),
    ):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


# The plot

# Marks drawn around (0, 0), about equally heavy
_CIRCLE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z"
_DIAMOND = "M0-5.4L5.4 0L0 5.4L-5.4 0Z"
_CROSS = "M-4-4L4 4M-4 4L4-4"
_LABEL = 17  # least distance between two labels, px


@dataclass(frozen=True)
class _Frame:
    """Where things are, px: the panel of lines, the gap with their names, the panel of patterns."""

    left: float
    right: float
    patterns: dict[str, float]  # x of each pattern's column
    end: float  # of the last panel
    top: float
    bottom: float
    low: float  # perplexity at the bottom
    high: float  # perplexity at the top
    first: float  # sparsity at the left
    last: float  # sparsity at the right

    def x(self, sparsity: float) -> float:
        if self.last <= self.first:
            return (self.left + self.right) / 2
        return self.left + 22 + (self.right - self.left - 36) * (sparsity - self.first) / (self.last - self.first)

    def y(self, perplexity: float) -> float:
        """A perplexity that cannot be placed is at the upper edge."""
        if not _placeable(perplexity):
            return self.top
        share = math.log(perplexity / self.low) / math.log(self.high / self.low)
        return self.bottom - (self.bottom - self.top) * share


def plot_svg(comparison: Comparison, width: int = 760, page: bool = False) -> str:
    """Perplexity over the sparsity reached as SVG.

    Methods are lines over their unstructured targets; patterns (N:M) are columns of separate markers on the
    same axis; the dense model is a dashed line. A perplexity that is not finite is a cross at the upper edge.

    Args:
        comparison: what was measured.
        width: width, px.
        page: leave out the style and the background, which a page from `to_html` brings itself.
    """
    height = 400
    frame = _frame(comparison, width, height)
    parts = [*_axes(comparison, frame), *_curves(comparison, frame)]
    if not comparison.cells:
        parts.append(_text((frame.left + frame.right) / 2, height / 2, "nothing was measured", "middle"))
    label = f"Perplexity of {comparison.model} over sparsity, by method; the numbers are in the table"
    size = 'width="100%"' if page else f'width="{width}" height="{height}"'
    if not page:
        parts = [_SVG_STYLE, '<rect class="paper" width="100%" height="100%" fill="#fdfdfb"/>', *parts]
    content = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lines" role="img" aria-label="{escape(label)}" '
        f'{size} viewBox="0 0 {width} {height}">\n{content}\n</svg>\n'
    )


def _frame(comparison: Comparison, width: float, height: float) -> _Frame:
    patterns = [target for target in targets(comparison) if _fraction(target) is None]
    curve = [cell.sparsity for cell in comparison.cells if cell.target not in patterns]
    curve = [sparsity for sparsity in curve if math.isfinite(sparsity)]
    perplexities = [comparison.dense.perplexity, *(cell.perplexity for cell in comparison.cells)]
    values = [value for value in perplexities if _placeable(value)]
    column = min(max(46.0, 11.0 * len(methods(comparison))), 0.35 * width / max(len(patterns), 1))
    end = width - 8.0
    start = end - column * len(patterns)
    return _Frame(
        left=56.0,
        right=start - (118.0 if width > 500 else 96.0),
        patterns={target: start + column * (i + 0.5) for i, target in enumerate(patterns)},
        end=end,
        top=18.0,
        bottom=height - 46.0,
        low=min(values, default=1.0) / 1.08,
        high=max(values, default=10.0) * 1.08,
        first=min(curve, default=0.0),
        last=max(curve, default=1.0),
    )


def _axes(comparison: Comparison, frame: _Frame) -> list[str]:
    panels = [(frame.left, frame.right)]
    if frame.patterns:
        half = (frame.end - min(frame.patterns.values())) / (2 * len(frame.patterns) - 1)
        panels.append((min(frame.patterns.values()) - half, frame.end))
    parts = []
    for tick in _ticks(frame.low, frame.high):
        parts += [_line(panel, frame.y(tick), "rule", "#dde2de") for panel in panels]
        parts.append(_text(frame.left - 8, frame.y(tick) + 4, _short(tick), "end"))
    if _placeable(comparison.dense.perplexity):
        y = frame.y(comparison.dense.perplexity)
        parts += [_line(panel, y, "dense", "#56615b", ' stroke-dasharray="5 4"') for panel in panels]
    at = -math.inf
    curve = {cell.sparsity for cell in comparison.cells if cell.target not in frame.patterns}
    for sparsity in sorted(value for value in curve if math.isfinite(value)):
        if frame.x(sparsity) - at > 32:
            at = frame.x(sparsity)
            parts.append(_text(at, frame.bottom + 20, percent_text(sparsity).replace(".0%", "%"), "middle"))
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 40, "sparsity", "middle"))
    for target, x in frame.patterns.items():
        parts.append(_text(x, frame.bottom + 20, target, "middle"))
    return parts


def _curves(comparison: Comparison, frame: _Frame) -> list[str]:
    names = methods(comparison)
    apart = min(9.0, 36.0 / max(len(names), 1))  # markers of one pattern stand side by side
    parts: list[str] = []
    labels: list[tuple[float, int | None, str]] = []
    for index, method in enumerate(names):
        cells = [cell for cell in _cells(comparison).values() if cell.method == method]
        curve = [cell for cell in cells if cell.target not in frame.patterns and math.isfinite(cell.sparsity)]
        curve.sort(key=lambda cell: cell.sparsity)
        colour = index % len(SERIES_LIGHT)
        look = f'class="k{colour}" stroke="{SERIES_LIGHT[colour]}" stroke-width="2" fill="none"'
        if index >= len(SERIES_LIGHT):
            look += ' stroke-dasharray="7 3"'
        for one, two in pairwise(curve):
            if _placeable(one.perplexity) and _placeable(two.perplexity):
                ends = [f"{frame.x(cell.sparsity):.1f} {frame.y(cell.perplexity):.1f}" for cell in (one, two)]
                parts.append(f'<path {look} d="M{ends[0]}L{ends[1]}"/>')
        parts += [_marker(cell, colour, _CIRCLE, frame.x(cell.sparsity), frame.y(cell.perplexity)) for cell in curve]
        for cell in cells:
            if cell.target in frame.patterns:
                x = frame.patterns[cell.target] + apart * (index - (len(names) - 1) / 2)
                parts.append(_marker(cell, colour, _DIAMOND, x, frame.y(cell.perplexity)))
        last = (curve or cells)[-1]
        labels.append((frame.y(last.perplexity), colour, method))
    dense = comparison.dense.perplexity
    if _placeable(dense):
        labels.append((frame.y(dense), None, f"dense {perplexity_text(dense)}"))
    return parts + _labels(labels, frame)


def _marker(cell: Cell, colour: int, shape: str, x: float, y: float) -> str:
    title = (
        f"{cell.method} {target_text(cell.target)}: perplexity {perplexity_text(cell.perplexity)} "
        f"at {percent_text(cell.sparsity, 2)} sparsity"
    )
    if _placeable(cell.perplexity):
        look = f'class="c{colour} edge" fill="{SERIES_LIGHT[colour]}" stroke="#fdfdfb" d="{shape}"'
    else:
        look = f'class="k{colour}" fill="none" stroke="{SERIES_LIGHT[colour]}" stroke-width="2" d="{_CROSS}"'
    return f'<path transform="translate({x:.1f} {y:.1f})" {look}><title>{escape(title)}</title></path>'


def _labels(labels: list[tuple[float, int | None, str]], frame: _Frame) -> list[str]:
    """Names (y, colour, text) beside the ends of the lines, moved apart where they would overlap."""
    labels = sorted(labels, key=lambda label: label[0])
    places: list[float] = []
    for y, _, _ in labels:
        places.append(max(y, places[-1] + _LABEL) if places else y)
    for i in range(len(places)):  # what was pushed out below goes back up, as far as it must
        places[i] = min(places[i], frame.bottom - _LABEL * (len(places) - 1 - i))
    parts = []
    x = frame.right + 12
    for place, (_, colour, text) in zip(places, labels, strict=True):
        if colour is None:
            parts.append(_text(x - 4, place + 4, text, "start"))
            continue
        look = f'class="c{colour}" fill="{SERIES_LIGHT[colour]}" d="{_CIRCLE}"'
        parts.append(f'<path {look} transform="translate({x:.1f} {place:.1f})"/>')
        shown = text if len(text) <= 14 else f"{text[:13]}…"
        parts.append(_text(x + 10, place + 4, shown, "start", ink=True))
    return parts


def _line(ends: tuple[float, float], y: float, name: str, colour: str, more: str = "") -> str:
    place = f'x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="{name}" stroke="{colour}" {place}{more}/>'


def _text(x: float, y: float, text: str, anchor: str, ink: bool = False) -> str:
    look = 'class="ink" fill="#1b2220"' if ink else 'fill="#56615b"'
    return f'<text {look} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _placeable(perplexity: float) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return 1e-9 < perplexity < 1e30


def _short(tick: float) -> str:
    return f"{tick:,.6g}" if tick < 1e6 else f"{tick:.0e}".replace("e+0", "e")


def _ticks(low: float, high: float) -> list[float]:
    """Up to eight round numbers between `low` and `high` for a logarithmic axis."""
    if high / low < 3:  # nearly linear: evenly spaced
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        return [float(f"{step * i:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for e in decades for m in mantissas if low <= (tick := float(f"{m}e{e}")) <= high]
        if len(ticks) <= 8:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)]


def _plot_words(comparison: Comparison) -> str:
    """How to read the plot, and which points it cannot place."""
    words = "Logarithmic axis."
    if any(_fraction(target) is None for target in targets(comparison)):
        words += " Lines join the unstructured targets; the N:M patterns stand beside them."
    lost = [
        f"{cell.method} at {target_text(cell.target)} ({perplexity_text(cell.perplexity)})"
        for cell in _cells(comparison).values()
        if not _placeable(cell.perplexity)
    ]
    if lost:
        words += f" Crosses at the upper edge have no place on the axis: {listing(lost)}."
    return words


_DARK = "".join(f".c{i}{{fill:{c}}}.k{i}{{stroke:{c}}}" for i, c in enumerate(SERIES_DARK))
_SVG_STYLE = (
    "<style>text{font:12px -apple-system,'Segoe UI',Roboto,'Noto Sans','Liberation Sans',Arial,sans-serif}"
    "@media (prefers-color-scheme:dark){text{fill:#9ba9a2}.ink{fill:#e5eae7}.rule{stroke:#2b3431}"
    f".dense{{stroke:#9ba9a2}}.paper{{fill:#131716}}{_DARK}.edge{{stroke:#131716}}}}</style>"
)
