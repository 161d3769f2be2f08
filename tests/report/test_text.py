from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from rich.console import Console

from billhook.recipe import parse_recipe
from billhook.record import Report, Size
from billhook.report import text


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (512_300_000, "512.3 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (538_090_408, "538.1 MB"),
        (3 * 10**18, "3,000.0 PB"),
        (math.nan, "–"),
    ],
)
def test_bytes(size: float, expected: str) -> None:
    assert text.bytes_text(size) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.00 s"),
        (0.42, "0.42 s"),
        (9.999, "10.0 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (134, "2 min 14 s"),
        (3599.7, "1 h 00 min"),
        (3780, "1 h 03 min"),
        (math.inf, "–"),
    ],
)
def test_seconds(seconds: float, expected: str) -> None:
    assert text.seconds_text(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (18.4021, "18.40"),
        (999.999, "1,000"),
        (104312.7, "104,313"),
        (1.234e7, "1.23e+07"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_perplexity(value: float, expected: str) -> None:
    assert text.perplexity_text(value) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (4, 2, "×0.50"),
        (18.4021, 27.9634, "×1.52"),
        (2, 30, "×15.0"),
        (18, 104_000, "×5,778"),
        (0, 1, "–"),
        (1, math.inf, "–"),
    ],
)
def test_ratio(before: float, after: float, expected: str) -> None:
    assert text.ratio_text(before, after) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.01234, "0.0123"), (4.5e-6, "4.5e-6"), (None, "not measured"), (math.nan, "not finite"), (0.0, "0")],
)
def test_error(error: float | None, expected: str) -> None:
    assert text.error_text(error) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (0.5, "0.5"),
        ("row", "row"),
        ([1, "a"], "[1, a]"),
        ({"a": {"b": 1}}, "{a: {b: 1}}"),
        ("2:4", "'2:4'"),
    ],
)
def test_setting_is_yaml(value: Any, expected: str) -> None:
    written = text.setting_text(value)
    assert written.replace("'", "") == expected.replace("'", "")
    assert yaml.safe_load(written) == value


def test_listing() -> None:
    assert [text.listing(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_headline(sample: Report) -> None:
    assert text.headline(sample) == [
        "HuggingFaceTB/SmolLM2-135M-Instruct, pruned with wanda: 50.0% of the weights in 210 matrices are zero.",
        "Perplexity rose from 18.40 to 27.96.",
    ]


def test_headline_says_only_what_was_measured(sample: Report) -> None:
    sample.before = None
    assert text.headline(sample)[1] == "Perplexity after pruning: 27.96."
    sample.after = None
    assert len(text.headline(sample)) == 1
    sample.steps = []
    assert text.headline(sample) == [f"{sample.model}, pruned with wanda."]  # from the recipe
    sample.recipe = []
    assert text.headline(sample) == [f"{sample.model}."]


def test_different_protocols_are_not_compared(sample: Report) -> None:
    assert sample.after is not None
    sample.after.length = 2048
    assert "must not be compared" in text.protocols_text(sample)
    assert "rose" not in " ".join(text.headline(sample))
    assert text.before_after(sample)[0].ratio == text.MISSING


def test_rows(sample: Report) -> None:
    rows = {row.label: (row.before, row.after, row.ratio) for row in text.before_after(sample)}
    assert rows == {
        "Perplexity": ("18.40", "27.96", "×1.52"),
        "Weights kept in pruned matrices": ("106,168,320", "53,084,160", "×0.50"),
        "Parameters, whole model": ("134,515,008", "134,515,008", "×1.00"),
        "Nonzero parameters, whole model": ("134,515,008", "81,430,848", "×0.61"),
        "Weight files on disk": ("538.1 MB", "538.1 MB", "×1.00"),
    }


def test_rows_are_only_what_was_measured(sample: Report) -> None:
    sample.before = sample.after = sample.size_before = None
    sample.size_after = Size(parameters=10, nonzero=5, bytes=40)
    sample.steps = []
    assert [(row.before, row.after, row.ratio) for row in text.before_after(sample)] == [
        ("–", "10", "–"),
        ("–", "5", "–"),
        ("–", "40 B", "–"),
    ]


def test_a_later_step_replaces_the_counts_of_an_earlier_one(
    build: Callable[..., Report], step: Callable[..., Any]
) -> None:
    report = build(step("wanda", blocks=2), step("sparsegpt", blocks=1))
    for site in report.steps[1].sites:
        site.sparsity = 1.0
    sites = text.final_sites(report)
    assert len(sites) == 14
    assert text.final_sparsity(report) == pytest.approx(0.75)


def test_recipe_runs_again(sample: Report) -> None:
    job = parse_recipe(text.recipe_yaml(sample))
    assert (job.model, job.steps) == (sample.model, sample.recipe)
    assert (job.data, job.samples, job.length, job.seed) == ("wikitext2", 32, 512, 0)
    assert (job.device, job.dtype, job.precision, job.storage) == ("cpu", "float32", "highest", "dense")
    assert (job.eval, job.eval_data, job.eval_length, job.eval_windows) == (True, "wikitext2", 1024, 40)


def test_recipe_of_a_run_in_python(sample: Report) -> None:
    assert sample.calibration is not None
    sample.calibration.data = "given"
    sample.before = sample.after = None
    recipe = text.recipe_yaml(sample)
    assert recipe.startswith("# The calibration data was given in Python")
    assert parse_recipe(recipe).eval is False


def test_recipe_of_other_types() -> None:
    report = Report(billhook="0", model="m", family="f", recipe=[{"method": "x", "a": (1, 2), "b": {3}}])
    assert yaml.safe_load(text.recipe_yaml(report))["steps"] == [{"method": "x", "a": [1, 2], "b": "{3}"}]


@pytest.mark.parametrize(
    ("data", "calibration", "evaluation"),
    [
        ("c4", "the training part of C4", "the validation part of C4"),
        ("text:/home/me/notes.txt", "notes.txt without its last fifth", "the held-out last fifth of notes.txt"),
        ("text:C:\\notes.txt", "notes.txt without its last fifth", "the held-out last fifth of notes.txt"),
        ("other", "other", "other"),
    ],
)
def test_data(data: str, calibration: str, evaluation: str) -> None:
    assert text.data_text(data, "calibration") == calibration
    assert text.data_text(data, "evaluation") == evaluation


@pytest.mark.parametrize("width", [60, 120])
def test_summary(sample: Report, width: int) -> None:
    sample.model = "[bold]owner/name[/bold]"  # not markup
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(text.summary(sample))
    shown = console.export_text()
    for part in ("[bold]owner/name[/bold]", "27.96", "×0.50", "538.1 MB", "40,920"):
        assert part in shown
