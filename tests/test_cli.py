"""The command line: happy paths, and every mistake ends in one sentence, exit code 2 and nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import billhook as bh
from billhook import cli, progress
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate import journal
from billhook.methods import methods
from billhook.models.checkpoint import COMPRESSED
from billhook.models.files import DiskFull
from billhook.surgery.shrink import keep_hidden_, keep_neurons_
from billhook.surgery.slim import slim_
from tiny import build, weights_of, write_text

MakeFolder = Callable[..., Path]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """All of stdout as one JSON object; NaN and Infinity are no JSON."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        value = json.loads(self.out, parse_constant=refuse)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one sentence on stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("Error: ")
        return lines[0]


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Call]:
    """call("prune", ...) as the console script runs it, in a folder of its own."""
    verbosity = transformers.logging.get_verbosity()
    level = logging.getLogger("billhook").level
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["billhook", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        code = stopped.value.code
        assert "Traceback" not in captured.err
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    yield run
    progress.enable(False)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    logging.getLogger("billhook").setLevel(level)


def short(corpus: Path) -> list[str]:
    """Data options that make a command quick."""
    calibration = ["--data", f"text:{corpus}", "--samples", "8", "--length", "16"]
    return [*calibration, "--eval-length", "16", "--eval-windows", "4"]


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}


