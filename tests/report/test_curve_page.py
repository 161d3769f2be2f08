from __future__ import annotations

import csv
import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from billhook.analysis.curve import essential_sparsity
from billhook.report.curve import (
    CurveReport,
    MatrixSparsities,
    PatternPoint,
    headline,
    plot_svg,
    to_csv,
    to_html,
    warnings,
    write,
)

OFFSETS = [-0.25, 0.0, 0.25]


def broken(s: float, seed: int = 1) -> float:
    return 80 - 0.5 * s - 60 * max(0.0, s - 0.437) + OFFSETS[seed]


def make(quality: Callable[[float, int], float] = broken, **options: Any) -> CurveReport:
    options = {"eps": 1.0, "seeds": 3} | options
    curve = essential_sparsity(quality, **options)
    return CurveReport(
        model="owner/name",
        method="magnitude, global",
        metric="accuracy, %",
        protocol="Accuracy on 1,821 examples of SST-2 after 5 epochs.",
        dense=curve.dense,
        curve=curve,
        nm_points=[
            PatternPoint.of(0.5, [75.11, 75.31, 75.51], pattern="2:4"),
            PatternPoint.of(0.5, [77.7, 77.8, 77.9], pattern="4:8"),
            PatternPoint.of(0.75, [41.25], pattern="1:4"),
        ],
        matrices=[
            MatrixSparsities(sparsity=0.4, matrices={"layers.0.q_proj": 0.62, "layers.0.up_proj": 0.31}),
            MatrixSparsities(sparsity=0.7, matrices={"layers.0.q_proj": 0.971, "layers.0.up_proj": 0.66}),
        ],
        machine={"processor": "Example CPU", "memory": 16_600_000_000},
        versions={"billhook": "0.1.0", "torch": "2.13.0"},
    )


@pytest.fixture(scope="module")
def result() -> CurveReport:
    return make()


def test_page_is_self_contained(result: CurveReport, parse: Any) -> None:
    text = to_html(result)
    parsed = parse(text)
    parsed.assert_self_contained()
    assert "http" not in text
    assert "//" not in text  # nor an address without its scheme
    assert text == to_html(result)
    assert len(text.encode()) < 150_000
    assert len(parsed.find("h1")) == 1
    for attributes, _ in parsed.find("svg"):
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_numbers_are_on_the_page(result: CurveReport, parse: Any) -> None:
    parsed = parse(to_html(result))
    assert result.curve.s_eps == 0.44375
    assert " ".join(parsed.text("h1").split()) == (
        "owner/name with magnitude, global: essential sparsity 44.38%. The curve breaks at 43.50%."
    )
    facts = dict(
        zip([text for _, text in parsed.find("dt")], [text for _, text in parsed.find("dd")], strict=True),
    )
    assert facts["Essential sparsity"] == "44.38%"
    assert facts["First point below the line"] == "45%"
    assert facts["Dense quality"] == "80.000"
    assert facts["Allowed drop"] == "1.0000"
    assert facts["Line"] == "79.000"
    assert facts["Standard error at the crossing"] == "0.1443"  # 0.25 / sqrt(3)
    assert facts["Hinge knee"] == "43.50%"
    assert facts["Chord knee"] == "43.75%"
    assert facts["Shape"] == "sharp"
    assert facts["Evaluations"] == str(3 * len(result.curve.points)) == str(result.curve.evaluations)
    assert facts["processor"] == "Example CPU"
    assert "Accuracy on 1,821 examples" in parsed.text("header")


def test_one_row_per_point_and_per_pattern(result: CurveReport, parse: Any) -> None:
    parsed = parse(to_html(result))
    rows = [text for _, text in parsed.find("th", "grid")]
    for text in ("0%", "40%", "44.38%", "45%", "90%", "2:4 (50%)", "4:8 (50%)", "1:4 (75%)"):
        assert rows.count(text) == 1, text
    cells = [text for _, text in parsed.find("td", "grid")]
    assert len(cells) == 5 * len(result.curve.points) + 4 * 3  # patterns have no fit
    assert cells[:5] == ["80.000", "0.0000", "0.1443", "80.000", "yes"]
    assert "75.310" in cells
    assert cells[-4:] == ["41.250", "38.750", "–", "no"]
    bold = [text for a, text in parsed.find("td", "grid") if a.get("class") == "best"]
    assert bold == ["79.373", "0.6269", "0.1443", "79.373", "yes"]


