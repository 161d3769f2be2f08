"""The words and numbers that the page, the model card, the tables and the terminal share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from billhook.record import Calibration, Evaluation, Report, SiteRecord, StepRecord

MISSING = "–"  # a quantity that was not measured

ERROR_WORDS = (
    "‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖²: the squared change of the matrix's output by pruning W to Ŵ, relative to "
    "its squared output before, on sampled rows X of its calibration input."
)
BLOCK_ERROR_WORDS = (
    "‖y−ŷ‖² / ‖y‖², the same for the block's own output y, for the same input, on the first calibration batch."
)
KEPT_WORDS = "Weights kept are those that are not zero after pruning; before it, all weights of these matrices count."


# Numbers


def bytes_text(size: float) -> str:
    """A size in bytes as text in decimal units: 512300000 is "512.3 MB"."""
    if not math.isfinite(size):
        return MISSING
    if abs(size) < 1000:
        return f"{size:.0f} B"
    value, units = size / 1000, ["kB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.95 and len(units) > 1:  # what would round to 1000.0 belongs to the next unit
        value, units = value / 1000, units[1:]
    return f"{value:,.1f} {units[0]}"


def seconds_text(seconds: float) -> str:
    """A duration as text with about three digits: "0.42 s", "12.3 s", "2 min 14 s", "1 h 03 min"."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def perplexity_text(value: float) -> str:
    """A perplexity with as many digits as can matter: "18.40", "104,312", "1.23e+07", "∞", "NaN"."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) < 999.995:
        return f"{value:.2f}"
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.2e}"


def percent_text(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage: 0.5 is "50.0%"."""
    return f"{100 * fraction:.{digits}f}%" if math.isfinite(fraction) else MISSING


def ratio_text(before: float, after: float) -> str:
    """after / before as "×0.50"; a dash where the ratio is not a finite number."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return MISSING
    ratio = after / before
    if not math.isfinite(ratio):
        return MISSING
    if abs(ratio) >= 1e6:
        return f"×{ratio:.2e}"
    digits = 0 if abs(ratio) >= 100 else 1 if abs(ratio) >= 10 else 2
    return f"×{ratio:,.{digits}f}"


def error_text(error: float | None) -> str:
    """A relative error with three digits: "0.0123", "4.5e-6"; "not measured" for None."""
    if error is None:
        return "not measured"
    if not math.isfinite(error):
        return "not finite"
    return f"{error:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def count_text(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: "1 block", "1,024 tokens"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listing(words: Sequence[str]) -> str:
    """Words as "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def setting_text(value: Any) -> str:
    """An option's value on one line, written the way a YAML recipe has it."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def machine_text(key: str, value: Any) -> str:
    """A fact about the machine as text; memory given in bytes becomes readable."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6 and _is_memory(key):
        return bytes_text(value)
    return value if isinstance(value, str) else setting_text(value)


def _is_memory(key: str) -> bool:
    return any(word in key.lower() for word in ("memory", "bytes", "ram"))


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has; anything else as its text, so that a report never fails on it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


# Sentences

_GIVEN = "given"  # calibration batches that a Python program brought along
_SOURCES = {
    "wikitext2": ("the training part of WikiText-2", "the test part of WikiText-2"),
    "c4": ("the training part of C4", "the validation part of C4"),
    "demo": ("the demo text (Wikipedia, 2016)", "the held-out part of the demo text (Wikipedia, 2016)"),
    _GIVEN: ("data given in Python", "data given in Python"),
}


def final_sites(report: Report) -> list[SiteRecord]:
    """The last record of every pruned matrix: a later step's counts replace an earlier one's."""
    return list({site.site: site for step in report.steps for site in step.sites}.values())


def final_sparsity(report: Report) -> float:
    """Fraction of zeros over all weights of the matrices that any step pruned."""
    return StepRecord(method="", options={}, sites=final_sites(report)).sparsity


