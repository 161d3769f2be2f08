"""The page, the plot and the table of a measured curve: quality over sparsity, where it breaks, N:M beside it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from billhook.analysis.curve import Curve, Point
from billhook.report.html import SERIES_LIGHT, document, facts, group, key, machine_groups, table
from billhook.report.html import _round_up as round_up
from billhook.report.table import _CIRCLE, _CROSS, _DIAMOND, _LABEL, _SVG_STYLE, _line, _text
from billhook.report.text import MISSING, count_text, error_text, listing, percent_text

EMPTIED = 0.95  # a matrix with a higher sparsity than this is warned of

_CURVE, _PATTERN, _HINGE, _CHORD = 1, 5, 2, 4  # colours


class PatternPoint(Point):
    """The quality with a pattern such as 2:4 (N kept of M) in every matrix."""

    pattern: str


class MatrixSparsities(BaseModel):
    """What a point of the curve took from each matrix."""

    sparsity: float  # of the point
    matrices: dict[str, float]  # name -> sparsity


class CurveReport(BaseModel):
    """A curve and what it was measured on."""

    # a broken model has an infinite or undefined quality, and JSON has no words for these
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    model: str
    method: str
    metric: str = "quality"  # what the quality is, e.g. "accuracy, %" or "−NLL per token"
    protocol: str  # sentences: data, number of examples, fine-tuning, seeds
    dense: float  # quality of the dense model
    curve: Curve
    nm_points: list[PatternPoint] = Field(default_factory=list)
    matrices: list[MatrixSparsities] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


def write(result: CurveReport, folder: Path) -> None:
    """Write curve.csv, curve.json, curve.svg and index.html into `folder`, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("curve.csv", to_csv(result)),
        ("curve.json", result.model_dump_json(indent=1) + "\n"),
        ("curve.svg", plot_svg(result)),
        ("index.html", to_html(result)),
    ):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def to_csv(result: CurveReport) -> str:
    """One line per point with full precision: those of the curve, then the patterns; NaN and inf are written so."""
    points: list[Point] = [*result.curve.points, *result.nm_points]
    seeds = max((len(point.values) for point in points), default=0)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["pattern", "sparsity", "quality", "drop", "se", "fitted"]
    writer.writerow([*head, *(f"seed_{seed}" for seed in range(seeds))])
    for point in points:
        pattern = point.pattern if isinstance(point, PatternPoint) else ""
        cells = [point.sparsity, point.quality, result.dense - point.quality, point.se, point.fitted, *point.values]
        writer.writerow([pattern, *cells, *[""] * (seeds - len(point.values))])
    return file.getvalue()


# The page


def to_html(result: CurveReport) -> str:
    """The curve as one self-contained HTML document: plot, result, points, matrices, protocol."""
    curve = result.curve
    sentences = " ".join(f"<span>{escape(sentence)}</span>" for sentence in headline(result))
    alerts = [f'<p class="alert">{escape(text)}</p>' for text in warnings(result)]
    plots = "\n".join(
        f'<div class="{name}">{plot_svg(result, width, page=True)}</div>'
        for name, width in (("broad", 760), ("narrow", 380))
    )
    entries = [(f"c{_CURVE}", f"{result.method}, mean" + (" ± standard error" if _errors(result) else ""))]
    if result.nm_points:
        entries.append((f"c{_PATTERN}", "N:M"))
    parts = [
        "<header>",
        f'<p class="mark"><b>billhook</b> curve of {escape(curve.knob)}</p>',
        f"<h1>{sentences}</h1>",
        f'<p class="lead">{escape(result.protocol)}</p>',
        *alerts,
        "</header>",
        "<main>",
        "<section>",
        f"<figure>\n<figcaption><h3>{escape(result.metric)} over {escape(curve.knob)}</h3><div>{key(entries)}</div>"
        f"<p>{escape(_plot_words(result))}</p></figcaption>\n{plots}\n</figure>",
        "</section>",
        f"<section>\n<h2>Result</h2>\n{facts(_result_rows(result))}\n"
        f'<p class="note">{escape(_result_words(curve))}</p>\n</section>',
        _points(result),
        _matrices(result),
        f'<section>\n<h2>How it was measured</h2>\n<div class="pair">\n{group("Curve", facts(_search_rows(result)))}\n'
        f"{machine_groups(result.machine, result.versions)}\n</div>\n</section>",
        "</main>",
    ]
    title = f"{result.model}: curve of {curve.knob} with {result.method}"
    return document(title, "\n".join(filter(None, parts)), result.versions.get("billhook"))