def test_plot_has_marks_bars_and_patterns(result: CurveReport) -> None:
    root = ElementTree.fromstring(plot_svg(result))
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in root.iter(f"{space}title")]
    assert "2:4: accuracy, % 75.310 ± 0.1155" in titles
    assert "1:4: accuracy, % 41.250" in titles
    assert "0%: accuracy, % 80.000 ± 0.1443" in titles
    assert len(titles) == len(result.curve.points) + 3
    texts = [text.text for text in root.iter(f"{space}text")]
    for words in (
        "essential sparsity 44.38%",
        "hinge knee 43.50%",
        "chord knee 43.75%",
        "dense 80.000 less 1.0000",
        "2:4",
    ):
        assert texts.count(words) == 1, words
    marks = [line for line in root.iter(f"{space}line") if line.get("x1") == line.get("x2")]
    assert len(marks) == 3
    bars = [path for path in root.iter(f"{space}path") if "V" in path.get("d", "")]
    assert len(bars) == len(result.curve.points) + 2  # 1:4 has one seed
    for element in root.iter():
        for name in ("x", "x1", "x2", "y", "y1", "y2"):
            value = element.get(name)
            assert value is None or value.endswith("%") or -1 <= float(value) <= 760, (element.tag, name, value)


def test_marks_stand_where_the_numbers_are(result: CurveReport) -> None:
    """The x of the marks is linear in the knob, and the y of the line is that of its quality."""
    root = ElementTree.fromstring(plot_svg(result))
    space = "{http://www.w3.org/2000/svg}"
    places: dict[str, tuple[float, float]] = {}
    for path in root.iter(f"{space}path"):
        title = path.find(f"{space}title")
        if title is not None and title.text is not None:
            x, y = path.get("transform", "").removeprefix("translate(").removesuffix(")").split()
            places[title.text.split(":")[0] if "%:" in title.text else title.text[:3]] = (float(x), float(y))
    left, right = places["0%"][0], places["90%"][0]
    assert places["2:4"][0] == pytest.approx(left + (right - left) * 0.5 / 0.9, abs=0.11)
    assert places["50%"][0] == places["2:4"][0]
    top, low = places["0%"][1], places["90%"][1]
    per_point = (low - top) / (80.0 - broken(0.9))
    dashed = [line for line in root.iter(f"{space}line") if line.get("stroke-dasharray") == "5 4"]
    assert float(dashed[0].get("y1", "nan")) == pytest.approx(top + per_point * 1.0, abs=0.15)
    essential = next(
        line for line in root.iter(f"{space}line") if line.get("stroke") == "#56615b" and "stroke-width" in line.attrib
    )
    assert float(essential.get("x1", "nan")) == pytest.approx(left + (right - left) * 0.44375 / 0.9, abs=0.11)


def test_csv_holds_every_value(result: CurveReport) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert len(rows) == len(result.curve.points) + 3
    for row, point in zip(rows, result.curve.points, strict=False):
        assert row["pattern"] == ""
        assert float(row["sparsity"]) == point.sparsity
        assert float(row["quality"]) == point.quality
        assert float(row["drop"]) == result.dense - point.quality
        assert float(row["se"]) == point.se
        assert float(row["fitted"]) == point.fitted
        assert [float(row[f"seed_{seed}"]) for seed in range(3)] == point.values
    assert [row["pattern"] for row in rows[-3:]] == ["2:4", "4:8", "1:4"]
    assert (rows[-1]["seed_0"], rows[-1]["seed_1"], rows[-1]["se"]) == ("41.25", "", "")