def method_names(report: Report) -> list[str]:
    """The methods of the steps in order, as the user typed them."""
    return [step.method for step in report.steps] or [str(step["method"]) for step in report.recipe if "method" in step]


def comparable(report: Report) -> bool:
    """Whether the perplexities before and after were both measured, and by the same protocol."""
    return (
        report.before is not None and report.after is not None and _protocol(report.before) == _protocol(report.after)
    )


def data_text(data: str, split: Literal["calibration", "evaluation"]) -> str:
    """A text source and the part of it that was used, in words; unknown ones as they are."""
    if data.startswith("text:"):
        name = data.removeprefix("text:").replace("\\", "/").rstrip("/").rpartition("/")[2] or data
        return f"{name} without its last fifth" if split == "calibration" else f"the held-out last fifth of {name}"
    calibration, evaluation = _SOURCES.get(data, (data, data))
    return calibration if split == "calibration" else evaluation


def headline(report: Report) -> list[str]:
    """What was done to which model, and what it cost: one or two sentences."""
    methods = ", then ".join(method_names(report))
    model = "The demo model" if report.model == "demo" else report.model
    text = f"{model}, pruned with {methods}" if methods else model
    sites = final_sites(report)
    if sites:
        share = percent_text(final_sparsity(report))
        text += f": {share} of the weights in {count_text(len(sites), 'matrix', 'matrices')} {gone_text(report)}"
    return list(filter(None, [f"{text}.", _perplexity_sentence(report)]))


def _perplexity_sentence(report: Report) -> str:
    before, after = report.before, report.after
    if before is None and after is None:
        return ""
    if before is None or after is None:
        side, one = ("after", after) if before is None else ("before", before)
        assert one is not None
        return f"Perplexity {side} pruning: {perplexity_text(one.perplexity)}."
    old, new = perplexity_text(before.perplexity), perplexity_text(after.perplexity)
    if not comparable(report) or math.isnan(before.perplexity) or math.isnan(after.perplexity):
        return f"Perplexity before: {old}; after: {new}."
    if old == new:
        return f"Perplexity stayed at {old}."
    return f"Perplexity {'rose' if after.perplexity > before.perplexity else 'fell'} from {old} to {new}."


def protocol_text(evaluation: Evaluation) -> str:
    """How a perplexity was measured, in words."""
    tokens = count_text(evaluation.tokens, "predicted token")
    windows = f"{count_text(evaluation.windows, 'window')} of {count_text(evaluation.length, 'token')}"
    return (
        f"Perplexity on {data_text(evaluation.data, 'evaluation')}: the exponential of the mean negative "
        f"log-likelihood of {tokens} in {windows}, computed in {evaluation.dtype}. Lower is better."
    )


def protocols_text(report: Report) -> str:
    """The protocol of the perplexities of `report`; a warning where they are not comparable."""
    before, after = report.before, report.after
    if before is not None and after is not None and not comparable(report):
        return (
            "The perplexities before and after were measured differently and must not be compared. "
            f"Before: {protocol_text(before)} After: {protocol_text(after)}"
        )
    one = after or before
    return protocol_text(one) if one is not None else "Perplexity was not measured in this run."


def calibration_text(calibration: Calibration) -> str:
    """The calibration data in words."""
    return (
        f"{count_text(calibration.samples, 'sequence')} of {count_text(calibration.length, 'token')} "
        f"from {data_text(calibration.data, 'calibration')}, seed {calibration.seed}"
    )


def smaller(report: Report) -> bool:
    """Whether parameters left the model rather than became zero."""
    return bool(
        report.size_before and report.size_after and report.size_after.parameters < report.size_before.parameters
    )


def gone_text(report: Report) -> str:
    """What became of the weights that were removed."""
    return "are gone" if smaller(report) else "are zero"


