from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from billhook.record import BlockRecord, Calibration, Evaluation, Report, SiteRecord, Size, StepRecord
from billhook.report.card import model_card
from billhook.report.html import page
from billhook.report.text import error_text, recipe_yaml, summary


def test_page_is_self_contained_balanced_and_small(sample: Report, parse: Any) -> None:
    text = page(sample)
    parse(text).assert_self_contained()
    assert "http" not in text
    assert len(text.encode()) < 150_000
    assert text == page(sample.model_copy(deep=True))


def test_values_are_present(sample: Report, parse: Any) -> None:
    parsed = parse(page(sample))
    assert " ".join(parsed.text("h1").split()) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct, pruned with wanda: 50.0% of the weights in 210 matrices "
        "are zero. Perplexity rose from 18.40 to 27.96."
    )
    main = parsed.text("main") + parsed.text("header")
    values = """
        the test part of WikiText-2 | 40,920 predicted tokens | 40 windows of 1,024 tokens | float32 | Lower is better
        18.40 | 27.96 | ×1.52 | 106,168,320 | 53,084,160 | 81,430,848 | 538.1 MB | Dense storage
        unstructured | row | uniform | ‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² | ‖y−ŷ‖² / ‖y‖²
        the training part of WikiText-2 | c2a94d10fe83 | 9f2c4e7ab01d | 1.4 GB
        Example CPU @ 2.50GHz | 16.6 GB | 2.13.0 | 5.23.0 | billhook run recipe.yaml
    """
    for value in values.replace("\n", "|").split("|"):
        assert value.strip() in main, value


def test_one_cell_per_site_and_its_number_in_the_table(sample: Report, parse: Any) -> None:
    parsed = parse(page(sample))
    sites, blocks = sample.steps[0].sites, sample.steps[0].blocks
    assert len(parsed.find("rect", "sparsity")) == len(sites) == 210
    assert len(parsed.find("rect", "error")) == len(sites) + len(blocks)
    titles = {text for _, text in parsed.find("title", "error")}
    cells = [text for _, text in parsed.find("td", "scroll")]
    for site in sites:
        name = site.projection.rpartition(".")[2]
        assert f"block {site.block} {name}: {error_text(site.error)}" in titles
        assert error_text(site.error) in cells
    for block in blocks:
        assert f"block {block.index} output: {error_text(block.error)}" in titles
    assert len(parsed.find("rect", "bars")) == sum(len(block.seconds) for block in blocks)


def test_figures_have_a_text_for_those_who_cannot_see_them(sample: Report, parse: Any) -> None:
    parsed = parse(page(sample))
    for attributes, _ in parsed.find("svg"):
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert [attributes["lang"] for attributes, _ in parsed.find("html")] == ["en"]
    assert len(parsed.find("h1")) == 1


def test_recipe_can_be_copied(sample: Report, parse: Any) -> None:
    ((_, recipe),) = parse(page(sample)).find("pre")
    assert recipe == recipe_yaml(sample)
    assert yaml.safe_load(recipe)["steps"] == sample.recipe


def test_names_are_escaped(build: Callable[..., Report], step: Callable[..., StepRecord], parse: Any) -> None:
    bad = "<script>alert(1)</script>"
    quoted = '"><img src=x onerror=alert(1)>'
    report = build(step(bad, blocks=2, projections=2), model=bad)
    report.steps[0].options = {bad: quoted}
    report.steps[0].sites[0].projection = quoted
    report.steps[0].blocks[0].seconds = {bad: 1.0, quoted: 2.0}
    report.machine, report.versions, report.family = {bad: quoted}, {bad: quoted}, quoted
    report.recipe = [{"method": bad, quoted: bad}]
    report.status = report.storage = report.billhook = report.fingerprint = bad
    assert report.after is not None
    report.after.data = bad
    text = page(report)
    parsed = parse(text)
    parsed.assert_self_contained()
    assert text.count("<script>") == 1  # the page's own
    assert "<img" not in text
    assert bad in parsed.text("h1")


def test_large_model_with_two_steps(build: Callable[..., Report], step: Callable[..., StepRecord], parse: Any) -> None:
    text = page(build(step("wanda", blocks=80, projections=9), step("obs", blocks=80, projections=9)))
    assert len(text.encode()) < 500_000
    parsed = parse(text)
    assert len(parsed.find("rect", "sparsity")) == 2 * 720
    assert "Step 1 of 2" in parsed.text("h2")
    assert "pruned with wanda, then obs" in parsed.text("h1")


def test_step_without_sites(build: Callable[..., Report], step: Callable[..., StepRecord], parse: Any) -> None:
    tune = StepRecord(method="perp", options={"steps": 100}, seconds=12.0)
    parsed = parse(page(build(step(), tune)))
    assert "No matrix was pruned in this step. The step took 12.0 s." in parsed.text("p")
    assert len(parsed.find("figure")) == 3