def headline(result: CurveReport) -> list[str]:
    """What came out, in one or two sentences."""
    curve = result.curve
    who = f"{result.model} with {result.method}"
    if curve.flag == "no crossing":
        return [
            f"{who}: no crossing.",
            f"The {curve.knob} can go to {_knob(curve, curve.s_eps)} within the allowed drop of "
            f"{_quality(curve.drop)}.",
        ]
    first = f"{who}: essential {curve.knob} {_knob(curve, curve.s_eps)}."
    if curve.cliff:
        return [first, "Right after it the quality falls off a cliff."]
    if curve.flag == "sharp" and curve.tau_hinge is not None:
        return [first, f"The curve breaks at {_knob(curve, curve.tau_hinge)}."]
    return [first, "The quality declines gradually, without a sharp knee."]


def warnings(result: CurveReport) -> list[str]:
    """The warnings of the curve and of the caller, and one for matrices that a point nearly empties."""
    emptied = []
    for point in result.matrices:
        names = [name for name, sparsity in point.matrices.items() if sparsity > EMPTIED]
        if names:
            shown = listing(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"
            emptied.append(
                f"At a {result.curve.knob} of {_knob(result.curve, point.sparsity)} more than "
                f"{percent_text(EMPTIED, 0)} of {shown} is removed."
            )
    return [*result.curve.warnings, *result.warnings, *emptied]


def _result_rows(result: CurveReport) -> list[tuple[str, str]]:
    curve = result.curve
    allowed = _quality(curve.drop)
    if curve.eps_mode == "relative":
        allowed += f" ({curve.eps:g}% of the dense quality)"
    rows = [
        (f"Essential {curve.knob}", _knob(curve, curve.s_eps) if curve.flag != "no crossing" else "no crossing"),
        ("First point below the line", _knob(curve, curve.s_above)),
        ("Dense quality", _quality(result.dense)),
        ("Allowed drop", allowed),
        ("Line", _quality(curve.line)),
        ("Standard error at the crossing", MISSING if curve.se is None else _quality(curve.se)),
        ("Shape", f"{curve.flag} (cliff)" if curve.cliff else curve.flag),
        ("Hinge knee", _knob(curve, curve.tau_hinge)),
        ("Chord knee", _knob(curve, curve.tau_chord)),
        ("Sharpness", _ratio(curve.sharpness)),
        ("Slope before the hinge", _slope(curve.slope_before)),
        ("Slope after the hinge", _slope(curve.slope_after)),
        ("F-test of the hinge, p", MISSING if curve.p_value is None else error_text(curve.p_value)),
    ]
    if len(curve.crossings) > 1:
        spans = [f"{_knob(curve, a)} to {_knob(curve, b)}" for a, b in curve.crossings]
        rows.append(("Falls through the line", listing(spans)))
    return rows


def _search_rows(result: CurveReport) -> list[tuple[str, str]]:
    curve = result.curve
    rows = [
        ("Model", result.model),
        ("Method", result.method),
        ("Quality", result.metric),
        ("Chance level", _quality(curve.chance)),
        ("Seeds per point", str(curve.seeds)),
        ("Resolution", _knob(curve, curve.rho)),
        ("Evaluations", f"{curve.evaluations + curve.reused:,}"),
    ]
    if curve.reused:
        rows.append(("of them from an earlier run", f"{curve.reused:,}"))
    if curve.stopped_early:
        rows.append(("Grid", f"stopped early, after {_knob(curve, curve.points[-1].sparsity)}"))
    return rows


def _result_words(curve: Curve) -> str:
    words = (
        f"The essential {curve.knob} is the last point before the quality falls below the line, which is the dense "
        f"quality less the allowed drop, found to {_knob(curve, curve.rho)}. "
    )
    if curve.flag == "sharp":
        return words + "The knees are diagnostics: they move with the points that were evaluated."
    if curve.flag == "gradual":
        return words + f"The curve has no sharp knee, so the knees mean little: report the essential {curve.knob} only."
    return words + "It is beyond the end of the grid."


def _points(result: CurveReport) -> str:
    curve = result.curve

    def row(name: str, point: Point) -> list[str]:
        return [
            name,
            _quality(point.quality),
            _quality(result.dense - point.quality),
            MISSING if point.se is None else _quality(point.se),
            MISSING if point.fitted is None else _quality(point.fitted),
            "yes" if point.quality >= curve.line else "no",
        ]

    head = [curve.knob, result.metric, "drop", "standard error", "fit", "within the drop"]
    at = [i for i, point in enumerate(curve.points) if point.sparsity == curve.s_eps]
    rows = [row(_knob(curve, point.sparsity), point) for point in curve.points]
    parts = [
        "<section>\n<h2>Points</h2>",
        f'<p class="note">{count_text(len(rows), "point")}. The fit is the nearest curve that never rises.'
        f"{' The essential one is bold.' if curve.flag != 'no crossing' else ''}</p>",
    ]
    bold = {(i, x) for i in at for x in range(1, len(head))} if curve.flag != "no crossing" else set()
    parts.append(f'<div class="wide">{table(head, rows, "grid", bold)}</div>')
    if result.nm_points:
        rows = [row(f"{point.pattern} ({_knob(curve, point.sparsity)})", point) for point in result.nm_points]
        rows = [[*cells[:4], *cells[5:]] for cells in rows]  # no fit: they are not points of the curve
        content = table(["pattern (kept of every)", *head[1:4], *head[5:]], rows, "grid")
        parts.append(f'<h3>N:M</h3>\n<div class="wide">{content}</div>')
    return "\n".join([*parts, "</section>"])


def _matrices(result: CurveReport) -> str:
    if not result.matrices:
        return ""
    curve = result.curve
    columns = sorted(result.matrices, key=lambda point: point.sparsity)
    names = list(dict.fromkeys(name for point in columns for name in point.matrices))
    rows = [
        [name, *(percent_text(point.matrices[name]) if name in point.matrices else MISSING for point in columns)]
        for name in names
    ]
    bold = {
        (y, x)
        for y, name in enumerate(names)
        for x, point in enumerate(columns, 1)
        if point.matrices.get(name, 0.0) > EMPTIED
    }
    content = table(["matrix", *(_knob(curve, point.sparsity) for point in columns)], rows, "", bold)
    return (
        f"<section>\n<h2>Sparsity of each matrix</h2>\n"
        f'<p class="note">At each {escape(curve.knob)}. More than {percent_text(EMPTIED, 0)} is bold.</p>\n'
        f'<div class="scroll">{content}</div>\n</section>'
    )


def _errors(result: CurveReport) -> bool:
    return any(point.se is not None for point in [*result.curve.points, *result.nm_points])


def _knob(curve: Curve, value: float | None) -> str:
    """A value of the knob as text; sparsities as percentages."""
    if value is None:
        return MISSING
    if curve.knob != "sparsity":
        return f"{value:.6g}"
    return percent_text(value, 2).replace(".00%", "%")


def _quality(value: float) -> str:
    """A quality or a difference of qualities, with as many digits as can matter."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    digits = 3 if abs(value) >= 10 else 4
    text = f"{value + 0.0:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"
    return text.replace("-", "−", 1) if value < 0 else text


def _slope(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}".replace("-", "−", 1)


def _ratio(value: float | None) -> str:
    return MISSING if value is None else "∞" if math.isinf(value) else f"×{value:.3g}"


# The plot


@dataclass(frozen=True)
class _Frame:
    """Where things are, px, and the values at the edges."""

    left: float
    right: float
    top: float
    bottom: float
    last: float  # knob at the right; 0 is at the left
    low: float  # quality at the bottom
    high: float  # quality at the top

    def x(self, value: float) -> float:
        return self.left + 12 + (self.right - self.left - 24) * value / self.last

    def y(self, quality: float) -> float:
        """A quality that is not finite is at the lower edge."""
        if not math.isfinite(quality):
            return self.bottom
        return self.bottom - (self.bottom - self.top) * (quality - self.low) / (self.high - self.low)


def plot_svg(result: CurveReport, width: int = 760, page: bool = False) -> str:
    """The curve with its error bars, the line, the essential sparsity, the knees and the N:M points, as SVG.

    Args:
        result: what was measured.
        width: width, px.
        page: leave out the style and the background, which a page from `to_html` brings itself.
    """
    height = 420
    frame = _frame(result, width, height)
    content = [*_axes(result, frame), *_marks(result, frame), *_curve(result, frame), *_patterns(result, frame)]
    label = f"{result.metric} of {result.model} over {result.curve.knob}; the numbers are in the tables"
    size = 'width="100%"' if page else f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    if not page:
        content = [_SVG_STYLE, '<rect class="paper" width="100%" height="100%" fill="#fdfdfb"/>', *content]
    inner = "\n".join(content)
    return (
        f'<svg class="lines" role="img" aria-label="{escape(label)}" {size} viewBox="0 0 {width} {height}">\n'
        f"{inner}\n</svg>\n"
    )


def _frame(result: CurveReport, width: float, height: float) -> _Frame:
    points: list[Point] = [*result.curve.points, *result.nm_points]
    ends = [point.quality + side * (point.se or 0) for point in points for side in (-1, 1)]
    values = [value for value in (*ends, result.dense, result.curve.line) if math.isfinite(value)]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    return _Frame(
        left=64.0,
        right=width - 16.0,
        top=68.0,  # three rows of text above it
        bottom=height - 46.0,
        last=max(point.sparsity for point in points) or 1.0,
        low=low - room,
        high=high + room,
    )


def _axes(result: CurveReport, frame: _Frame) -> list[str]:
    curve = result.curve
    panel = (frame.left, frame.right)
    parts = []
    step = round_up((frame.high - frame.low) / 6)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for i in range(math.ceil(frame.low / step), math.floor(frame.high / step) + 1):
        parts.append(_line(panel, frame.y(i * step), "rule", "#dde2de"))
        text = f"{i * step:,.{digits}f}".replace("-", "−", 1)
        parts.append(_text(frame.left - 8, frame.y(i * step) + 4, text, "end"))
    step = round_up(frame.last / max(4, (frame.right - frame.left) / 70))
    for i in range(math.floor(frame.last / step + 1e-9) + 1):
        parts.append(_text(frame.x(i * step), frame.bottom + 20, _knob(curve, i * step), "middle"))
    parts.append(_text((frame.left + frame.right) / 2, frame.bottom + 40, curve.knob, "middle"))
    parts.append(_line(panel, frame.y(curve.line), "dense", "#56615b", ' stroke-dasharray="5 4"'))
    words = f"dense {_quality(result.dense)} less {_quality(curve.drop)}"
    # On the side that the curve and the marks leave free: below it before the crossing, above it behind
    if frame.x(curve.s_eps) > (frame.left + frame.right) / 2:
        parts.append(_text(frame.left + 4, frame.y(curve.line) + 15, words, "start"))
    else:
        parts.append(_text(frame.right - 4, frame.y(curve.line) - 6, words, "end"))
    return parts


def _marks(result: CurveReport, frame: _Frame) -> list[str]:
    """Vertical lines at the essential sparsity and the knees, each with its text in a row of its own on top."""
    curve = result.curve
    marks: list[tuple[float | None, str, int | None]] = [
        (curve.s_eps if curve.flag != "no crossing" else None, f"essential {curve.knob}", None),
        (curve.tau_hinge, "hinge knee", _HINGE),
        (curve.tau_chord, "chord knee", _CHORD),
    ]
    shown = [(value, name, colour) for value, name, colour in marks if value is not None]
    # A text runs to the middle of the plot: the outermost line is the tallest, and no text crosses a line
    shown.sort(key=lambda mark: min(mark[0], frame.last - mark[0]))
    parts = []
    for row, (value, name, colour) in enumerate(shown):
        x, top = frame.x(value), frame.top - 54 + _LABEL * row
        look = (
            'class="dense" stroke="#56615b" stroke-width="1.5"'
            if colour is None
            else f'class="k{colour}" stroke="{SERIES_LIGHT[colour]}" stroke-width="1.5" stroke-dasharray="2 3"'
        )
        parts.append(f'<line {look} x1="{x:.1f}" x2="{x:.1f}" y1="{top - 9:.1f}" y2="{frame.bottom:.1f}"/>')
        anchor, away = ("start", 6) if x < (frame.left + frame.right) / 2 else ("end", -6)
        parts.append(_text(x + away, top, f"{name} {_knob(curve, value)}", anchor, ink=True))
    return parts


def _curve(result: CurveReport, frame: _Frame) -> list[str]:
    look = f'class="k{_CURVE}" stroke="{SERIES_LIGHT[_CURVE]}" fill="none"'
    points = result.curve.points
    parts = []
    for one, two in pairwise(points):
        if math.isfinite(one.quality) and math.isfinite(two.quality):
            ends = [f"{frame.x(point.sparsity):.1f} {frame.y(point.quality):.1f}" for point in (one, two)]
            parts.append(f'<path {look} stroke-width="2" d="M{ends[0]}L{ends[1]}"/>')
    return parts + _markers(result, frame, points, _CURVE, _CIRCLE, lambda point: _knob(result.curve, point.sparsity))


def _patterns(result: CurveReport, frame: _Frame) -> list[str]:
    names = {id(point): point.pattern for point in result.nm_points}
    parts = _markers(result, frame, result.nm_points, _PATTERN, _DIAMOND, lambda point: names[id(point)])
    seen: dict[float, int] = {}
    for point in sorted(result.nm_points, key=lambda point: -frame.y(point.quality)):
        # 2:4 and 4:8 stand at one sparsity: their names go to either side
        side = seen[point.sparsity] = seen.get(point.sparsity, 0) + 1
        x, anchor = (9, "start") if side % 2 else (-9, "end")
        place = frame.x(point.sparsity) + x
        parts.append(_text(place, frame.y(point.quality) + 4, point.pattern, anchor, ink=True))
    return parts


def _markers(
    result: CurveReport,
    frame: _Frame,
    points: Sequence[Point],
    colour: int,
    shape: str,
    name: Callable[[Point], str],
) -> list[str]:
    """Each point with its error bar; a cross at the lower edge where the quality is not finite."""
    stroke = f'class="k{colour}" stroke="{SERIES_LIGHT[colour]}"'
    parts = []
    for point in points:
        x, y = frame.x(point.sparsity), frame.y(point.quality)
        if point.se:
            top, bottom = frame.y(point.quality + point.se), frame.y(point.quality - point.se)
            bar = f"M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8M{x:.1f} {top:.1f}V{bottom:.1f}"
            parts.append(f'<path {stroke} stroke-width="1.5" fill="none" d="{bar}"/>')
        if math.isfinite(point.quality):
            look = f'class="c{colour} edge" fill="{SERIES_LIGHT[colour]}" stroke="#fdfdfb" d="{shape}"'
        else:
            look = f'{stroke} stroke-width="2" fill="none" d="{_CROSS}"'
        spread = "" if point.se is None else f" ± {_quality(point.se)}"
        title = f"{name(point)}: {result.metric} {_quality(point.quality)}{spread}"
        parts.append(f'<path transform="translate({x:.1f} {y:.1f})" {look}><title>{escape(title)}</title></path>')
    return parts


def _plot_words(result: CurveReport) -> str:
    words = "The dashed line is the lowest quality allowed."
    if result.nm_points:
        words += " N:M patterns stand at the sparsity they make."
    lost = [_knob(result.curve, point.sparsity) for point in result.curve.points if not math.isfinite(point.quality)]
    if lost:
        words += f" Crosses at the lower edge have no finite quality: {listing(lost)}."
    return words