def storage_text(report: Report) -> str:
    """What the storage means for size and speed; empty where nothing was pruned."""
    if not final_sites(report):
        return ""
    if report.storage == "dense" and smaller(report):
        return (
            "Whole parts were removed: files, memory and work shrink in every runtime that loads the model; "
            "billhook bench measures by how much."
        )
    if report.storage == "dense":
        return (
            "Dense storage: removed weights are written as zeros, so the files keep the size of the "
            "original, and the model keeps its speed in runtimes that do not use sparsity."
        )
    if report.storage == "compressed":
        return (
            "Compressed storage: the files hold only the weights that are not zero, and a bitmask of their "
            "places. Once loaded, the model is dense again, with the memory and speed of the original."
        )
    return f"Storage: {report.storage}."


def recipe_yaml(report: Report) -> str:
    """The run as a recipe that `billhook run` takes, as YAML text."""
    job: dict[str, Any] = {"model": report.model, "out": "out", "steps": report.recipe}
    note = ""
    if report.calibration is not None:
        if report.calibration.data == _GIVEN:
            note = "# The calibration data was given in Python; the key data names a text to take instead.\n"
        else:
            job["data"] = report.calibration.data
        job |= {"samples": report.calibration.samples, "length": report.calibration.length}
    job |= {"seed": report.seed, "device": report.device, "dtype": report.dtype, "precision": report.precision}
    job["storage"] = report.storage
    one = report.after or report.before
    if one is None:
        job["eval"] = False
    else:
        job |= {"eval_data": one.data, "eval_length": one.length, "eval_windows": one.windows}
    return note + yaml.safe_dump(_plain(job), sort_keys=False, allow_unicode=True, width=100)


# The table before and after


@dataclass(frozen=True)
class Row:
    """One measured quantity as text; `MISSING` for a side that was not measured."""

    label: str
    before: str
    after: str
    ratio: str


def before_after(report: Report) -> list[Row]:
    """The measured quantities before and after pruning; a quantity measured on neither side has no row."""
    rows = []
    if report.before is not None or report.after is not None:
        old: float | None = getattr(report.before, "perplexity", None)
        new: float | None = getattr(report.after, "perplexity", None)
        rows.append(_row("Perplexity", old, new, perplexity_text, with_ratio=comparable(report)))
    sites = final_sites(report)
    if sites:
        total = sum(site.shape[0] * site.shape[1] for site in sites)
        rows.append(_row("Weights kept in pruned matrices", total, _kept(sites), _integer))
    write: Callable[[float], str]
    for label, name, write in (
        ("Parameters, whole model", "parameters", _integer),
        ("Nonzero parameters, whole model", "nonzero", _integer),
        ("Weight files on disk", "bytes", bytes_text),
    ):
        old_count: int | None = getattr(report.size_before, name, None)
        new_count: int | None = getattr(report.size_after, name, None)
        if old_count is not None or new_count is not None:
            rows.append(_row(label, old_count, new_count, write))
    return rows


def _kept(sites: Iterable[SiteRecord]) -> int | None:
    kept = [(1 - site.sparsity) * site.shape[0] * site.shape[1] for site in sites]
    return sum(round(count) for count in kept) if all(math.isfinite(count) for count in kept) else None


def _row(
    label: str,
    before: float | None,
    after: float | None,
    write: Callable[[float], str],
    with_ratio: bool = True,
) -> Row:
    return Row(
        label,
        MISSING if before is None else write(before),
        MISSING if after is None else write(after),
        MISSING if before is None or after is None or not with_ratio else ratio_text(before, after),
    )


def _integer(count: float) -> str:
    return f"{count:,}"


def _protocol(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.model_dump(exclude={"perplexity", "seconds"})


def summary(report: Report) -> Table:
    """The table before and after for the terminal."""
    # Text objects, because a plain string with square brackets would be read as markup
    table = Table(
        title=Text(" ".join(headline(report))),
        caption=Text(protocols_text(report)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for name in ("before", "after", "after ÷ before"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in before_after(report):
        table.add_row(Text(row.label), row.before, row.after, row.ratio)
    return table
