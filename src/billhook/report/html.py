"""The report page: one HTML file that opens anywhere, without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from billhook.record import Report, SiteRecord, StepRecord
from billhook.report.text import (
    BLOCK_ERROR_WORDS,
    ERROR_WORDS,
    KEPT_WORDS,
    MISSING,
    before_after,
    bytes_text,
    count_text,
    data_text,
    error_text,
    final_sites,
    headline,
    machine_text,
    percent_text,
    protocols_text,
    recipe_yaml,
    seconds_text,
    setting_text,
    storage_text,
)

# Colour scales of 16 levels from low to high, even steps in OKLab; the dark ones run from dark to bright.
_SCALES = {
    "s": (
        "#e3efe6 #d4e6da #c4dece #b5d5c3 #a6ccb7 #96c4ac #87bba1 #77b296"
        " #69a78a #5c997e #4f8b72 #437e67 #36705b #2a6350 #1d5646 #0e4a3b",
        "#1e322b #223c33 #26473a #2a5142 #2e5c4a #326753 #36735b #3a7e64"
        " #438b6e #51987a #5ea587 #6cb393 #7ac1a0 #88cfad #96debb #a4ecc8",
    ),
    "e": (
        "#fbeed6 #f9e3c4 #f6d8b3 #f4cda1 #f1c28f #eeb67c #eaab69 #e7a055"
        " #dd9146 #cd803e #bd6f37 #ad5f30 #9d4e28 #8d3e21 #7e2d1b #6e1c14",
        "#33241b #432c1f #543522 #653d25 #774628 #894f2a #9c572c #af602e"
        " #be6d38 #c87d48 #d28e58 #db9e68 #e4ae78 #edbf88 #f6cf98 #ffe0a8",
    ),
}
LEVELS = 16

# Eight colours that stay apart from each other for colour-blind readers too, on light and on dark paper.
SERIES_LIGHT = ("#8b9690", "#3b7cb4", "#1f7a58", "#dd9b2f", "#95548a", "#c2532f", "#45a0a8", "#6468b0")
SERIES_DARK = ("#7d8a84", "#6aa9dd", "#4cb58a", "#e8b656", "#c48bba", "#e58261", "#6fc5cc", "#999ddf")

_STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1b2220;--soft:#56615b;--line:#dde2de;--wash:#f3f5f1;
--accent:#1b6a4d;--none:#b4bab6;%(light)s}
@media screen and (prefers-color-scheme:dark){:root{--paper:#131716;--ink:#e5eae7;--soft:#9ba9a2;
--line:#2b3431;--wash:#1a201e;--accent:#7fd1aa;--none:#59625e;%(dark)s}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%%;text-size-adjust:100%%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 -apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",Helvetica,Arial,sans-serif}
body>*{max-width:1040px;margin-inline:auto;padding-inline:24px}
header{padding-top:44px}
.mark{margin:0 0 18px;font-size:14px;color:var(--soft)}
.mark b{color:var(--accent);font-weight:700;letter-spacing:.01em}
h1{margin:0;font-size:clamp(1.35rem,1.05rem + 1.4vw,1.9rem);line-height:1.28;font-weight:650;
letter-spacing:-.014em;overflow-wrap:anywhere}
h1 span{display:block;text-wrap:balance}
h1 span+span{margin-top:.3em}
h2{margin:0 0 6px;font-size:1.3rem;line-height:1.3;font-weight:650;letter-spacing:-.008em;
overflow-wrap:anywhere}
h2 small{display:block;font-size:13px;font-weight:400;letter-spacing:0;color:var(--soft)}
h3{margin:0 0 6px;font-size:15px;font-weight:650}
p{max-width:46em;margin:0 0 12px}
.lead{margin-top:14px}
.lead,.note,figcaption p{color:var(--soft);overflow-wrap:anywhere}
.note,figcaption p{font-size:14px;line-height:1.5}
.alert{margin-top:18px;padding:10px 14px;border-left:3px solid #c9832b;background:var(--wash);font-size:15px}
section{margin-top:52px}
section section{margin-top:30px}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:8px 0 8px 28px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:400}
th:first-child,td:first-child{padding-left:0;text-align:left;white-space:normal}
thead th{padding-block:4px;color:var(--soft);font-size:13px;border-color:var(--soft);vertical-align:bottom}
.result{width:100%%;max-width:780px;margin:14px 0 12px}
.result td:nth-child(3){font-weight:650}
.best{font-weight:700;color:var(--accent)}
dl{margin:0;font-size:14px;columns:2;column-gap:48px}
dl div{display:flex;gap:16px;padding:5px 0;border-bottom:1px solid var(--line);break-inside:avoid}
dt{color:var(--soft);flex:0 0 40%%;overflow-wrap:anywhere}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
dl.mono{font-size:13px}
.pair{columns:2;column-gap:48px;margin-top:14px}
.pair section{margin:0 0 30px;break-inside:avoid}
.pair dl{columns:1}
figure{margin:34px 0 0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 32px;align-items:flex-end;justify-content:space-between;
margin-bottom:10px}
figcaption p{flex-basis:100%%;max-width:56em;margin:2px 0 0}
.plot{display:grid;grid-template-columns:min(var(--labels),36vw) minmax(0,1fr);column-gap:10px;
font-size:12px;line-height:22px}
.labels{position:relative;text-align:right;color:var(--soft);min-width:0}
.labels span{display:block;height:22px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.labels .gap{margin-top:6px}
.labels [style]{position:absolute;right:0;height:auto;line-height:12px;margin-top:-6px;
font-variant-numeric:tabular-nums}
.labels .axis{margin-top:5px}
svg{display:block;overflow:visible;
font:12px/1 -apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",Arial,sans-serif;
font-variant-numeric:tabular-nums}
svg text{fill:var(--soft)}
svg .rule{stroke:var(--line)}
.map rect{width:var(--pitch);height:22px;stroke:var(--paper);stroke-width:1px}
.map rect:hover{stroke:var(--ink)}
.bars rect{width:var(--pitch)}
.bars rect:hover{opacity:.75}
.none{fill:var(--none)}
.key{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0;padding:0;list-style:none;font-size:13px;
color:var(--soft)}
.key svg{display:inline-block;vertical-align:-1px;margin-right:5px}
details{margin-top:8px;font-size:13px}
summary{width:fit-content;cursor:pointer;color:var(--soft)}
summary:hover{color:var(--ink)}
.scroll{max-height:340px;overflow:auto;margin-top:6px;border-block:1px solid var(--line)}
.scroll table{width:100%%}
.scroll th,.scroll td{padding:3px 6px 3px 18px;font-size:12.5px}
.scroll thead th{position:sticky;top:0;background:var(--paper)}
.wide{overflow-x:auto}
.grid{margin:6px 0 12px}
.wide+h3{margin-top:26px}
.lines{max-width:760px;height:auto}
.lines .ink{fill:var(--ink)}
.lines .dense{stroke:var(--soft)}
.lines .edge{stroke:var(--paper)}
.recipe{position:relative}
pre{margin:10px 0 0;padding:14px 16px;background:var(--wash);font-size:13px;line-height:1.5;overflow-x:auto;
tab-size:2}
button{position:absolute;top:8px;right:8px;padding:3px 10px;font:inherit;font-size:13px;cursor:pointer;
color:var(--ink);background:var(--paper);border:1px solid var(--line);border-radius:4px}
button:hover{border-color:var(--soft)}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
footer{margin-top:56px;padding-block:18px 40px;font-size:13px;color:var(--soft)}
.narrow{display:none}
@media (max-width:640px){body>*{padding-inline:16px}header{padding-top:26px}section{margin-top:40px}
.result,.grid{font-size:14px}th,td{padding-left:12px}.result th:first-child{overflow-wrap:anywhere}
.pair,dl{columns:1}
.broad{display:none}.narrow{display:block}}
@media print{:root{--paper:#fff}body{font-size:10.5pt}body>*{max-width:none;padding-inline:0}header{padding-top:0}
section{margin-top:26px}
figure,tr,dl div,.pair section,.recipe{break-inside:avoid}h2,h3{break-after:avoid}
details,button{display:none}pre{white-space:pre-wrap;overflow:visible;border:1px solid var(--line)}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("button.copy")) {
  const text = button.nextElementSibling;
  button.hidden = false;
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
    }
  };
}
"""

