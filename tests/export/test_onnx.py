"""ONNX files: what they compute, what lies beside them, and what is left when something goes wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.errors import BillhookError
from billhook.export import onnx as exporting
from billhook.export.folder import assemble
from billhook.export.onnx import export_onnx
from billhook.surgery.shrink import drop_attention_, drop_mlp_, keep_neurons_, keep_reads_, keep_writes_
from billhook.surgery.slim import refresh, slim_
from tiny import VOCABULARY, batches_for, build, tiny_tokenizer

needs_runtime = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra 'onnx'",
)


def _folder(kind: str, folder: Path) -> Path:
    model: Any = build("llama" if kind in ("slim", "sliced", "indexed") else kind)
    if kind == "slim":
        slim_(model)
        for block, neurons in zip(model.model.layers, (16, 32, 48), strict=True):
            keep_neurons_(block, torch.arange(neurons))
        drop_attention_(model.model.layers[1])
        drop_mlp_(model.model.layers[2])
        refresh(model)
    if kind == "indexed":
        slim_(model)
        for index, block in enumerate(model.model.layers):
            keep_neurons_(block, torch.arange(16))
            for part in ("attention", "mlp"):
                keep_reads_(block, part, torch.arange(index, 32, 2))  # type: ignore[arg-type]
                keep_writes_(block, part, torch.arange(3 - index, 32, 3))  # type: ignore[arg-type]
        refresh(model)
    if kind == "sliced":
        bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for("llama", count=4))
    assemble(model, tiny_tokenizer(), folder)
    return folder


@needs_runtime
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "slim", "sliced", "indexed"])
def test_the_file_computes_what_the_model_computes(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    folder, out = _folder(kind, tmp_path / "model"), tmp_path / "out"
    report = export_onnx(folder, out)
    assert report.path == out / "model.onnx"
    assert report.nbytes == report.path.stat().st_size
    assert report.inputs == ["input_ids"]
    assert report.outputs == ["logits"]
    assert 0 < report.difference <= 1e-4
    assert {"config.json", "tokenizer.json", "model.onnx"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.safetensors"))
    assert not (tmp_path / "out.partial").exists()
    model: Any
    model, _ = bh.load(folder)
    session = onnxruntime.InferenceSession(str(report.path))
    assert session.get_inputs()[0].shape == ["batch", "tokens"]
    for batch, tokens in ((1, 1), (4, 30)):
        ids = torch.randint(3, VOCABULARY, (batch, tokens))
        with torch.no_grad():
            want = model(ids).logits.numpy()
        (got,) = session.run(None, {"input_ids": ids.numpy()})
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@needs_runtime
@pytest.mark.parametrize("kind", ["slim", "indexed", pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_file_with_a_cache_writes_what_the_model_writes(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    folder = _folder(kind, tmp_path / "model")
    report = export_onnx(folder, tmp_path / "out", cache=True)
    assert report.inputs[:4] == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert report.outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    session = onnxruntime.InferenceSession(str(report.path))
    model: Any
    model, _ = bh.load(folder)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 6:]
    past = {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32) for value in session.get_inputs()[2:]
    }
    step, written = ids.numpy(), []
    for count in range(12):
        mask = np.ones((1, 6 + count), np.int64)
        logits, *present = session.run(None, {"input_ids": step, "attention_mask": mask, **past})
        past = dict(zip(past, present, strict=True))
        step = logits[:, -1:].argmax(-1)
        written.append(int(step[0, 0]))
    assert written == want.tolist()


@needs_runtime
def test_large_weights_get_a_file_of_their_own(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_EXTERNAL", 1000)
    report = export_onnx(make_folder("gpt2"), tmp_path / "out")
    data = tmp_path / "out" / "model.onnx.data"
    assert data.is_file()
    assert report.nbytes == report.path.stat().st_size + data.stat().st_size


@needs_runtime
def test_a_file_that_computes_something_else_is_not_kept(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = exporting._trace

    def spoilt(model: Any, past: Any) -> Any:
        program = trace(model, past)
        with torch.no_grad():  # the program shares the weights of the blocks: only the model's copy must change
            weight = model.model.layers[1].mlp.down_proj.weight
            model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight * 1.5)
        return program

    monkeypatch.setattr(exporting, "_trace", spoilt)
    with pytest.raises(BillhookError, match="something else than PyTorch"):
        export_onnx(make_folder("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@needs_runtime
def test_the_first_block_that_differs_is_named(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any
    model, _ = bh.load(make_folder("llama"))
    session = exporting._session

    class Spoilt:
        """A runtime whose second block is wrong."""

        def __init__(self, path: Path) -> None:
            self.session = session(path)

        def run(self, names: Any, feed: Any) -> list[Any]:
            outputs: list[Any] = self.session.run(names, feed)
            return [output * (1.5 if index >= 2 else 1.0) for index, output in enumerate(outputs)]

    monkeypatch.setattr(exporting, "_session", Spoilt)
    with torch.no_grad():
        assert exporting._first_block(tmp_path / "model.onnx", model) == ", first in the output of block 1"


@needs_runtime
def test_what_cannot_be_exported_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="only causal language models"):
        export_onnx(make_folder("vit", "vit"), tmp_path / "out")
    with pytest.raises(BillhookError, match="No model"):
        export_onnx(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("keep")
    with pytest.raises(BillhookError, match="was not written by billhook"):
        export_onnx(make_folder("llama"), tmp_path / "mine")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "file.txt").is_file()


def test_a_missing_package_is_named(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(BillhookError, match=r"needs onnxruntime: pip install 'billhook\[onnx\]'"):
        export_onnx(make_folder("llama"), tmp_path / "out")
