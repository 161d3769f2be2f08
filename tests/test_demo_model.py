"""The real model: quality order, files, the command line, memory. Minutes of work: run with -m slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import billhook as bh

pytestmark = pytest.mark.slow


@cache
def text() -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    _, tokenizer = bh.load("demo", stream=True)
    batches = bh.calibration("demo", tokenizer, samples=24, length=256)
    return tokenizer, batches, bh.evaluation("demo", tokenizer, length=256, windows=16)


@cache
def perplexity(name: str = "", target: float | str = 0.0) -> float:
    """Of the demo model, pruned; the first ten blocks only, which keeps it short and in a sane range."""
    _, batches, windows = text()
    model, _ = bh.load("demo")
    if name:
        options = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
        blocks = model.get_submodule("model").layers
        model.get_submodule("model").layers = torch.nn.ModuleList(list(blocks)[:10])
        bh.prune(model, bh.method(name, **options), batches)
        model.get_submodule("model").layers = blocks
    return bh.perplexity(model, windows)


@pytest.mark.smoke
def test_dense_model_is_sane() -> None:
    assert 10 < perplexity() < 35


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_more_sparsity_costs_more(name: str) -> None:
    values = [perplexity(name, s) for s in (0.3, 0.5, 0.7)]
    assert perplexity() * 0.99 < values[0] <= values[1] <= values[2]


@pytest.mark.parametrize("sparsity", [pytest.param(0.5, marks=pytest.mark.smoke), 0.6])
def test_wanda_beats_magnitude(sparsity: float) -> None:
    assert perplexity("wanda", sparsity) < perplexity("magnitude", sparsity)


def test_sparsegpt_beats_wanda_at_sixty_percent_and_under_2_4() -> None:
    assert perplexity("sparsegpt", 0.6) < 0.92 * perplexity("wanda", 0.6)
    assert perplexity("sparsegpt", "2:4") < perplexity("wanda", "2:4")


def test_2_4_costs_more_than_unstructured_half() -> None:
    for name in ("wanda", "sparsegpt"):
        assert perplexity(name, "2:4") > perplexity(name, 0.5)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "billhook", *arguments], capture_output=True, text=True, check=True, timeout=900
    )


@pytest.mark.smoke
def test_command_line_end_to_end(tmp_path: Path) -> None:
    """Prune to compressed storage, export, and load the export where billhook cannot be imported."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    done = run(
        *("prune", "demo", "--method", "wanda", "--pattern", "2:4", "--out", str(out), "--samples", "8"),
        *("--dtype", "bfloat16", "--storage", "compressed", "--eval-windows", "2", "--json"),
    )
    report = json.loads(done.stdout)
    assert report["after"]["perplexity"] > report["before"]["perplexity"]
    # the demo model's own quantization left a few zeros of its own
    assert report["steps"][0]["sites"][0]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert len(report["steps"][0]["blocks"]) == 30
    for name in ("config.json", "tokenizer.json", "billhook.json", "report.html", "README.md"):
        assert (out / name).is_file(), name
    run("export", str(out), "--out", str(plain))
    pruned = sum(s["shape"][0] * s["shape"][1] for s in report["steps"][0]["sites"])
    saved = (plain / "model.safetensors").stat().st_size - (out / "model.billhook.safetensors").stat().st_size
    assert (2 * pruned - saved) / (2 * pruned) <= 0.58  # bytes of the pruned matrices, compressed over dense
    script = (
        "import sys; sys.modules['billhook'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(plain)!r}); t = AutoTokenizer.from_pretrained({str(plain)!r})\n"
        "w = m.model.layers[3].mlp.up_proj.weight\n"
        "assert ((w.view(-1, 4) == 0).sum(1) >= 2).all() and m.dtype == torch.bfloat16\n"
        "ids = t('The capital of France is', return_tensors='pt')\n"
        "print(t.decode(m.generate(**ids, max_new_tokens=5, do_sample=False)[0]))\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert said.stdout.startswith("The capital of France is")


@pytest.mark.smoke
def test_memory_limit_is_kept(tmp_path: Path) -> None:
    limit = 1_000_000_000
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "billhook", "prune", "demo", "--method", "wanda", "--sparsity", "0.5", "--no-eval"),
            *("--out", str(tmp_path / "out"), "--samples", "8", "--max-memory", str(limit), "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
        env=environment,
    )
    assert json.loads(done.stdout)["peak_memory"] < limit
