from __future__ import annotations

import csv
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.record import Calibration, Evaluation
from billhook.report.table import (
    Cell,
    Comparison,
    best,
    methods,
    plot_svg,
    targets,
    to_csv,
    to_html,
    to_json,
    to_markdown,
    write,
)

PERPLEXITIES = {
    "magnitude": {"0.5": 73.2, "0.7": 104312.7, "0.8": math.nan, "2:4": 1290.3},
    "wanda": {"0.5": 27.96, "0.7": 81.2, "0.8": 612.0, "2:4": 61.9},
    "sparsegpt": {"0.5": 24.31, "0.7": 52.7, "0.8": math.inf, "2:4": 38.1},
}


@pytest.fixture
def comparison() -> Comparison:
    cells = [
        Cell(
            method=method,
            target=target,
            sparsity=0.5 if ":" in target else float(target),
            perplexity=perplexity,
            seconds=74.0,
            peak_memory=1_400_000_000,
        )
        for method, row in PERPLEXITIES.items()
        for target, perplexity in reversed(row.items())
    ]
    return Comparison(
        model="owner/name",
        dense=Evaluation(
            perplexity=18.4021,
            data="wikitext2",
            length=1024,
            windows=40,
            tokens=40920,
            dtype="float32",
            seconds=61.0,
        ),
        calibration=Calibration(data="wikitext2", samples=32, length=512, seed=0, fingerprint="c2a9"),
        cells=cells,
        machine={"cpu": "Example CPU", "memory": 16_600_000_000},
        versions={"billhook": "0.1.0"},
    )


def test_order_and_best(comparison: Comparison) -> None:
    assert methods(comparison) == ["magnitude", "wanda", "sparsegpt"]
    assert targets(comparison) == ["0.5", "0.7", "0.8", "2:4"]
    assert best(comparison) == {
        ("sparsegpt", "0.5"),
        ("sparsegpt", "0.7"),
        ("wanda", "0.8"),
        ("sparsegpt", "2:4"),
    }


def test_patterns_come_after_fractions_by_group_size(comparison: Comparison) -> None:
    comparison.cells = [
        comparison.cells[0].model_copy(update={"target": target}) for target in ("4:8", "1:4", "2:4", "0.1", "?")
    ]
    assert targets(comparison) == ["0.1", "1:4", "2:4", "4:8", "?"]


def test_nothing_finite_has_no_best(comparison: Comparison) -> None:
    for cell in comparison.cells:
        cell.perplexity = math.inf
    assert not best(comparison)
    assert "**" not in to_markdown(comparison)


def test_the_last_of_equal_cells_counts(comparison: Comparison) -> None:
    comparison.cells.append(comparison.cells[0].model_copy(update={"perplexity": 3.0}))
    assert ("magnitude", "2:4") in best(comparison)


def test_markdown(comparison: Comparison) -> None:
    assert to_markdown(comparison) == (
        "Perplexity of owner/name after pruning; dense model: 18.40. The best of each column is bold. "
        "Perplexity on the test part of WikiText-2: the exponential of the mean negative log-likelihood of "
        "40,920 predicted tokens in 40 windows of 1,024 tokens, computed in float32. Lower is better. "
        "Calibration: 32 sequences of 512 tokens from the training part of WikiText-2, seed 0.\n\n"
        "| method | 50% | 70% | 80% | 2:4 |\n"
        "| :-- | --: | --: | --: | --: |\n"
        "| magnitude | 73.20 | 104,313 | NaN | 1,290 |\n"
        "| wanda | 27.96 | 81.20 | **612.00** | 61.90 |\n"
        "| sparsegpt | **24.31** | **52.70** | ∞ | **38.10** |\n"
    )


def test_a_missing_cell_is_a_dash(comparison: Comparison) -> None:
    comparison.cells = comparison.cells[:-1]
    assert "| sparsegpt | – |" in to_markdown(comparison)


def test_csv_reads_back(comparison: Comparison) -> None:
    dense, *rows = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert (dense["method"], float(dense["perplexity"])) == ("dense", 18.4021)
    assert [row["target"] for row in rows[:4]] == ["2:4", "0.8", "0.7", "0.5"]
    for row, cell in zip(rows, comparison.cells, strict=True):
        assert str(Cell.model_validate(row)) == str(cell)