def edit_weights(folder: Path, **values: Any) -> None:
    """edit_weights(folder, **{name: value}) fills a tensor's first entries, or all with a function."""
    weights = load_file(folder / "model.safetensors")
    for name, value in values.items():
        weights[name] = value(weights[name]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all(
        torch.equal(one[k].reshape(-1).view(torch.uint8), two[k].reshape(-1).view(torch.uint8)) for k in one
    )


def sparsity_of(folder: Path) -> float:
    weights = [t for k, t in load_file(folder / "model.safetensors").items() if "proj" in k]
    return 1 - sum(int(torch.count_nonzero(t)) for t in weights) / sum(t.numel() for t in weights)


# -- pruning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_prune(method: str, call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    done = call("prune", make_folder(), "--method", method, "--sparsity", 0.5, "--out", "x", *short(corpus))
    assert done.code == 0, done.err
    assert "Written: x\n" in done.out
    assert sparsity_of(Path("x")) == pytest.approx(0.5, abs=1e-6)
    report = bh.Report.read(Path("x"))
    assert report.before is not None
    assert report.after is not None
    assert report.recipe[0]["method"] == method
    assert {p.name for p in Path().iterdir()} == {"x"}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained("x")
    assert all(torch.isfinite(p).all() for p in reloaded.parameters())


def test_prune_is_what_the_library_does(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    assert call("prune", folder, "-m", "wanda", "--sparsity", 0.5, "-o", "x", "--seed", 3, *short(corpus)).code == 0
    model, tokenizer = bh.load(folder)
    batches = bh.calibration(f"text:{corpus}", tokenizer, samples=8, length=16, seed=3)
    bh.prune(model, bh.Wanda(sparsity=0.5), batches)
    written = load_file("x/model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in weights_of(model).items())


def test_prune_24(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    done = call("prune", make_folder(), "-m", "wanda", "--pattern", "2:4", "-o", "x", "--no-eval", *short(corpus))
    assert done.code == 0, done.err
    weight = load_file("x/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()


def test_an_encoder_is_pruned_on_text_and_not_measured(
    call: Call, make_folder: MakeFolder, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder("bert")
    for method, goal in (("wanda", "--sparsity"), ("fasp", "--target-size"), ("fasp", "--target-flops")):
        out = f"{method}{goal}"
        done = call("prune", folder, "-m", method, goal, 0.8, "-o", out, *short(corpus))
        assert done.code == 0, done.err
        assert caplog.messages == [
            "BertForMaskedLM predicts no next token: its quality, a perplexity, is not measured."
        ]
        caplog.clear()
        report = bh.Report.read(Path(out))
        assert (report.before, report.after) == (None, None)
        assert report.calibration is not None
        assert "quality of the pruned model was not measured" in (Path(out) / "README.md").read_text()
    assert call("prune", folder, "-m", "wanda", "-o", "quiet", "--no-eval", *short(corpus)).code == 0
    assert not caplog.messages
    asked = call("eval", folder, "--data", f"text:{corpus}")
    assert asked.code == 2
    assert "is not a language model with a tokenizer, so it has no perplexity" in asked.error
    table = call("compare", folder, "--methods", "wanda", "--sparsity", 0.5, "-o", "table", *short(corpus))
    assert table.code == 2
    assert "A comparison needs perplexities: use a language model" in table.err


def test_two_goals_are_one_too_many(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    goals = ["--sparsity", 0.25, "--target-flops", 0.8]
    done = call("prune", make_folder(), "-m", "fasp", *goals, "-o", "x", *short(corpus))
    assert done.code == 2
    assert done.error == (
        "Error: Method fasp: sparsity and target_flops both say how much to remove: leave one of them out."
    )
    done = call("prune", make_folder(), "-m", "shortgpt", "--target-flops", 0.8, "-o", "x", *short(corpus))
    assert done.code == 2
    assert "target_flops=0.8 cannot be reached: the nearest that ShortGPT comes to is" in done.error
    assert not Path("x").exists()


def test_the_recorded_recipe_of_a_target_runs_again(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    options = ["-m", "fasp", "--target-size", 0.8, "-o", "x", *short(corpus)]
    assert call("prune", make_folder(), *options).code == 0
    text = (Path("x") / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    Path("recipe.yaml").write_text(text)
    done = call("run", "recipe.yaml", "--out", "y")
    assert done.code == 0, done.err
    assert (Path("x") / "model.safetensors").read_bytes() == (Path("y") / "model.safetensors").read_bytes()


def test_prune_without_data_options_of_a_vision_model(call: Call, make_folder: MakeFolder) -> None:
    done = call("prune", make_folder("vit"), "-m", "magnitude", "--sparsity", 0.25, "-o", "x", "--json", "-q")
    assert done.code == 0, done.err
    assert done.json["before"] is None
    wrong = call("prune", Path("../model"), "-m", "magnitude", "--pattern", "3:5", "-o", "y", "-q")
    assert "does not divide" in wrong.error
    assert {p.name for p in Path().iterdir()} == {"x"}


def test_json_is_one_object_on_stdout(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    done = call("prune", make_folder(), "-m", "wanda", "--sparsity", 0.5, "-o", "x", "--json", *short(corpus))
    assert done.code == 0, done.err
    assert done.json["out"] == "x"
    assert done.json["steps"][0]["method"] == "wanda"
    assert done.json["after"]["perplexity"] > 1


def test_quiet_says_nothing(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    done = call("prune", make_folder(), "-m", "wanda", "--sparsity", 0.5, "-o", "x", "-q", *short(corpus))
    assert (done.code, done.out, done.err) == (0, "", "")


def test_paths_are_printed_as_they_are(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    """Neither wrapped at the width of a terminal nor taken for markup."""
    name = "[bold]" + "x" * 90
    done = call("prune", make_folder(), "-m", "magnitude", "-o", name, "--no-eval", *short(corpus))
    assert f"Written: {name}\n" in done.out
    again = call("prune", make_folder("gpt2", "other"), "-m", "magnitude", "-o", name, "--no-eval", *short(corpus))
    assert name in again.error


def test_the_same_command_again_changes_nothing(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    command = ["prune", make_folder(), "-m", "wanda", "--sparsity", 0.5, "-o", "x", *short(corpus)]
    assert call(*command).code == 0
    before = snapshot(Path("x"))
    again = call(*command)
    assert again.code == 0
    assert "Already there: x" in again.out
    assert snapshot(Path("x")) == before
    assert {p.name for p in Path().iterdir()} == {"x"}
    assert call(*command, "--json").json["out"] == "x"


def test_another_command_is_refused_unless_forced(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    assert call("prune", folder, "-m", "wanda", "--sparsity", 0.5, "-o", "x", *short(corpus)).code == 0
    before = snapshot(Path("x"))
    other = ["prune", folder, "-m", "wanda", "--sparsity", 0.25, "-o", "x", *short(corpus)]
    refused = call(*other)
    assert refused.code == 2
    assert "another billhook command" in refused.error
    assert "--force" in refused.error
    assert snapshot(Path("x")) == before
    assert call(*other, "--force").code == 0
    assert sparsity_of(Path("x")) == pytest.approx(0.25, abs=0.01)
    assert {p.name for p in Path().iterdir()} == {"x"}


def test_memory_limit_changes_no_bit(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    command = ["prune", folder, "-m", "sparsegpt", "--sparsity", 0.5, "--precision", "highest", *short(corpus)]
    assert call(*command, "-o", "x", "--max-memory", "64GB").code == 0
    assert sparsity_of(Path("x")) == pytest.approx(0.5, abs=0.01)


def test_compressed_storage_and_back(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    command = ["prune", make_folder(), "-m", "magnitude", "--sparsity", 0.75, "--no-eval", *short(corpus)]
    assert call(*command, "-o", "dense").code == 0
    assert call(*command, "-o", "small", "--storage", "compressed").code == 0
    assert not Path("small/model.safetensors").exists()
    assert Path("small", COMPRESSED).stat().st_size < 0.7 * Path("dense/model.safetensors").stat().st_size
    done = call("export", "small", "--format", "hf")
    assert done.code == 0, done.err
    assert "Written: small-hf" in done.out
    assert same_weights(Path("dense"), Path("small-hf"))
    assert bh.Report.read(Path("small-hf")).storage == "dense"
    assert call("export", "small", "-o", "plain", "--json").json == {"out": "plain", "format": "hf"}
    evaluate = ["--data", f"text:{corpus}", "--length", "16", "--windows", "4", "--json"]
    values = {call("eval", name, *evaluate).json["perplexity"] for name in ("dense", "small", "plain")}
    assert len(values) == 1


def test_export_of_the_working_folder(call: Call, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder()
    monkeypatch.chdir(folder)
    assert call("export", ".").code == 0
    assert (folder.parent / "model-hf" / "model.safetensors").is_file()


# -- the other commands -----------------------------------------------------------------------------------


def test_eval(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    command = ["eval", folder, "--data", f"text:{corpus}", "--length", 16, "--windows", 4]
    value = call(*command, "--json").json
    assert (value["windows"], value["length"], value["tokens"]) == (4, 16, 60)
    model, tokenizer = bh.load(folder)
    windows = bh.evaluation(f"text:{corpus}", tokenizer, length=16, windows=4)
    assert value["perplexity"] == pytest.approx(bh.perplexity(model, windows), rel=1e-6)
    assert f"perplexity {value['perplexity']:.4f}" in call(*command).out
    quiet = call(*command, "-q")
    assert (float(quiet.out), quiet.err) == (pytest.approx(value["perplexity"], rel=1e-5), "")
    every = call(*command[:-1], 0, "--json").json["windows"]
    assert every == call(*command[:-1], 10_000, "--json").json["windows"] > 4


def test_eval_of_a_hopeless_model_is_still_json(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder("mistral")
    edit_weights(folder, **{"lm_head.weight": lambda t: t * 1e5})
    done = call("eval", folder, "--data", f"text:{corpus}", "--length", 16, "--windows", 4, "--json")
    assert done.code == 0, done.err
    assert done.json["perplexity"] == "Infinity"


RECIPE = """\
model: {model}
out: two
data: text:{corpus}
samples: 8
length: 16
eval_length: 16
eval_windows: 4
steps:
  - method: wanda
    sparsity: 0.25
  - method: sparsegpt
    sparsity: 0.5
"""


def test_recipe_of_two_steps(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    Path("r.yaml").write_text(RECIPE.format(model=make_folder(), corpus=corpus))
    done = call("run", "r.yaml", "--json")
    assert done.code == 0, done.err
    assert [step["method"] for step in done.json["steps"]] == ["wanda", "sparsegpt"]
    assert sparsity_of(Path("two")) == pytest.approx(0.5, abs=0.01)
    assert "Already there: two" in call("run", "r.yaml").out
    assert call("run", "r.yaml", "--seed", 1).code == 2
    assert call("run", "r.yaml", "--seed", 1, "-o", "other").code == 0
    assert not same_weights(Path("two"), Path("other"))


def compare_command(folder: Path, corpus: Path) -> list[object]:
    options = ["--methods", "magnitude,wanda", "--sparsity", "0.5", "--pattern", "2:4", "-o", "t"]
    return ["compare", folder, *options, *short(corpus)]


def test_compare(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    command = compare_command(make_folder(), corpus)
    done = call(*command)
    assert done.code == 0, done.err
    assert {p.name for p in Path().iterdir()} == {"t"}
    before = snapshot(Path("t"))
    again = call(*command)
    assert "Already there: " in again.out
    assert snapshot(Path("t")) == before
    cells = call(*command, "--json").json["cells"]
    expected = [("magnitude", "0.5"), ("magnitude", "2:4"), ("wanda", "0.5"), ("wanda", "2:4")]
    assert [(c["method"], c["target"]) for c in cells] == expected
    assert all(c["sparsity"] == pytest.approx(0.5, abs=1e-6) for c in cells)
    assert len({c["perplexity"] for c in cells}) == 4


def test_a_comparison_that_was_interrupted_keeps_its_cells(
    call: Call, make_folder: MakeFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compare_command(make_folder(), corpus)
    steps = __import__("billhook.compare", fromlist=["run_steps"]).run_steps
    made: list[str] = []

    def counting(model: Any, methods: Any, *rest: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(methods[0].name)
        return steps(model, methods, *rest)

    monkeypatch.setattr("billhook.compare.run_steps", counting)
    stopped = call(*command)
    assert stopped.code == 130
    assert "Interrupted: run the same command again to go on." in stopped.err
    assert not Path("t").exists()
    cell = Path("t.partial/magnitude-0.5.json")
    value = json.loads(cell.read_text())
    cell.write_text(json.dumps({**value, "perplexity": 12345.0}))  # seen again only if it is not made again

    made.clear()
    monkeypatch.setattr("billhook.compare.run_steps", lambda *a: (made.append("more"), steps(*a))[1])
    done = call(*command, "--json")
    assert done.code == 0, done.err
    assert made == ["more", "more"]
    assert done.json["cells"][0]["perplexity"] == 12345.0
    assert {p.name for p in Path().iterdir()} == {"t"}


def test_a_prune_folder_is_not_overwritten_by_a_comparison(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    assert call("prune", folder, "-m", "magnitude", "-o", "t", "--no-eval", *short(corpus)).code == 0
    assert "another billhook command" in call(*compare_command(folder, corpus)).error


def test_a_composition(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    options = ["--method", "wanda", "--density", "0.4", "--allocation", "ecoflap(samples=2, length=8)"]
    options += ["--refine", "dsnot(modules=all)", "--recover", "perp(training_steps=2, rank=2)", "--json"]
    done = call("prune", make_folder(), "--out", "out", *options, *short(corpus))
    assert done.code == 0
    first, second = done.json["steps"]
    assert first["options"]["allocation"] == "ecoflap(samples=2, length=8)"
    assert second["method"] == "perp"
    total = sum(site["shape"][0] * site["shape"][1] for site in first["sites"])
    for step in (first, second):
        zeros = sum(site["sparsity"] * site["shape"][0] * site["shape"][1] for site in step["sites"])
        assert zeros / total == pytest.approx(0.6, abs=0.02)


def test_icbs_with_a_budget(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    options = ["--method", "icbs", "--density", "0.5", "--variables", "64", "--tokens", "16"]
    done = call("prune", make_folder(), "--out", "a", *options, "--budget", "2s", "--json", *short(corpus))
    assert done.code == 0
    assert not done.json["steps"][0]["notes"]
    nothing = call("prune", make_folder(), "--out", "b", *options, "--budget", "0s", *short(corpus))
    assert nothing.code == 0
    assert "too small for one step" in nothing.out


def test_training_on_the_evaluation_text_is_refused_unless_forced(
    call: Call, make_folder: MakeFolder, corpus: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both.txt"  # its calibration part holds what the other's evaluation part holds
    text = corpus.read_text()
    both.write_text(text[len(text) // 2 :] + text[: len(text) // 2])
    options = ["--method", "magnitude", "--recover", "perp(training_steps=1, rank=2)", "--out", "out"]
    options += ["--data", f"text:{both}", "--samples", "64", "--length", "32", "--eval-data", f"text:{corpus}"]
    options += ["--eval-length", "32", "--eval-windows", "0"]
    refused = call("prune", make_folder(), *options)
    assert refused.code == 2
    assert re.search(r"\d+% of the calibration text is also in the evaluation text", refused.error)
    assert not Path("out").exists()
    assert call("prune", make_folder(), *options, "--force").code == 0


@pytest.fixture
def taught(make_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of a tiny model that is better than guessing, and the text it knows."""
    text = tmp_path / "known.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7 w8 " * 800, encoding="utf-8")
    folder = make_folder()
    model, _ = bh.load(str(folder))
    ids = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]).repeat(4)[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder, text


def test_sparsity_curve(call: Call, taught: tuple[Path, Path]) -> None:
    folder, corpus = taught
    options = ["--grid", "0.2,0.5,0.8", "--rho", "0.1", "--pattern", "2:4", *short(corpus)]
    done = call("sparsity-curve", folder, "--out", "curve", *options, "--json")
    assert done.code == 0
    points = done.json["curve"]["points"]
    assert {0.0, 0.2} <= {point["sparsity"] for point in points}
    assert done.json["nm_points"][0]["pattern"] == "2:4"
    assert {path.name for path in Path("curve").iterdir()} >= {"index.html", "curve.csv", "curve.json"}
    again = call("sparsity-curve", folder, "--out", "curve", *options)
    assert again.code == 0
    assert "Already there" in again.out


def test_an_impossible_grid_is_refused_before_any_work(
    call: Call, taught: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a point was evaluated")

    monkeypatch.setattr("billhook.curve.evaluate", worked)
    folder, corpus = taught
    done = call("sparsity-curve", folder, "--out", "curve", "--grid", "0.2,1.0", *short(corpus))
    assert done.code == 2
    assert "sparsity=1.0 is not possible" in done.err


def test_an_interrupted_curve_keeps_its_points(
    call: Call, taught: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from billhook import curve

    folder, corpus = taught
    options = ["--grid", "0.2,0.5,0.8", "--rho", "0.1", *short(corpus)]
    real, calls = curve.evaluate, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(curve, "evaluate", failing)
    assert call("sparsity-curve", folder, "--out", "curve", *options).code == 130
    calls = 100
    monkeypatch.setattr(curve, "evaluate", real)
    finished = call("sparsity-curve", folder, "--out", "curve", *options, "--json")
    whole = call("sparsity-curve", folder, "--out", "whole", *options, "--json")
    assert finished.json["curve"]["points"] == whole.json["curve"]["points"]
    assert finished.json["matrices"] == whole.json["matrices"]


def test_compare_takes_compositions(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    names = "wanda(refine=dsnot(cycles=2, modules=all)),magnitude+perp(training_steps=2, rank=2)"
    done = call(
        "compare", make_folder(), "--methods", names, "--sparsity", "0.5", "--out", "t", "--json", *short(corpus)
    )
    assert done.code == 0
    assert [cell["method"] for cell in done.json["cells"]] == [
        "wanda(refine=dsnot(cycles=2, modules=all))",
        "magnitude+perp(training_steps=2, rank=2)",
    ]


def test_methods(call: Call) -> None:
    listed = call("methods")
    assert listed.code == 0
    for name in methods():
        assert name in listed.out
    assert [m["method"] for m in call("methods", "--json").json["methods"]] == list(methods())


@pytest.mark.parametrize("name", list(methods()))
def test_method_cards(name: str, call: Call) -> None:
    shown = call("methods", name)
    assert shown.code == 0
    assert "When to use it" in shown.out
    value = call("methods", name, "--json").json
    assert [option["name"] for option in value["options"]] == list(methods()[name].model_fields)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_inspect(family: str, call: Call, make_folder: MakeFolder) -> None:
    folder = make_folder(family)
    shown = call("inspect", folder)
    assert shown.code == 0, shown.err
    assert family in shown.out
    value = call("inspect", folder, "--json").json
    assert value["blocks"] == 3
    model = getattr(transformers, value["architecture"]).from_pretrained(folder)
    assert value["parameters"] == sum(p.numel() for p in model.parameters())
    assert ("wanda" in value["methods"]) == (family != "vit")


def test_inspect_tells_the_widths_of_a_narrowed_model(call: Call, tmp_path: Path) -> None:
    model: Any = build("llama")
    neurons, width = model.config.intermediate_size, model.config.hidden_size
    slim_(model)
    blocks: Any = find_blocks(model, anatomy_of(model))
    keep_neurons_(blocks[1], torch.arange(neurons - 4))
    keep_hidden_(model, torch.arange(width - 8))
    bh.save(model, None, tmp_path / "narrow")
    value = call("inspect", tmp_path / "narrow", "--json").json
    assert value["groups"]["neurons"] == [neurons - 4, neurons]
    assert value["groups"]["hidden dimensions"] == width - 8
    shapes = {site["projection"]: site["shape"] for site in value["sites"]}
    assert shapes["mlp.down_proj"] == [width - 8, [neurons - 4, neurons]]
    shown = call("inspect", tmp_path / "narrow")
    assert f"neurons {neurons - 4} to {neurons}" in " ".join(shown.out.split())


def test_version_of_the_script_and_help() -> None:
    """The one test of the console script itself."""
    script = [sys.executable, "-c", "from billhook.cli import main; main()"]
    shown = subprocess.run([*script, "prune", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--sparsity" in re.sub(r"\x1b\[[0-9;]*m", "", shown.stdout)
    wrong = subprocess.run([*script, "prune", "x", "--sparsty", "1"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.strip().splitlines() == [
        "Error: No option '--sparsty' (did you mean '--sparsity'?); see '-c prune --help'."
    ]


@pytest.mark.parametrize("arguments", ["methods wanda --json", "methods --json"])  # less and more than a buffer
def test_a_reader_that_leaves_early_is_no_trouble(arguments: str) -> None:
    script = f"{sys.executable} -c 'from billhook.cli import main; main()' {arguments} | true"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_no_arguments_is_help(call: Call) -> None:
    done = call()
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "prune" in done.out + done.err


# -- mistakes in the command ------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "method": (["-m", "wnda"], r"No method 'wnda' \(did you mean 'wanda'\?\)"),
    "option": (["--sparsty", "0.5"], r"No option '--sparsty' \(did you mean '--sparsity'\?\)"),
    "all": (["--sparsity", "1.0"], r"sparsity=1\.0 is not possible: input should be less than 1"),
    "negative": (["--sparsity", "-0.1"], r"sparsity=-0\.1 is not possible"),
    "nan": (["--sparsity", "nan"], "sparsity=nan is not possible"),
    "inf": (["--sparsity", "inf"], "sparsity=inf is not possible"),
    "text": (["--sparsity", "half"], "'--sparsity'.*valid (float|number)"),
    "conflict": (["--pattern", "2:4", "--sparsity", "0.6"], r"sparsity 0\.6 is not reachable under pattern 2:4"),
    "not dividing": (["--pattern", "3:5"], r"Pattern 3:5 does not divide the 32 inputs of model\.layers\.0\.self_attn"),
    "pattern": (["--pattern", "2/4"], "Pattern '2/4' is not known"),
    "pattern upside down": (["--pattern", "4:2"], "1 <= N <= M"),
    "option of another method": (["--damping", "0.1"], "Method wanda has no option 'damping'"),
    "allocation": (["--allocation", "unform"], r"No allocation 'unform' \(did you mean 'uniform'\?\)"),
    "scope": (["--scope", "rows"], "scope='rows' is not possible"),
    "too much memory asked": (["--max-memory", "1KB"], "--max-memory 1e-06 GB is too little: one block of this model"),
    "memory": (["--max-memory", "lots"], "'lots' is not an amount of memory: write for example 2GB"),
    "memory zero": (["--max-memory", "0"], "'0' is not an amount of memory"),
    "device": (["--device", "gpu0"], "'gpu0' is not a device: use auto, cpu, cuda"),
    "device that is not here": (["--device", "xla"], "Device 'xla' is not available on this machine"),
    "dtype": (["--dtype", "int4"], "'int4' is not a dtype: use auto, float32"),
    "precision": (["--precision", "low"], "precision='low' is not possible"),
    "storage": (["--storage", "zip"], "storage='zip' is not possible"),
    "length": (["--length", "65"], "length=65 is more than the 64 positions of the model: use at most 64"),
    "eval length": (["--eval-length", "65"], "eval_length=65 is more than the 64 positions"),
    "length one": (["--length", "1"], "length=1 is not possible"),
    "samples": (["--samples", "0"], "samples=0 is not possible"),
    "seed": (["--seed", "99999999999999999999"], "seed=99999999999999999999 is not possible"),
    "negative seed": (["--seed", "-1"], "seed=-1 is not possible"),
    "windows": (["--eval-windows", "-3"], "eval_windows=-3 is not possible: give at least 1, or for all"),
    "too many samples": (["--samples", "9999"], r"has \d+ tokens, but 9999 different windows of 16 tokens need"),
    "data": (["--data", "wikitex2"], r"Unknown text source 'wikitex2' \(did you mean 'wikitext2'\?\)"),
    "data path": (["--data", "text:no.txt"], "There is no file no.txt"),
    "data nothing": (["--data", "text:"], "names no file"),
    "eval data path": (["--eval-data", "text:no.txt"], "There is no file no.txt"),
    "data on the hub": (["--data", "wikitext2"], "text:PATH"),
    "recovery that removes": (["--recover", "wanda"], "Method wanda removes weights and repairs nothing"),
    "recovery half-written": (["--recover", "perp(rank="], r"In 'perp\(rank=' a parenthesis is open"),
    "value missing": (["--sparsity"], "'--sparsity' requires an argument"),
    "too many words": (["another"], r"unexpected extra argument\(?s?\)? \(another\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    mistake: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    extra, match = MISTAKES[mistake]
    done = call("prune", make_folder(), "-m", "wanda", "-o", "x", "-q", *short(corpus), *extra)
    assert done.code == 2
    assert re.search(match, done.error)
    assert done.out == ""
    assert list(Path().iterdir()) == []


def test_mistakes_with_bars_on_say_the_sentence_last(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    edit_weights(folder, **{"model.layers.2.mlp.up_proj.weight": with_nan})
    done = call("prune", folder, "-m", "wanda", "-o", "x", *short(corpus))
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("Error: Tensor 'model.layers.2.mlp.up_proj.weight'")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", [".", "..", "/", "../work"])
def test_the_working_folder_as_out(
    name: str, force: list[str], call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    Path("thesis.tex").write_text("mine")
    done = call("prune", make_folder(), "-m", "wanda", "-o", name, *short(corpus), *force)
    assert done.code == 2
    assert "working folder" in done.error
    assert Path("thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
def test_out_that_is_taken(kind: str, call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    place = Path("x")
    if kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    else:
        place.write_text("mine")
    out = place / "y" if kind == "below a file" else place
    done = call("prune", make_folder(), "-m", "wanda", "-o", out, *short(corpus))
    assert done.code == 2
    assert re.search("choose another --out", done.error)
    assert [p.name for p in Path().iterdir()] == ["x"]
    assert (place / "thesis.tex" if kind == "folder" else place).read_text() == "mine"


def test_out_that_is_the_model(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    folder = make_folder()
    before = snapshot(folder)
    for force in ([], ["--force"]):
        done = call("prune", folder, "-m", "wanda", "-o", folder, *short(corpus), *force)
        assert done.code == 2
        assert "choose another --out" in done.error
    assert snapshot(folder) == before


def test_foreign_partial_folder(call: Call, make_folder: MakeFolder, corpus: Path) -> None:
    Path("x.partial").mkdir()
    Path("x.partial/thesis.tex").write_text("mine")
    for command in ("prune", "export"):
        extra = ["-m", "wanda", *short(corpus)] if command == "prune" else []
        done = call(command, make_folder(), "-o", "x", "--force", *extra)
        assert done.code == 2
        assert "x.partial is in the way" in done.error
    assert Path("x.partial/thesis.tex").read_text() == "mine"


# -- models that are not right ----------------------------------------------------------------------------


def damaged_model(kind: str, make_folder: MakeFolder) -> tuple[object, str]:
    """A model argument, and what must be said of it."""
    if kind == "missing shard":
        folder = make_folder(max_shard_size="20KB")
        sorted(folder.glob("*.safetensors"))[1].unlink()
        return folder, "lacks 1 of .* weight shards"
    if kind == "truncated shard":
        folder = make_folder(max_shard_size="20KB")
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-10])
        return folder, "is truncated"
    if kind == "longer shard":
        folder = make_folder()
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"x" * 200)
        return folder, "has 200 bytes behind its last tensor"
    if kind == "another shape":
        folder = make_folder()
        edit_weights(folder, **{"model.layers.1.mlp.up_proj.weight": lambda t: t[:40].clone()})
        return (
            folder,
            r"the tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is 40 x 32, and its config\.json makes it 48 x 32",
        )
    if kind == "nan in a later block":
        folder = make_folder()
        edit_weights(folder, **{"model.layers.2.mlp.up_proj.weight": with_nan})
        return folder, r"Tensor 'model\.layers\.2\.mlp\.up_proj\.weight' of the model has NaN or infinite values"
    if kind == "nan in the embeddings":
        folder = make_folder()
        edit_weights(folder, **{"model.embed_tokens.weight": with_nan})
        return folder, r"Tensor 'model\.embed_tokens\.weight' of the model has NaN or infinite values"
    if kind == "overflow":
        folder = make_folder(dtype=torch.float16)
        edit_weights(folder, **{"model.layers.1.mlp.down_proj.weight": lambda t: t.float().mul(2e5).half()})
        return folder, "(block 1|layers.1).* is not finite|layers.1.*NaN or infinite"
    if kind == "undeclared":
        folder = make_folder()
        config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
        transformers.BloomForCausalLM(config).save_pretrained(folder)
        return folder, r"No anatomy is declared for model_type 'bloom'.*bh\.declare"
    if kind == "pickle folder":
        folder = make_folder()
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return folder, r"as a pickle \(pytorch_model\.bin\).*save the model as safetensors first"
    if kind == "pickle file":
        Path("model.pt").write_bytes(b"x")
        return "model.pt", "is a pickle, which can run code"
    if kind == "no tokenizer":
        folder = make_folder()
        for path in folder.glob("tokenizer*"):
            path.unlink()
        return folder, "has no tokenizer beside its weights"
    if kind == "vision":
        return make_folder("vit"), "takes pixel_values, and the command line calibrates on text only.*magnitude"
    if kind == "hub":
        return "owner/name", "the hub could not be reached.*give a local folder or GGUF file, or use 'demo'"
    if kind == "gguf":
        Path("model.gguf").write_bytes(b"hello")
        return "model.gguf", "is not a GGUF file"
    assert kind == "nothing"
    return "nonesuch", "No model 'nonesuch'.*use 'demo'"


DAMAGED = [
    "missing shard",
    "truncated shard",
    "longer shard",
    "another shape",
    "nan in a later block",
    "nan in the embeddings",
    "overflow",
    "undeclared",
    "pickle folder",
    "pickle file",
    "no tokenizer",
    "vision",
    "hub",
    "gguf",
    "nothing",
]


@pytest.mark.parametrize("evaluation", ["--eval", "--no-eval"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_models_that_are_not_right(
    kind: str, evaluation: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    model, match = damaged_model(kind, make_folder)
    before = {p.name for p in Path().iterdir()}
    done = call("prune", model, "-m", "wanda", "-o", "x", "-q", evaluation, *short(corpus))
    assert done.code == 2
    assert re.search(match, done.error)
    assert {p.name for p in Path().iterdir()} == before


@pytest.mark.parametrize("kind", [k for k in DAMAGED if k not in ("vision", "no tokenizer")])
@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_models_that_are_not_right_elsewhere(
    kind: str, command: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    model, match = damaged_model(kind, make_folder)
    if command == "inspect":
        done = call("inspect", model)
        if kind in ("nan in a later block", "nan in the embeddings", "overflow"):
            assert done.code == 0  # weights are not read
            return
    else:
        done = call("eval", model, "-q", "--data", f"text:{corpus}", "--length", 16, "--windows", 4)
    assert done.code == 2
    assert re.search(match, done.error)


def test_numbers_that_overflow_only_while_pruning(
    call: Call, make_folder: MakeFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run, after blocks were finished: what was staged is dropped."""
    propagate = bh.Walk._propagate

    def broken(self: bh.Walk, block: Any) -> Any:
        if block.index == 2 and self.needs == "calibration":
            assert Path("x.partial/step-1/block-00001.json").is_file()
            raise bh.BillhookError("The output of block 2 is not finite: use a wider --dtype.")
        return propagate(self, block)

    monkeypatch.setattr(bh.Walk, "_propagate", broken)
    done = call("prune", make_folder(), "-m", "wanda", "-o", "x", "-q", *short(corpus))
    assert done.code == 2
    assert "block 2 is not finite" in done.error
    assert list(Path().iterdir()) == []


# -- texts and recipes that are not right -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"w1 w2 w3", r"has \d+ tokens, but 8 different windows of 16 tokens need at least 24"),
        (b"", "holds no text"),
        (b" \n\n ", "holds no text"),
        (b"caf\xe9 " * 50, "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "compare"])
def test_texts_that_are_not_right(
    command: str, content: bytes, match: str, call: Call, make_folder: MakeFolder
) -> None:
    text = write_text(Path("../short.txt"))
    text.write_bytes(content)
    options = ["-m", "wanda"] if command == "prune" else ["--methods", "wanda", "--sparsity", "0.5"]
    done = call(command, make_folder(), *options, "-o", "x", "-q", *short(text))
    assert done.code == 2
    assert re.search(match, done.error)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("samples", "sample"), r"r\.yaml, line 4: key 'sample' is not known \(did you mean 'samples'\?\)"),
        (("sparsity: 0.5", "sparsity: 2"), r"r\.yaml, line 12: .*sparsity=2"),
        (
            ("sparsity: 0.5", "sparsty: 0.5"),
            r"r\.yaml, line 12: method sparsegpt has no option 'sparsty' \(did",
        ),
        (("steps", "- steps"), r"r\.yaml, line \d+: this is not YAML"),
        (("samples: 8", "samples: x"), r"r\.yaml, line 4: samples='x' is not possible"),
        (("samples: 8", "device: gpu0"), "'gpu0' is not a device"),
        (("samples: 8", "dtype: int4"), "'int4' is not a dtype"),
        (("two", "."), "is the working folder"),
    ],
)
def test_recipes_that_are_not_right(
    change: tuple[str, str], match: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    Path("r.yaml").write_text(RECIPE.format(model=make_folder(), corpus=corpus).replace(*change))
    done = call("run", "r.yaml", "-q")
    assert done.code == 2
    assert re.search(match, done.error)
    assert [p.name for p in Path().iterdir()] == ["r.yaml"]


def test_a_recipe_that_is_not_there(call: Call) -> None:
    assert "There is no recipe no.yaml" in call("run", "no.yaml").error


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--methods", "wanda,magnitud"], r"No method 'magnitud' \(did you mean 'magnitude'\?\)"),
        (["--methods", "wanda", "--sparsity", "half"], "'half' is neither a sparsity such as 0.5 nor a pattern"),
        (["--methods", "wanda", "--sparsity", "1.5"], "sparsity=1.5 is not possible"),
        (["--methods", "wanda", "--sparsity", ","], "Nothing to compare"),
        (["--methods", " "], "Nothing to compare"),
        (["--methods", "wanda", "--pattern", "3:5"], "does not divide"),
        (["--methods", "wanda", "--eval-windows", "-1"], "eval_windows=-1 is not possible"),
    ],
)
def test_comparisons_that_are_not_right(
    arguments: list[str], match: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    default = [] if "--sparsity" in arguments or "--pattern" in arguments else ["--sparsity", "0.5"]
    done = call("compare", make_folder(), "-o", "t", "-q", *short(corpus), *default, *arguments)
    assert done.code == 2
    assert re.search(match, done.error)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["pruun"], "No such command 'pruun'.*prune"),
        (["methods", "wanda", "--device", "foo"], "'foo' is not a device"),
        (["inspect", "x", "--dtype", "int3"], "'int3' is not a dtype"),
        (["inspect", ""], "No model is named"),
        (["inspect", "demoo"], r"did you mean 'demo'\?"),
        (["methods", "wnda"], r"No method 'wnda' \(did you mean 'wanda'\?\)"),
        (["export", "nonesuch"], "not a Hugging Face model folder"),
        (["export", "x", "--format", "torch"], "'--format'"),
        (["prune"], "Missing argument 'MODEL'"),
        (["prune", "demo"], "Missing option '--method'"),
        (["eval", "nonesuch", "--windows", "1.5"], "'--windows'"),
        (["eval", "~nonesuch-user/x/y"], "No model"),
        (["eval", "x" * 5000], "name too long"),
    ],
)
def test_other_commands_that_are_not_right(arguments: list[str], match: str, call: Call) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert re.search(match, done.error)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--length", "65"], "length=65 is more than the 64 positions"),
        (["--length", "1"], "length is 1, but must be at least 2"),
        (["--windows", "-1"], "windows=-1 is not possible: give at least 1, or 0 for all"),
        (["--max-memory", "lots"], "not an amount of memory"),
        (["--dtype", "int4"], "not a dtype"),
        (["--device", "gpu0"], "not a device"),
        (["--data", "text:no.txt"], "There is no file no.txt"),
    ],
)
def test_evaluations_that_are_not_right(
    arguments: list[str], match: str, call: Call, make_folder: MakeFolder, corpus: Path
) -> None:
    done = call("eval", make_folder(), "-q", "--data", f"text:{corpus}", *arguments)
    assert done.code == 2
    assert re.search(match, done.error)


# -- runs that end early ----------------------------------------------------------------------------------


class FailingAt:
    """`journal.write` that fails at one block."""

    def __init__(self, block: int, error: BaseException) -> None:
        self.block, self.error, self.real = block, error, journal.write

    def __call__(self, file: Path, entries: Any, metadata: Mapping[str, str] | None = None) -> None:
        if file.name == f"block-{self.block:05d}.safetensors":
            raise self.error
        self.real(file, entries, metadata)


@pytest.mark.parametrize("storage", ["dense", "compressed"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_full_disk_loses_nothing(
    method: str, storage: str, call: Call, make_folder: MakeFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    command = ["prune", folder, "-m", method, "--sparsity", 0.5, "-q", "--storage", storage, *short(corpus)]
    assert call(*command, "-o", "whole").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(journal, "write", FailingAt(2, DiskFull("The disk is full: free some room.")))
        full = call(*command, "-o", "x")
        assert full.code == 2
        assert "The disk is full" in full.error
        assert not Path("x").exists()
        assert Path("x.partial/step-1/block-00001.json").is_file()
    done = call(*command, "-o", "x", "--json")
    assert done.code == 0, done.err
    assert done.json["resumed"] is True
    assert not Path("x.partial").exists()
    if storage == "dense":
        assert same_weights(Path("x"), Path("whole"))
    else:
        assert Path("x", COMPRESSED).read_bytes() == Path("whole", COMPRESSED).read_bytes()


def test_an_interrupted_run_goes_on(
    call: Call, make_folder: MakeFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("r.yaml").write_text(RECIPE.format(model=make_folder(), corpus=corpus))
    assert call("run", "r.yaml", "-q", "-o", "whole").code == 0
    real = journal.write

    def stop(file: Path, entries: Any, metadata: Mapping[str, str] | None = None) -> None:
        if file.parent.name == "step-2" and file.name == "block-00001.safetensors":
            raise KeyboardInterrupt
        real(file, entries, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "write", stop)
        stopped = call("run", "r.yaml", "-q")
    assert stopped.code == 130
    assert stopped.err.strip() == "Interrupted: run the same command again to go on."
    assert Path("two.partial").is_dir()
    other = call("run", "r.yaml", "-q", "--seed", 1)
    assert other.code == 2
    assert "unfinished run with other options" in other.error
    done = call("run", "r.yaml", "--json")
    assert done.json["resumed"] is True
    assert same_weights(Path("two"), Path("whole"))
    assert {p.name for p in Path().iterdir()} == {"r.yaml", "two", "whole"}


def test_a_file_that_vanishes_in_the_middle(
    call: Call, make_folder: MakeFolder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    real = journal.write

    def vanish(file: Path, entries: Any, metadata: Mapping[str, str] | None = None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        real(file, entries, metadata)

    monkeypatch.setattr(journal, "write", vanish)
    done = call("prune", folder, "-m", "magnitude", "-o", "x", "-q", "--no-eval", *short(corpus))
    assert done.code == 2
    assert "No such file or directory" in done.error
    assert not Path("x").exists()


# -- smaller models -------------------------------------------------------------------------------------------


def test_a_pruned_width_is_exported_compared_and_pruned_again(
    call: Call, make_folder: MakeFolder, corpus: Path, tmp_path: Path
) -> None:
    folder, out = make_folder("llama"), tmp_path / "f"
    command = ["prune", folder, "--method", "fasp", "--sparsity", 0.25, "--uniform", "--out", out, *short(corpus)]
    told = call(*command, "--json").json
    assert told["size_after"]["parameters"] < told["size_before"]["parameters"]
    assert told["modelling"] is None
    again = call(
        "prune", out, "--method", "slicegpt", "--sparsity", 0.25, "--out", tmp_path / "s", *short(corpus), "-q"
    )
    assert again.code == 0
    assert (tmp_path / "s" / "modeling_slim.py").is_file()
    assert "trust_remote_code=True" in (tmp_path / "s" / "README.md").read_text()
    assert call("eval", tmp_path / "s", "--data", f"text:{corpus}", "--length", 16, "--windows", 2, "-q").code == 0

    refused = call("export", tmp_path / "s", "--format", "gguf", "--no-verify")
    assert refused.code == 2
    assert "layer 0 has a matrix in its residual connection" in refused.error
    assert not list(tmp_path.glob("*.gguf*"))


def test_methods_are_compared_at_equal_size(call: Call, make_folder: MakeFolder, corpus: Path, tmp_path: Path) -> None:
    sizes = ["--methods", "fasp,shortgpt", "--target-size", "0.8,0.7", "--out", tmp_path / "t", *short(corpus)]
    told = call("compare", make_folder("opt"), *sizes, "--json").json
    assert [cell["target"] for cell in told["cells"]] == ["size=0.8", "size=0.7"] * 2
    assert "80% of the size" in (tmp_path / "t" / "index.html").read_text()
    flops = ["--methods", "fasp", "--target-flops", "0.9", "--out", tmp_path / "f", *short(corpus)]
    told = call("compare", make_folder("opt"), *flops, "--json").json
    assert [cell["target"] for cell in told["cells"]] == ["flops=0.9"]
    assert "90% of the FLOPs" in (tmp_path / "f" / "index.html").read_text()
    wrong = call("compare", make_folder("opt"), "--methods", "fasp", "--target-size", "most", "--out", tmp_path / "u")
    assert wrong.code == 2
    assert "'most' is not a fraction" in wrong.error


def test_a_ratio_that_leaves_nothing_is_one_sentence(
    call: Call, make_folder: MakeFolder, corpus: Path, tmp_path: Path
) -> None:
    for method, words in (("fasp", "cannot be removed"), ("shortgpt", "would leave none")):
        done = call(
            "prune", make_folder("llama"), "-m", method, "--sparsity", 0.97, "--out", tmp_path / "n", *short(corpus)
        )
        assert done.code == 2
        assert words in done.error
        assert not list(tmp_path.glob("n*"))


def test_bench_refuses_what_is_not_there(call: Call, tmp_path: Path) -> None:
    done = call("bench", tmp_path / "nothing")
    assert done.code == 2
    assert "nothing" in done.error