_PITCH = 22  # height of a heat-map row, px; the labels beside it are HTML lines of the same height
_GAP = 6  # between the projections and the block's own row, px
_BARS = 132  # height of the bar chart, px


# The page


def page(report: Report) -> str:
    """The report as one self-contained HTML document.

    Args:
        report: what was measured; quantities that are None have no row, figure or cell on the page.

    Returns:
        HTML text without references to other files; the same report gives the same text.
    """
    sentences = " ".join(f"<span>{escape(sentence)}</span>" for sentence in headline(report))
    parts = [
        "<header>",
        '<p class="mark"><b>billhook</b> run report</p>',
        f"<h1>{sentences}</h1>",
        f'<p class="lead">{escape(protocols_text(report))}</p>',
        _alerts(report),
        "</header>",
        "<main>",
        _result(report),
        *(_step(step, index, len(report.steps)) for index, step in enumerate(report.steps, 1)),
        _run(report),
        _recipe(report),
        "</main>",
    ]
    return document(f"{report.model}: billhook run report", "\n".join(filter(None, parts)), report.billhook)


def document(title: str, body: str, version: str | None = None) -> str:
    """A whole HTML document with the shared style around `body` (HTML); `title` is plain text."""
    by = f"Written by billhook {escape(version)}." if version else "Written by billhook."
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style()}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>{by} Every number on this page was measured in this run.</footer>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def style() -> str:
    """The style sheet that all pages share."""

    def variables(mode: int) -> str:
        scales = [(f"{name}{i}", c) for name, pair in _SCALES.items() for i, c in enumerate(pair[mode].split())]
        series = [(f"c{i}", c) for i, c in enumerate((SERIES_LIGHT, SERIES_DARK)[mode])]
        return "".join(f"--{name}:{colour};" for name, colour in scales + series)

    names = [f"{name}{i}" for name in _SCALES for i in range(LEVELS)] + [f"c{i}" for i in range(len(SERIES_LIGHT))]
    classes = "".join(f".{name}{{fill:var(--{name})}}" for name in names)
    classes += "".join(f".k{i}{{stroke:var(--c{i})}}" for i in range(len(SERIES_LIGHT)))
    return _STYLE % {"light": variables(0), "dark": variables(1)} + classes