def test_files_are_written_and_read_back(result: CurveReport, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write(result, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["curve.csv", "curve.json", "curve.svg", "index.html"]
    assert (folder / "index.html").read_text(encoding="utf-8") == to_html(result)
    assert CurveReport.model_validate_json((folder / "curve.json").read_text(encoding="utf-8")) == result


def test_nearly_emptied_matrices_are_warned_of(result: CurveReport, parse: Any) -> None:
    assert warnings(result) == ["At a sparsity of 70% more than 95% of layers.0.q_proj is removed."]
    parsed = parse(to_html(result))
    assert [text for a, text in parsed.find("p") if a.get("class") == "alert"] == warnings(result)
    cells = [(a.get("class"), text) for a, text in parsed.find("td", "scroll")]
    assert cells == [(None, "62.0%"), ("best", "97.1%"), (None, "31.0%"), (None, "66.0%")]
    many = result.model_copy(
        update={"matrices": [MatrixSparsities(sparsity=0.9, matrices={f"m{i}": 0.99 for i in range(9)})]}
    )
    assert warnings(many) == ["At a sparsity of 90% more than 95% of m0, m1, m2 and 6 more is removed."]


def test_warnings_of_curve_and_caller_are_shown(parse: Any) -> None:
    noisy = make(lambda s, seed: broken(s) + 8 * OFFSETS[seed])
    noisy.warnings.append("The data set has only 277 examples.")
    alerts = [text for a, text in parse(to_html(noisy)).find("p") if a.get("class") == "alert"]
    assert "more seeds" in alerts[0]
    assert alerts[1] == "The data set has only 277 examples."


@pytest.mark.parametrize(
    ("quality", "words", "shape"),
    [
        (lambda s, seed: 80.0, "no crossing", "no crossing"),
        (lambda s, seed: 80 - 20 * s, "gradually", "gradual"),
        (lambda s, seed: 80.0 if s < 0.43 else 20.0, "cliff", "sharp (cliff)"),
    ],
)
def test_other_shapes(quality: Callable[[float, int], float], words: str, shape: str, parse: Any) -> None:
    report = make(quality)
    assert words in " ".join(headline(report))
    parsed = parse(to_html(report))
    parsed.assert_self_contained()
    facts = dict(
        zip([text for _, text in parsed.find("dt")], [text for _, text in parsed.find("dd")], strict=True),
    )
    assert facts["Shape"] == shape
    assert facts["Sharpness"] == ("∞" if report.curve.cliff else "–" if shape == "no crossing" else facts["Sharpness"])
    ElementTree.fromstring(plot_svg(report))


def test_relative_drop_of_a_likelihood(parse: Any) -> None:
    report = make(
        lambda s, seed: -3.5 - 12 * max(0.0, s - 0.24), eps_mode="relative", chance=-10.8, seeds=1, grid=(0.2, 0.4)
    )
    report.nm_points.clear()
    parsed = parse(to_html(report))
    assert "0.0350 (1% of the dense quality)" in parsed.text("dl")
    assert "−3.5000" in parsed.text("dl")
    assert "±" not in parsed.text("main")


def test_what_is_not_finite_is_a_cross(parse: Any) -> None:
    report = make(lambda s, seed: broken(s) if s < 0.55 else math.nan)
    root = ElementTree.fromstring(plot_svg(report))
    broken_points = [point for point in report.curve.points if math.isnan(point.quality)]
    assert broken_points
    titles = [title.text or "" for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(title.endswith("NaN") for title in titles) == len(broken_points)
    assert "NaN" in parse(to_html(report)).text("table")
    assert "nan" not in plot_svg(report)


def test_other_knobs_are_not_percentages(parse: Any) -> None:
    report = make(
        lambda layers, seed: 80 - 0.1 * layers - 4 * max(0.0, layers - 9),
        grid=range(0, 25, 4),
        rho=0.5,
        step=1,
        knob="layers",
        eps=2.0,
    )
    report.nm_points.clear()
    assert "essential layers 9." in headline(report)[0]
    assert "9" in [text for _, text in parse(to_html(report)).find("th", "grid")]


def test_names_are_escaped(parse: Any) -> None:
    report = make()
    bad = '"><script>alert(1)</script>'
    report.model = report.method = report.metric = report.protocol = report.curve.knob = bad
    report.nm_points[0].pattern = bad
    report.matrices[1].matrices = {bad: 0.99}
    report.warnings.append(bad)
    text = to_html(report)
    parse(text).assert_self_contained()
    assert text.count("<script>") == 1  # the page's own
    ElementTree.fromstring(plot_svg(report))