def test_errors_that_are_missing_or_not_finite(sample: Report, parse: Any) -> None:
    sites = sample.steps[0].sites
    sites[0].error, sites[1].error, sites[2].error, sites[3].error = None, math.nan, math.inf, 0.0
    text = page(sample)
    parsed = parse(text)
    assert [attributes["class"] for attributes, _ in parsed.find("rect", "error")].count("none") == 3
    assert "not measured or not finite" in text
    for site in sites:
        site.error = None
    for block in sample.steps[0].blocks:
        block.error = None
    assert "Reconstruction error" not in page(sample)


def test_uniform_sparsity_is_one_colour(sample: Report, parse: Any) -> None:
    for i, site in enumerate(sample.steps[0].sites):
        site.sparsity = 0.5 - 1e-4 * (i % 3)  # what rounding the counts does
    colours = {attributes["class"] for attributes, _ in parse(page(sample)).find("rect", "sparsity")}
    assert colours <= {"s7", "s8"}


def test_colours_follow_values(sample: Report, parse: Any) -> None:
    sites = sample.steps[0].sites
    parsed = parse(page(sample))
    levels = [int(attributes["class"][1:]) for attributes, _ in parsed.find("rect", "error")]
    by_title = dict(zip([text for _, text in parsed.find("title", "error")], levels, strict=True))
    ranked = sorted(sites, key=lambda site: site.error or 0.0)
    order = [by_title[f"block {s.block} {s.projection.rpartition('.')[2]}: {error_text(s.error)}"] for s in ranked]
    assert order == sorted(order)
    assert len(set(levels)) > 8


def test_only_what_was_measured(parse: Any) -> None:
    text = page(Report(billhook="0.1.0", model="m", family="llama", recipe=[]))
    parsed = parse(text)
    assert "not measured" in text
    assert not parsed.find("figure")
    assert not parsed.find("table")
    assert "Peak memory" not in text


@pytest.mark.parametrize(("status", "resumed", "alerts"), [("finished", False, 0), ("running", True, 2)])
def test_alerts(sample: Report, parse: Any, status: str, resumed: bool, alerts: int) -> None:
    sample.status, sample.resumed = status, resumed
    classes = [attributes.get("class") for attributes, _ in parse(page(sample)).find("p")]
    assert classes.count("alert") == alerts


counts = st.integers(0, 2**62)
numbers = st.floats(width=64)
names = st.text(max_size=8) | st.sampled_from(["a.b", "c.b", "q_proj", "<b>", "&amp;"])
leaves = st.none() | st.booleans() | counts | numbers | names
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2))
evaluations = st.builds(
    Evaluation, perplexity=numbers, data=names, length=counts, windows=counts, tokens=counts, dtype=names
)
sites = st.builds(
    SiteRecord,
    site=names,
    block=st.integers(0, 5),
    projection=names,
    shape=st.tuples(counts, counts),
    asked=numbers,
    sparsity=numbers,
    error=st.none() | numbers,
)
blocks = st.builds(
    BlockRecord,
    index=st.integers(0, 5),
    name=names,
    seconds=st.dictionaries(names, numbers, max_size=3),
    error=st.none() | numbers,
    peak_memory=st.none() | counts,
)
steps = st.builds(
    StepRecord,
    method=names,
    options=st.dictionaries(names, values, max_size=3),
    blocks=st.lists(blocks, max_size=4),
    sites=st.lists(sites, max_size=6),
    seconds=numbers,
)
sizes = st.none() | st.builds(Size, parameters=counts, nonzero=counts, bytes=counts)
reports = st.builds(
    Report,
    billhook=names,
    status=names,
    model=names,
    family=names,
    recipe=st.lists(st.dictionaries(names | st.just("method"), values, max_size=3), max_size=2),
    storage=st.sampled_from(["dense", "compressed", "other"]),
    fingerprint=st.none() | names,
    calibration=st.none()
    | st.builds(Calibration, data=names, samples=counts, length=counts, seed=counts, fingerprint=names),
    steps=st.lists(steps, max_size=2),
    before=st.none() | evaluations,
    after=st.none() | evaluations,
    size_before=sizes,
    size_after=sizes,
    seconds=numbers,
    resumed=st.booleans(),
    peak_memory=st.none() | counts,
    versions=st.dictionaries(names, names, max_size=2),
    machine=st.dictionaries(names, values, max_size=3),
)


@settings(deadline=None)
@given(reports)
def test_any_report_has_a_page_a_card_and_a_summary(parse: Any, report: Report) -> None:
    text = page(report)
    assert text == page(report)
    parsed = parse(text)
    parsed.assert_self_contained()
    assert len(parsed.find("rect", "sparsity")) == sum(len(step.sites) for step in report.steps)
    assert model_card(report, "out").startswith("---\nlibrary_name: transformers\n")
    console = Console(width=100, record=True, quiet=True)
    console.print(summary(report))