def table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str = "", best: Collection[object] = ()) -> str:
    """An HTML table of plain-text cells, the first of each row its header.

    Args:
        head: column titles.
        rows: cells as text.
        name: CSS class of the table.
        best: container of (row, column) positions to set in bold.
    """
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = []
    for y, (first, *rest) in enumerate(rows):
        cells = "".join(
            f"<td{_class('best' if (y, x) in best else '')}>{escape(text)}</td>" for x, text in enumerate(rest, 1)
        )
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    head_row = f"<thead><tr>{top}</tr></thead>"
    return f"<table{_class(name)}>\n{head_row}\n<tbody>\n" + "\n".join(body) + "\n</tbody></table>"


def facts(pairs: Iterable[tuple[str, str]], name: str = "") -> str:
    """A list of names and values (plain text); `name` is its CSS class."""
    rows = "\n".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in pairs)
    return f"<dl{_class(name)}>\n{rows}\n</dl>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def group(title: str, content: str) -> str:
    """A small titled section around `content` (HTML)."""
    return f"<section>\n<h3>{escape(title)}</h3>\n{content}\n</section>"


def key(entries: Iterable[tuple[str, str]]) -> str:
    """The legend of a chart: (CSS class of the colour, plain text) in order."""
    box = '<svg width="11" height="11" aria-hidden="true"><rect class="{}" width="11" height="11"/></svg>'
    items = (f"<li>{box.format(name)}{escape(text)}</li>" for name, text in entries)
    return f'<ul class="key">{"".join(items)}</ul>'


# Its sections


