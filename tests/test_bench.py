"""Models measured side by side: what the record says, the formats, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import billhook as bh
from billhook.bench import bench, culprit
from billhook.errors import BillhookError
from billhook.export.folder import assemble
from billhook.measure.worker import Worker
from billhook.report.bench import (
    Bench,
    Culprit,
    Measured,
    Timing,
    notes,
    plot_svg,
    to_csv,
    to_html,
    to_markdown,
    to_rich,
    write,
)
from billhook.surgery.shrink import keep_neurons_
from billhook.surgery.slim import refresh, slim_
from tiny import batches_for, build, tiny_tokenizer

SMALL = {"prompt": 12, "decode": 3, "repeats": 2, "threads": 1}


def _slim(folder: Path) -> Path:
    model = build("llama")
    slim_(model)
    for block, neurons in zip(model.model.layers, (16, 32, 48), strict=True):  # type: ignore[union-attr, arg-type]
        keep_neurons_(block, torch.arange(neurons))
    refresh(model)
    assemble(model, tiny_tokenizer(), folder)
    return folder


def _sliced(folder: Path) -> Path:
    model = build("llama")
    bh.prune(model, bh.method("slicegpt", sparsity=0.25), batches_for("llama", count=4))
    assemble(model, tiny_tokenizer(), folder)
    return folder


def test_models_are_measured_side_by_side(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    names = [str(make_folder("llama")), str(_slim(tmp_path / "slim")), str(_sliced(tmp_path / "sliced"))]
    result = bench(names, out=tmp_path / "out", **SMALL)  # type: ignore[arg-type]
    assert [one.model for one in result.models] == names
    first, slim, sliced = result.models
    for one in result.models:
        assert one.runtime == "PyTorch"
        assert one.dtype == "float32"
        assert len(one.prefill.runs) == len(one.decode.runs) == 2
        assert 0 < one.prefill.low <= one.prefill.seconds <= one.prefill.high
        assert one.prefill.per_second == pytest.approx(12 / one.prefill.seconds)
        assert one.decode.per_second == pytest.approx(3 / one.decode.seconds)
        assert one.memory is not None
        assert one.memory > 0
        assert one.parameters == one.nonzero
    assert first.bytes == (Path(names[0]) / "model.safetensors").stat().st_size
    assert first.prefill_speedup is None
    assert first.share is None
    assert first.flops is not None
    assert slim.flops is not None
    assert first.parameters is not None
    assert slim.parameters is not None
    assert slim.parameters == first.parameters - 3 * 32 * (32 + 16)
    assert slim.flops == first.flops - 2 * 12 * 3 * 32 * (32 + 16)
    assert slim.flops_speedup == pytest.approx(first.flops / slim.flops)
    for one in (slim, sliced):
        assert one.prefill_speedup is not None
        assert one.flops_speedup is not None
        assert one.share == pytest.approx(one.prefill_speedup / one.flops_speedup)
        assert one.share >= 0.85 or one.culprit is not None
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bench.csv", "bench.md", "bench.json", "plot.svg", "index.html"}
    assert Bench.model_validate_json((tmp_path / "out" / "bench.json").read_text(encoding="utf-8")) == result
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(BillhookError, match="exists: choose another --out"):
        bench(names, out=tmp_path / "out", **SMALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_one_model_is_enough(family: str, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(family)
    (one,) = bench([str(folder)], dtype="bfloat16", **SMALL).models  # type: ignore[arg-type]
    assert one.dtype == "bfloat16"
    assert one.prefill_speedup is None
    assert one.share is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"decode": 0}, "decode must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtype": "int3"}, "is not a dtype"),
        ({"prompt": 60, "decode": 5}, "60 tokens and 5 more do not fit the 64 positions"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, object], words: str, make_folder: Callable[..., Path]
) -> None:
    with pytest.raises(BillhookError, match=words):
        bench([str(make_folder("llama"))], **{**SMALL, **options})  # type: ignore[arg-type]


def test_what_is_no_language_model_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="There is no model"):
        bench([])
    with pytest.raises(BillhookError, match="No model"):
        bench([str(tmp_path / "nothing")])
    with pytest.raises(BillhookError, match="only language models"):
        bench([str(make_folder("vit"))])
    with pytest.raises(BillhookError, match="there is no such file"):
        bench([str(tmp_path / "nothing.gguf")])
    if importlib.util.find_spec("xllamacpp") is not None:
        (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
        with pytest.raises(BillhookError, match="is not a GGUF file"):
            bench([str(tmp_path / "broken.gguf")])


def test_a_foreign_folder_is_not_overwritten(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(BillhookError, match="was not written by billhook"):
        bench([str(make_folder("llama"))], out=tmp_path / "out", **SMALL)  # type: ignore[arg-type]
    assert (tmp_path / "out" / "mine.txt").is_file()


def test_memory_that_does_not_suffice_is_told_before_the_work(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("billhook.bench.psutil.virtual_memory", lambda: memory)
    with pytest.raises(BillhookError, match="of memory are free"):
        bench([str(make_folder("llama"))], **SMALL)  # type: ignore[arg-type]


def test_a_process_that_fails_says_why(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("llama")
    (folder / "model.safetensors").write_bytes(b"broken")
    request = {"folder": str(folder), "dtype": "float32", "threads": 1, "prompt": 4, "decode": 1, "seed": 0}
    worker = Worker("this model", request)
    try:
        with pytest.raises(BillhookError, match=r"model\.safetensors"):
            worker.load()
        worker._process.kill()
        with pytest.raises(BillhookError, match="this model could not be measured"):
            worker.load()
    finally:
        worker.close()
    assert worker._process.returncode is not None


# -- the record, without measuring ------------------------------------------------------------------------


def _op(seconds: float) -> dict[str, object]:
    return {"seconds": seconds, "calls": 2, "shapes": "[4, 8] x [8, 3]"}


def test_the_culprit_has_the_largest_excess_over_what_the_flops_promise() -> None:
    before = {"aten::mm": _op(0.8), "aten::mul": _op(0.2)}
    found = culprit(before, {"aten::mm": _op(0.45), "aten::mul": _op(0.2), "aten::copy_": _op(0.06)}, 2.0)
    assert found is not None
    assert found.op == "aten::mul"  # takes as long as before where half was promised
    assert found.excess == pytest.approx(0.1)
    assert found.total_excess == pytest.approx(0.71 - 0.5)
    assert culprit(before, {"aten::mm": _op(0.3)}, 2.0) is None
    assert culprit(before, {}, 2.0) is None


def _record() -> Bench:
    dense = Measured(
        model="some/dense",
        runtime="PyTorch",
        prefill=Timing.of([0.2, 0.1, 0.4], 100),
        decode=Timing.of([1.5, 1.0, 2.0], 10),
        bytes=2_000_000,
        memory=3_000_000,
        parameters=500_000,
        nonzero=400_000,
        flops=10**9,
    )
    small = dense.model_copy(
        update={
            "model": "out/<small|one>",
            "bytes": 1_000_000,
            "flops": 5 * 10**8,
            "prefill_speedup": 1.2,
            "decode_speedup": 0.9,
            "flops_speedup": 2.0,
            "share": 0.6,
            "culprit": Culprit(
                op="aten::mul", seconds=0.05, first_seconds=0.06, excess=0.02, total_excess=0.03, calls=9, shapes="[4]"
            ),
        }
    )
    quantized = Measured(
        model="q.gguf", runtime="llama.cpp", prefill=Timing.of([0.1], 100), decode=Timing.of([1.0], 10), bytes=5
    )
    return Bench(models=[dense, small, quantized], prompt=100, decode=10, repeats=3, dtype="float32", threads=1)


def test_the_formats_say_what_the_record_says(tmp_path: Path) -> None:
    result = _record()
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert [row["model"] for row in rows] == ["some/dense", "out/<small|one>", "q.gguf"]
    assert float(rows[0]["prefill_seconds"]) == 0.2
    assert rows[1]["slow_op"] == "aten::mul"
    assert rows[2]["flops"] == ""
    (note,) = notes(result)
    assert "60% of the speed-up that its FLOPs promise" in note
    assert "aten::mul takes 50.0 ms" in note
    assert "FLOPs promise 30.0 ms" in note
    text = to_markdown(result)
    assert "200 ms (100–400)" in text
    assert "q.gguf (llama.cpp)" in text
    assert "FLOPs (counted)" in text
    assert note.split(" reaches")[1] in text.replace("\\", "")
    table = to_rich(result)
    assert len(table.columns) == 4
    page = to_html(result)
    assert "out/<small" not in page
    assert "out/&lt;small|one&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    write(result, tmp_path / "out")
    assert Bench.model_validate_json((tmp_path / "out" / "bench.json").read_text(encoding="utf-8")) == result


def test_a_single_model_has_no_speed_up_in_its_formats() -> None:
    result = _record()
    result.models = result.models[:1]
    for text in (to_markdown(result), to_html(result)):
        assert "speed-up" not in text.lower().replace("speed-up over size", "")
    assert plot_svg(result).startswith("<svg")