def test_json_reads_back_and_is_strict(comparison: Comparison) -> None:
    text = to_json(comparison)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert str(Comparison.model_validate_json(text)) == str(comparison)
    for cell in comparison.cells:  # a resumed comparison reads its cells one by one
        assert str(Cell.model_validate_json(cell.model_dump_json())) == str(cell)


def test_page(comparison: Comparison, parse: Any) -> None:
    text = to_html(comparison)
    parsed = parse(text)
    parsed.assert_self_contained()
    assert "3 pruning methods on owner/name." in parsed.text("h1")
    assert "Lowest perplexity: sparsegpt at 50%, 70% and 2:4; wanda at 80%." in parsed.text("h1")
    marked = [value for attributes, value in parsed.find("td") if attributes.get("class") == "best"]
    assert marked == ["612.00", "24.31", "52.70", "38.10"]
    assert "magnitude at 80% (NaN) and sparsegpt at 80% (∞)" in parsed.text("figcaption")
    for value in ("104,313", "1 min 14 s", "1.4 GB", "18.40", "Example CPU", "16.6 GB", "c2a9"):
        assert value in parsed.text("main")


def test_plot(comparison: Comparison) -> None:
    svg = ElementTree.fromstring(plot_svg(comparison))
    space = "{http://www.w3.org/2000/svg}"
    titles = [element.text or "" for element in svg.iter(f"{space}title")]
    assert len(titles) == len(comparison.cells)
    assert "magnitude 70%: perplexity 104,313 at 70.00% sparsity" in titles
    texts = [element.text for element in svg.iter(f"{space}text")]
    for text in (
        "dense 18.40",
        "magnitude",
        "wanda",
        "sparsegpt",
        "50%",
        "70%",
        "2:4",
        "sparsity",
        "100,000",
    ):
        assert text in texts
    # a line for every two neighbours that both have a place: 1 + 2 + 1
    assert len([e for e in svg.iter(f"{space}path") if e.get("fill") == "none" and e.get("transform") is None]) == 4


def test_everything_is_escaped(comparison: Comparison, parse: Any) -> None:
    bad = '<script>alert("1")</script>|'
    comparison.model = bad
    comparison.machine = {bad: bad}
    for cell in comparison.cells:
        cell.method += bad
        if ":" in cell.target:
            cell.target += bad
    text = to_html(comparison)
    parse(text).assert_self_contained()
    assert text.count("<script>") == 1  # the page's own
    ElementTree.fromstring(plot_svg(comparison))
    lines = to_markdown(comparison).splitlines()
    assert "<script>" not in to_markdown(comparison).replace("\\<script\\>", "")
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {6}


def test_write(comparison: Comparison, tmp_path: Path) -> None:
    write(comparison, tmp_path / "a" / "b")
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["index.html", "plot.svg", "table.csv", "table.json", "table.md"]
    assert (tmp_path / "a/b/index.html").read_text(encoding="utf-8") == to_html(comparison)


def test_no_cells(comparison: Comparison, parse: Any) -> None:
    comparison.cells = []
    parse(to_html(comparison))
    assert "nothing was measured" in plot_svg(comparison)
    assert to_csv(comparison).count("\n") == 2


@settings(deadline=None)
@given(
    cells=st.lists(
        st.builds(
            Cell,
            method=st.sampled_from([f"m{i}" for i in range(12)]),
            target=st.sampled_from(["0.5", "0.1", "2:4", "4:8", "inf", "", "<"]),
            sparsity=st.floats(-1, 1) | st.sampled_from([float("nan"), float("inf")]),
            perplexity=st.floats(),
            seconds=st.floats(),
            peak_memory=st.integers(0, 2**62),
        ),
        max_size=12,
    ),
    dense=st.floats(),
)
def test_any_comparison_can_be_shown(parse: Any, cells: list[Cell], dense: float) -> None:
    evaluation = Evaluation(perplexity=dense, data="d", length=1, windows=1, tokens=1, dtype="float32", seconds=0.0)
    comparison = Comparison(model="m", dense=evaluation, cells=cells)
    parse(to_html(comparison)).assert_self_contained()
    svg = plot_svg(comparison)
    ElementTree.fromstring(svg)
    assert "nan" not in svg.replace("NaN", "")
    to_markdown(comparison)
    assert str(Comparison.model_validate_json(to_json(comparison))) == str(comparison)
    assert to_csv(comparison).count("\n") == len(cells) + 2