def _alerts(report: Report) -> str:
    alerts = []
    if report.status != "finished":
        alerts.append(f"This run is not finished (status: {report.status}); the page shows what it has reached so far.")
    if report.resumed:
        alerts.append("This run was interrupted and resumed: the wall time of a step counts the last process only.")
    return "\n".join(f'<p class="alert">{escape(text)}</p>' for text in alerts)


def _result(report: Report) -> str:
    rows = before_after(report)
    if not rows:
        return ""
    cells = [(row.label, row.before, row.after, row.ratio) for row in rows]
    notes = [KEPT_WORDS if final_sites(report) else "", storage_text(report)]
    note = " ".join(filter(None, notes))
    return (
        "<section>\n<h2>Before and after</h2>\n"
        + table(("", "before", "after", "after ÷ before"), cells, "result")
        + (f'\n<p class="note">{escape(note)}</p>' if note else "")
        + "\n</section>"
    )


def _step(step: StepRecord, index: int, count: int) -> str:
    blocks = _blocks(step)
    if step.sites:
        matrices = count_text(len(step.sites), "matrix", "matrices")
        count_blocks = count_text(len({site.block for site in step.sites}), "block")
        done = f"{percent_text(step.sparsity)} of the weights in {matrices} ({count_blocks}) were removed."
    else:
        done = "No matrix was pruned in this step."
    done += f" The step took {seconds_text(step.seconds)}."
    number = f"Step {index} of {count}" if count > 1 else "Method"
    # One width for all figures of a step, so that the blocks of one stand exactly below those of the other
    longest = max((len(name) for name in _short_names(step).values()), default=0)
    width = min(max(longest, len("block output") if _block_errors(step) else 0, 6), 22)
    return "\n".join(
        filter(
            None,
            [
                "<section>",
                f"<h2><small>{number}</small>{escape(step.method)}</h2>",
                f"<p>{escape(done)}</p>",
                _options(step),
                f'<div style="--labels:{width}ch">',
                _sparsity_figure(step, blocks),
                _error_figure(step, blocks),
                _time_figure(step, blocks),
                "</div>",
                "</section>",
            ],
        )
    )


def _options(step: StepRecord) -> str:
    if not step.options:
        return ""
    return facts(((name, setting_text(value)) for name, value in step.options.items()), "mono")


def _run(report: Report) -> str:
    run = [
        ("Model", report.model),
        ("Family", report.family),
        ("Device", report.device),
        ("Weight dtype", report.dtype),
        ("Calibration precision", report.precision),
        ("Processes", f"{report.processes:,}"),
        ("Storage", report.storage),
        ("Seed", str(report.seed)),
        ("Wall time", seconds_text(report.seconds)),
    ]
    if report.peak_memory is not None:
        run.append(("Peak memory", bytes_text(report.peak_memory)))
    if report.fingerprint is not None:
        run.append(("Fingerprint", report.fingerprint))
    groups = [group("Run", facts(run))]
    if report.calibration is not None:
        data = report.calibration
        calibration = [
            ("Data", data_text(data.data, "calibration")),
            ("Sequences", f"{data.samples:,}"),
            ("Tokens per sequence", f"{data.length:,}"),
            ("Seed", str(data.seed)),
            ("Fingerprint", data.fingerprint),
        ]
        groups.append(group("Calibration data", facts(calibration)))
    groups.append(machine_groups(report.machine, {"billhook": report.billhook} | report.versions))
    content = "\n".join(filter(None, groups))
    return f'<section>\n<h2>How it was measured</h2>\n<div class="pair">\n{content}\n</div>\n</section>'


def machine_groups(machine: Mapping[str, object], versions: Mapping[str, str]) -> str:
    """The titled lists of the machine and of the versions; empty ones are left out."""
    parts = []
    if machine:
        items = [(name.replace("_", " "), machine_text(name, value)) for name, value in machine.items()]
        parts.append(group("Machine", facts(items)))
    if versions:
        parts.append(group("Versions", facts(versions.items())))
    return "\n".join(parts)


def _recipe(report: Report) -> str:
    if not report.recipe:
        return ""
    return (
        "<section>\n<h2>Recipe</h2>\n<p>Saved as recipe.yaml, this makes the same run again with "
        "<code>billhook run recipe.yaml</code>; <code>out</code> is the folder to write.</p>\n"
        '<div class="recipe"><button class="copy" type="button" hidden>Copy</button>'
        f"<pre>{escape(recipe_yaml(report))}</pre></div>\n</section>"
    )


