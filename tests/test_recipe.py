"""Recipes, jobs and method options: whatever is typed ends in a job or in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import billhook as bh
from billhook.errors import BillhookError
from billhook.methods import methods
from billhook.recipe import Job, job, parse_as, parse_recipe, read_recipe

GOOD = """\
model: demo
out: out/x
samples: 8
steps:
  - method: wanda
    sparsity: 0.3
  - method: sparsegpt
    sparsity: 0.6
    damping: 0.1
"""


def test_a_recipe() -> None:
    result = parse_recipe(GOOD)
    assert (result.model, result.out, result.samples, result.length) == ("demo", Path("out/x"), 8, 512)
    assert result.methods() == [bh.Wanda(sparsity=0.3), bh.SparseGPT(sparsity=0.6, damping=0.1)]


def test_defaults_are_those_of_a_job() -> None:
    text = "model: demo\nout: x\nsteps: [{method: magnitude}]\n"
    assert parse_recipe(text) == job(model="demo", out="x", steps=[{"method": "magnitude"}])


def test_options_of_the_command_win() -> None:
    result = parse_recipe(GOOD, out=Path("other"), seed=5, device=None)
    assert (result.out, result.seed, result.device) == (Path("other"), 5, "auto")


def test_a_job_survives_the_way_to_yaml_and_back() -> None:
    one = parse_recipe(GOOD)
    assert parse_recipe(yaml.safe_dump(one.model_dump(mode="json"))) == one


def test_numbers_are_those_that_people_write() -> None:
    text = "model: demo\nout: x\nsamples: 0x10\nsteps:\n- {method: wanda, pattern: 2:4}\n- {method: perp, lr: 1e-3}\n"
    result = parse_recipe(text)
    assert result.samples == 16
    assert result.steps[1]["lr"] == 0.001
    assert result.methods() == [bh.Wanda(pattern="2:4"), bh.PERP(lr=1e-3)]


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.booleans(), st.none()))
def test_values_are_read_as_yaml_has_them(value: Any) -> None:
    class Any_(BaseModel):
        x: Any = Field(None, description="anything")

    assert parse_as(Any_, yaml.safe_dump({"x": value}), "r").x == value


def test_reading_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    assert read_recipe(tmp_path / "r.yaml") == parse_recipe(GOOD)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "a recipe is a mapping with the keys model, out, steps"),
        ("- model", "a recipe is a mapping"),
        ("hello", "a recipe is a mapping"),
        ("model: [", "line 1: this is not YAML"),
        ("model: a\nmodel: b: c\n", "line 2: this is not YAML"),
        ("model: a\n--- \nmodel: b\n", "this is not YAML"),
        ("model: \0\n", "this is not YAML"),
        ("model: &a [*b]\n", "this is not YAML"),
        ("? [a]\n: b\n", "this is not YAML"),
        ("!!bool eval: x\n", "this is not YAML"),
        ("seed: !!timestamp x\n", "this is not YAML"),
        ("!!binary data: x\n", "line 1: key 'data' is not known"),
        ("1: x\n", "line 1: key '1' is not known"),
        ("<<: {model: demo}\n", "key '<<' is not known"),
        (GOOD.replace("samples", "sample"), r"line 3: key 'sample' is not known \(did you mean 'samples'\?\); allowed"),
        (GOOD.replace("    damping", "    dampng"), r"line 9: method sparsegpt has no option 'dampng' \(did you mean"),
        (GOOD.replace("damping: 0.1", "name: x"), "line 9: method sparsegpt has no option 'name'"),
        (GOOD.replace("method: sparsegpt", "method: sparsgpt"), r"line 7: there is no method 'sparsgpt' \(did"),
        (GOOD.replace("method: sparsegpt", "method: [wanda]"), "line 7: 'method' is not the name of a method"),
        (GOOD.replace("method: sparsegpt", "method: {a: b}"), "line 7: 'method' is not the name of a method"),
        (GOOD.replace("method: sparsegpt", "method: 3"), "line 7: there is no method '3'"),
        (GOOD.replace("method: sparsegpt", "method:"), "there is no method ''"),
        (GOOD.replace("- method: sparsegpt\n    sparsity", "- sparsity"), "line 7: the step names no method: write"),
        (
            GOOD.replace("method: sparsegpt", "metod: sparsegpt"),
            r"line 7: the step .* \('metod' is no key: did you mean",
        ),
        (GOOD + "    sparsity: 0.7\n", "line 10: key 'sparsity' was given in line 8 already"),
        (GOOD + "seed: 1\nmodel: x\n", "line 11: key 'model' was given in line 1 already"),
        (GOOD.replace("sparsity: 0.6", "sparsity: 1.5"), r"line 8: .*sparsity=1\.5 is not possible"),
        (GOOD.replace("sparsity: 0.6", "pattern: 5:4"), "line 7: Pattern '5:4'"),
        (GOOD.replace("sparsity: 0.6", "sparsity: .nan"), "sparsity=nan is not possible"),
        (GOOD.replace("sparsity: 0.6", "sparsity: a lot"), "sparsity='a lot' is not possible"),
        (GOOD.replace("samples: 8", "samples: 0"), "line 3: samples=0 is not possible"),
        (GOOD.replace("samples: 8", "samples: many"), "line 3: samples='many' is not possible"),
        (GOOD.replace("samples: 8", "seed: 99999999999999999999"), "line 3: seed=9+ is not possible"),
        (GOOD.replace("samples: 8", "storage: zip"), "line 3: storage='zip' is not possible"),
        (GOOD.replace("model: demo\n", ""), "model is missing: hub id"),
        (GOOD.split("steps")[0], "steps is missing"),
        (GOOD.split("steps")[0] + "steps: []", "steps=.* is not possible"),
        (GOOD.split("steps")[0] + "steps: 3", "line 4: steps=3 is not possible"),
        (GOOD.split("steps")[0] + "steps: [wanda]", "line 4: a step is a mapping such as 'method: wanda'"),
        (GOOD.split("steps")[0] + "steps: &a [*a]", "a step is a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, match: str) -> None:
    with pytest.raises(BillhookError, match=match) as caught:
        parse_recipe(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert "\n" not in str(caught.value)


def test_long_values_are_not_repeated_in_full() -> None:
    with pytest.raises(BillhookError) as caught:
        parse_recipe(GOOD.replace("samples: 8", f"samples: {'x' * 5000}"))
    assert len(str(caught.value)) < 300


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="There is no recipe"):
        read_recipe(tmp_path / "no.yaml")
    with pytest.raises(BillhookError, match="is a folder: name the recipe"):
        read_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(BillhookError, match="cannot be read as UTF-8"):
        read_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", ["name", "self"])
def test_steps_with_words_that_python_uses_itself(name: str) -> None:
    with pytest.raises(BillhookError, match=f"Method wanda has no option '{name}'"):
        job(model="demo", out="x", steps=[{"method": "wanda", name: 1}]).methods()


# -- anything at all -----------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["wanda", "sparsegpt", "2:4", "0:4", "9" * 5000 + ":1", "row", "global", "nan", "uniform", "٢:٤"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
OPTION_NAMES = sorted({name for cls in methods().values() for name in cls.model_fields})
STEP_KEYS = st.sampled_from(["method", "name", "self", *OPTION_NAMES]) | st.text(max_size=6)
STEPS = st.lists(
    st.dictionaries(STEP_KEYS, VALUES, max_size=4)
    | st.fixed_dictionaries(
        {"method": st.sampled_from(sorted(methods()))},
        optional=dict.fromkeys(OPTION_NAMES, VALUES),
    ),
    max_size=3,
)
JOBS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(Job.model_fields, VALUES),
        "model": st.just("demo") | VALUES,
        "out": st.just("x") | VALUES,
        "steps": STEPS | VALUES,
        "nonsense": VALUES,
    },
)


def one_sentence(error: BillhookError) -> None:
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message


def tried(call: Any) -> Any:
    try:
        return call()
    except BillhookError as error:
        one_sentence(error)
        return None


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(GOOD.split(" ") + GOOD.splitlines(True)), max_size=20))
def test_any_text(text: str | list[str]) -> None:
    result = tried(lambda: parse_recipe(text if isinstance(text, str) else "".join(text)))
    assert result is None or isinstance(result, Job)


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, len(GOOD)),
    insert=st.text(alphabet="&*!%@`'\"{}[],:?|->#<= \n\t\0\x85\ud800aeé0.~", max_size=4),
    cut=st.integers(0, 6),
)
def test_recipes_with_typing_mistakes(position: int, insert: str, cut: int) -> None:
    result = tried(lambda: parse_recipe(GOOD[:position] + insert + GOOD[position + cut :]))
    assert result is None or isinstance(result, Job)


@settings(max_examples=300, deadline=None)
@given(value=JOBS)
def test_any_mapping(value: dict[str, Any]) -> None:
    result = tried(lambda: parse_recipe(yaml.safe_dump(value, allow_unicode=True)))
    assert result is None or isinstance(result, Job)


@settings(max_examples=300, deadline=None)
@given(value=JOBS)
def test_any_job(value: dict[str, Any]) -> None:
    result = tried(lambda: job(**value))
    if result is not None:
        tried(result.methods)


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(methods())),
    options=st.dictionaries(st.sampled_from(OPTION_NAMES) | st.sampled_from(["sparsty", "x", ""]), VALUES, max_size=4),
)
def test_any_options(name: str, options: dict[str, Any]) -> None:
    result = tried(lambda: bh.method(name, **options))
    assert result is None or result.name == name
    if result is not None:
        assert bh.method(name, **result.options()) == result


def test_options_are_data() -> None:
    one = bh.method("sparsegpt", sparsity=0.5, damping=0.02, block_size=64)
    assert bh.method("sparsegpt", **one.options()) == one


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0 is not possible: input should be less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sparsity": float("nan")}, "sparsity=nan is not possible"),
        ({"sparsity": float("inf")}, "sparsity=inf is not possible"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"sparsity 0\.6 is not reachable under pattern 2:4.*exactly 0\.5"),
        ({"pattern": "5:4"}, "1 <= N <= M"),
        ({"pattern": "2to4"}, "Pattern '2to4' is not known"),
        ({"sparsty": 0.5}, r"has no option 'sparsty' \(did you mean 'sparsity'\?\)"),
        ({"scope": "rows"}, "scope='rows' is not possible"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BillhookError, match=match):
        bh.method("wanda", **options)


def test_a_method_that_does_not_exist() -> None:
    with pytest.raises(BillhookError, match=r"No method 'wnda' \(did you mean 'wanda'\?\): there are disp-llm,"):
        bh.method("wnda")