# Figures: blocks run along x in percent of the width, so that every screen fits and text is never scaled


@dataclass(frozen=True)
class _Scale:
    """A colour scale from `low` to `high`, linear or logarithmic, with its ticks (value, text)."""

    name: str  # of the colours in _SCALES
    low: float
    high: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`; values outside are put at the ends."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def colour(self, value: float | None) -> str:
        """CSS class of the colour for `value`."""
        if value is None or not math.isfinite(value):
            return "none"
        return f"{self.name}{min(int(self.place(value) * LEVELS), LEVELS - 1)}"

    def legend(self) -> str:
        """The scale with its ticks, as SVG."""
        cell = 11
        width = cell * LEVELS
        boxes = "".join(
            f'<rect class="{self.name}{i}" x="{cell * i}" width="{cell + 0.5}" height="9"/>' for i in range(LEVELS)
        )
        texts = ""
        for value, text in self.ticks:
            place = self.place(value)
            anchor = "start" if place < 0.02 else "end" if place > 0.98 else "middle"
            texts += f'<text x="{width * place:.1f}" y="22" text-anchor="{anchor}">{escape(text)}</text>'
        label = f"Colour scale with ticks at {', '.join(text for _, text in self.ticks)}"
        return f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="26">{boxes}{texts}</svg>'


def _linear_scale(fractions: list[float]) -> _Scale:
    """A scale over `fractions` between multiples of 5%."""
    inside = [min(max(fraction, 0.0), 1.0) for fraction in fractions if math.isfinite(fraction)] or [0.0, 1.0]
    # A tenth of a point beyond a bound is rounding of the counts, and takes the end's colour
    low, high = math.floor(20 * min(inside) + 0.02), math.ceil(20 * max(inside) - 0.02)
    if high - low < 2:  # at least ten points wide: a uniform sparsity is one even colour, not noise blown up
        low, high = (low, low + 2) if low == 0 else (high - 2, high) if high == 20 else (low - 1, low + 1)
    ticks = [(value, f"{100 * value:.3g}%") for value in (low / 20, (low + high) / 40, high / 20)]
    return _Scale("s", low / 20, high / 20, ticks)


def _log_scale(values: list[float]) -> _Scale:
    """A logarithmic scale over the positive ones of `values` between round bounds."""
    clipped = [min(max(value, 1e-30), 1e30) for value in values if math.isfinite(value) and value > 0]
    rounds = [float(f"{m}e{e}") for e in range(-31, 32) for m in (1, 2, 5)]
    low = max(value for value in rounds if value <= min(clipped, default=0.01))
    high = min(value for value in rounds if value >= max(clipped, default=1.0) and value > low)
    inside = [value for value in rounds if low <= value <= high]
    ticks = [value for value in inside if f"{value:e}".startswith("1.0")]
    ticks = ticks[:: max(math.ceil(len(ticks) / 4), 1)]
    room = (high / low) ** 0.2  # between two texts
    ticks = [low, *(value for value in ticks if low * room < value < high / room), high]
    return _Scale("e", low, high, [(value, error_text(value)) for value in ticks], log=True)


def _sparsity_figure(step: StepRecord, blocks: list[int]) -> str:
    if not step.sites:
        return ""
    scale = _linear_scale([site.sparsity for site in step.sites])

    def title(site: SiteRecord) -> str:
        reached, asked = percent_text(site.sparsity, 2), percent_text(site.asked, 2)
        return reached if reached == asked else f"{reached}, asked {asked}"

    return _figure(
        "Sparsity per block and projection",
        "Share of weights that are exactly zero, counted in the weights that were written.",
        scale.legend(),
        _heat_map("sparsity", step, blocks, lambda site: scale.colour(site.sparsity), title),
        _matrix(step, blocks, lambda site: percent_text(site.sparsity, 2)),
    )


def _error_figure(step: StepRecord, blocks: list[int]) -> str:
    own = _block_errors(step)
    errors = [site.error for site in step.sites] + list(own.values())
    if all(error is None for error in errors):
        return ""
    scale = _log_scale([error for error in errors if error is not None])
    legend = scale.legend()
    if any(error is None or not math.isfinite(error) for error in errors):
        legend += key([("none", "not measured or not finite")])
    cells = {block: (scale.colour(error), error_text(error)) for block, error in own.items()}
    return _figure(
        "Reconstruction error per block and projection",
        ERROR_WORDS + (f" Block output: {BLOCK_ERROR_WORDS}" if own else ""),
        legend,
        _heat_map(
            "error",
            step,
            blocks,
            lambda site: scale.colour(site.error),
            lambda site: error_text(site.error),
            cells,
        ),
        _matrix(
            step,
            blocks,
            lambda site: error_text(site.error),
            {block: text for block, (_, text) in cells.items()},
        ),
    )


def _time_figure(step: StepRecord, blocks: list[int]) -> str:
    times = {block.index: {p: t for p, t in block.seconds.items() if 0 < t < math.inf} for block in step.blocks}
    phases = list(dict.fromkeys(phase for block in times.values() for phase in block))
    longest = max((sum(block.values()) for block in times.values()), default=0.0)
    if not 1e-6 < longest < math.inf:
        return ""
    unit = _round_up(longest / 3)
    count = math.ceil(longest / unit - 1e-9)
    scale, pitch = _BARS / (unit * count), 100 / len(blocks)
    colours = {phase: f"c{i % len(SERIES_LIGHT)}" for i, phase in enumerate(phases)}
    labels, shapes = [], []
    for i in range(count + 1):
        y = _BARS - scale * unit * i
        labels.append(f'<span style="top:{y + _GAP:.1f}px">{f"{unit * i:.6g} s" if i else "0"}</span>')
        shapes.append(f'<line class="rule" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
    for column, block in enumerate(blocks):
        y = float(_BARS)
        for phase, time in times.get(block, {}).items():
            y -= scale * time
            shapes.append(
                f'<rect class="{colours[phase]}" x="{pitch * (column + 0.06):.2f}%" y="{y:.1f}" '
                f'height="{scale * time:.1f}">'
                f"<title>block {block} {escape(phase)}: {seconds_text(time)}</title></rect>"
            )
    totals = {phase: sum(block.get(phase, 0.0) for block in times.values()) for phase in phases}
    return _figure(
        "Time per block",
        f"Wall time. All blocks together: {', '.join(f'{p} {seconds_text(t)}' for p, t in totals.items())}.",
        key((colours[phase], phase) for phase in phases),
        _plot("bars", "Time per block, stacked by phase", labels, shapes, blocks, _BARS + 2 * _GAP, 0.88),
        _time_table(step, blocks, phases),
    )


def _figure(title: str, words: str, legend: str, plot: str, numbers: str) -> str:
    return (
        f"<figure>\n<figcaption><h3>{escape(title)}</h3><div>{legend}</div><p>{escape(words)}</p>"
        f"</figcaption>\n"
        f'{plot}\n<details><summary>Numbers</summary>\n<div class="scroll">{numbers}</div></details>\n'
        "</figure>"
    )


def _heat_map(
    name: str,
    step: StepRecord,
    blocks: list[int],
    colour: Callable[[SiteRecord], str],
    title: Callable[[SiteRecord], str],
    own: Mapping[int, tuple[str, str]] | None = None,
) -> str:
    """Cells in a grid of blocks (x) and projections (y).

    Args:
        name: CSS class.
        step: its sites are the cells.
        blocks: the columns.
        colour: CSS class of a site's cell.
        title: tooltip of a site's cell, after the site's name.
        own: (CSS class, tooltip) by block for a further row, set apart, for the blocks' own outputs.
    """
    short = _short_names(step)
    columns = {block: f"{100 / len(blocks) * i:.2f}%" for i, block in enumerate(blocks)}
    shapes, labels = [], []
    for row, (projection, text) in enumerate(short.items()):
        labels.append(f'<span title="{escape(projection)}">{escape(text)}</span>')
        cells = "".join(
            f'<rect class="{colour(site)}" x="{columns[site.block]}">'
            f"<title>block {site.block} {escape(text)}: {title(site)}</title></rect>"
            for site in step.sites
            if site.projection == projection
        )
        shapes.append(f'<g transform="translate(0 {_PITCH * row})">{cells}</g>')
    height = _PITCH * len(short)
    if own:
        labels.append('<span class="gap">block output</span>')
        cells = "".join(
            f'<rect class="{name}" x="{columns[block]}"><title>block {block} output: {text}</title></rect>'
            for block, (name, text) in own.items()
        )
        shapes.append(f'<g transform="translate(0 {height + _GAP})">{cells}</g>')
        height += _GAP + _PITCH
    label = f"Heat map of {name} by block and projection; its numbers are in the table that follows"
    return _plot(f"map {name}", label, labels, shapes, blocks, height)


def _plot(
    name: str,
    label: str,
    labels: list[str],
    shapes: list[str],
    blocks: list[int],
    height: float,
    width: float = 1.0,
) -> str:
    """`shapes` (SVG) over an axis of blocks, `labels` (HTML) at their left.

    `height` is where the axis starts, px; `width` is the share of a column that a shape fills.
    """
    pitch = 100 / len(blocks)
    every = int(max(_round_up(len(blocks) / 10), 1))  # few enough numbers for a narrow screen
    axis = "".join(
        f'<text x="{pitch * (i + 0.5):.2f}%" y="{height + 16:g}">{blocks[i]}</text>'
        for i in range(0, len(blocks), every)
    )
    top = _GAP if name == "bars" else 0  # room for the text of the highest tick
    inner = "\n".join(shapes)
    return (
        f'<div class="plot"><div class="labels">{"".join(labels)}'
        f'<span class="axis" style="top:{height + 1:g}px">block</span></div>\n'
        f'<svg class="{name}" role="img" aria-label="{escape(label)}" width="100%" height="{height + 20:g}" '
        f'style="--pitch:{pitch * width:.2f}%">\n<g transform="translate(0 {top:g})">{inner}</g>\n'
        f'<g text-anchor="middle">{axis}</g></svg></div>'
    )


def _matrix(
    step: StepRecord,
    blocks: list[int],
    write: Callable[[SiteRecord], str],
    own: Mapping[int, str] | None = None,
) -> str:
    """The numbers of a heat map as a table of blocks and projections."""
    short = _short_names(step)
    texts = {(site.block, site.projection): write(site) for site in step.sites}
    rows = [[str(block), *(texts.get((block, name), "") for name in short)] for block in blocks]
    if own:
        rows = [[*row, own.get(block, "")] for row, block in zip(rows, blocks, strict=True)]
    return table(["block", *short.values(), *(["block output"] if own else [])], rows)


def _time_table(step: StepRecord, blocks: list[int], phases: list[str]) -> str:
    rows = []
    for block in sorted(step.blocks, key=lambda block: block.index):
        times = [seconds_text(block.seconds[phase]) if phase in block.seconds else "" for phase in phases]
        memory = MISSING if block.peak_memory is None else bytes_text(block.peak_memory)
        rows.append([str(block.index), *times, seconds_text(block.total_seconds), memory])
    return table(["block", *phases, "total", "peak memory so far"], rows)


def _blocks(step: StepRecord) -> list[int]:
    return sorted({block.index for block in step.blocks} | {site.block for site in step.sites})


def _block_errors(step: StepRecord) -> dict[int, float]:
    return {block.index: block.error for block in step.blocks if block.error is not None}


def _short_names(step: StepRecord) -> dict[str, str]:
    """Projections in order of appearance, each with the shortest end of its dotted name that is unique."""
    names = list(dict.fromkeys(site.projection for site in step.sites))
    for length in range(1, max((name.count(".") for name in names), default=0) + 2):
        short = [".".join(name.split(".")[-length:]) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _round_up(size: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `size`, which is positive."""
    exponent = math.floor(math.log10(size))
    return next(
        value for e in (exponent, exponent + 1) for m in (1, 2, 5) if (value := float(f"{m}e{e}")) >= size * (1 - 1e-9)
    )
