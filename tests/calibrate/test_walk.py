"""The walk: streaming, memory, resume, processes. All with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate import distributed, walk
from billhook.calibrate.activations import Activations
from billhook.calibrate.journal import Journal
from billhook.calibrate.walk import Walk
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, weights_of


def result_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_streamed_equals_in_memory_bit_for_bit(
    name: str, family: str, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder(family)
    batches = batches_for(family)
    method = bh.method(name, sparsity=0.5)
    resident, _ = bh.load(folder)
    bh.prune(resident, method, batches)
    streamed, _ = bh.load(folder, stream=True)
    bh.prune(streamed, method, batches, out=tmp_path / "out")
    again, _ = bh.load(tmp_path / "out")
    expected = weights_of(resident)
    for key, value in weights_of(again).items():
        assert torch.equal(value, expected[key]), key


def test_streamed_model_holds_no_weights_after_the_walk(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = bh.load(make_folder(), stream=True)
    assert all(p.device.type == "meta" for p in model.parameters())
    bh.prune(model, bh.Wanda(), batches_for("llama"), out=tmp_path / "out")
    assert all(p.device.type == "meta" for p in model.parameters())


def test_streamed_model_without_a_place_for_the_result_is_refused(make_folder: Callable[..., Path]) -> None:
    model, _ = bh.load(make_folder(), stream=True)
    with pytest.raises(bh.BillhookError, match="give out="):
        bh.prune(model, bh.Wanda(), batches_for("llama"))


class Killed(BaseException):
    """Stands for SIGKILL where a real one would end the test run."""


@pytest.mark.parametrize("stop_after", range(4))
@pytest.mark.parametrize("max_memory", [None, 10**13])
def test_a_walk_that_stopped_goes_on_with_the_same_bits(
    stop_after: int,
    max_memory: int | None,
    make_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stops at every block, with and without hidden states on disk; snapshots taken and not taken."""
    folder, batches, method = make_folder(), batches_for("llama"), bh.SparseGPT(sparsity=0.6)
    whole, _ = bh.load(folder, stream=True)
    bh.prune(whole, method, batches, out=tmp_path / "whole")
    if max_memory is not None:
        monkeypatch.setattr(Walk, "_must_spill", lambda self: True)

    commit, blocks = Journal.commit, 0

    def stopping(self: Journal, *args: object, **kwargs: object) -> object:
        nonlocal blocks
        if blocks == stop_after:
            raise Killed
        blocks += 1
        return commit(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "commit", stopping)
    model, _ = bh.load(folder, stream=True)
    if stop_after < 3:
        with pytest.raises(Killed):
            bh.prune(model, method, batches, out=tmp_path / "out", max_memory=max_memory)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Journal, "commit", commit)
    model, _ = bh.load(folder, stream=True)
    report = bh.prune(model, method, batches, out=tmp_path / "out", max_memory=max_memory)
    assert report.resumed == (0 < stop_after < 3)
    assert len(report.steps[0].blocks) == 3
    assert len(report.steps[0].sites) == 21
    a, b = result_of(tmp_path / "whole"), result_of(tmp_path / "out")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("stop_after", range(1, 9))
@pytest.mark.parametrize(
    "steps",
    [
        [bh.Wanda(sparsity=0.6, allocation="owl", refine="dsnot(modules=all)"), bh.PERP(training_steps=3, rank=2)],
        [bh.ICBS(budget="2 steps", variables=64, tokens=16), bh.PERP(training_steps=3, rank=2, objective="global")],
        [bh.Magnitude(allocation="ecoflap(samples=2, length=8)")],
    ],
    ids=["block by block", "whole model", "one step"],
)
def test_several_steps_go_on_with_the_same_bits(
    stop_after: int,
    steps: list[bh.Method],
    make_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stops at every commit of both steps; what is computed before the first block is part of what must agree."""
    folder, batches = make_folder(), batches_for("llama")
    whole, _ = bh.load(folder, stream=True)
    bh.prune(whole, steps, batches, out=tmp_path / "whole")
    commit, blocks = Journal.commit, 0

    def stopping(self: Journal, *args: object, **kwargs: object) -> object:
        nonlocal blocks
        if blocks == stop_after:
            raise Killed
        blocks += 1
        return commit(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "commit", stopping)
    model, _ = bh.load(folder, stream=True)
    if stop_after < 3 * len(steps):
        with pytest.raises(Killed):
            bh.prune(model, steps, batches, out=tmp_path / "out")
    monkeypatch.setattr(Journal, "commit", commit)
    model, _ = bh.load(folder, stream=True)
    report = bh.prune(model, steps, batches, out=tmp_path / "out")
    assert [len(step.blocks) for step in report.steps] == [3] * len(steps)
    a, b = result_of(tmp_path / "whole"), result_of(tmp_path / "out")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_passes_no_block_twice_where_hidden_states_were_saved(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = bh.load(make_folder(), stream=True)
    batches = batches_for("llama")
    monkeypatch.setattr(Walk, "_must_spill", lambda self: True)
    journal = Journal(tmp_path / "j")
    for block in Walk(model, batches, journal=journal):
        block.collect(bh.ColumnNorm)
        if block.index == 2:
            break
    assert journal.finished() == 2
    model, _ = bh.load(make_folder(name="again"), stream=True)
    model2_calls: list[int] = []
    forward = Walk.forward
    monkeypatch.setattr(
        Walk, "forward", lambda self, block, batch: (model2_calls.append(block.index), forward(self, block, batch))[1]
    )
    for block in Walk(model, batches, journal=Journal(tmp_path / "j")):
        block.collect(bh.ColumnNorm)
    assert set(model2_calls) == {2}


def test_resume_of_a_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, method = batches_for("gpt2"), bh.Wanda(sparsity=0.5)
    whole = build("gpt2")
    bh.prune(whole, method, batches)
    part = build("gpt2")
    walk = Walk(part, batches, journal=Journal(tmp_path / "j"))
    for block in walk:
        norms = block.collect(bh.ColumnNorm)
        if block.index == 1:
            break
        for site in block.sites:
            site.mask(method.density_pattern.keep(site.weight.abs() * norms[site], 0.5))
    fresh = build("gpt2")
    method.prune(Walk(fresh, batches, journal=Journal(tmp_path / "j")))
    for key, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(fresh)[key]), key


def test_an_unfinished_run_with_other_options_is_not_mixed_in(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = make_folder(), batches_for("llama")
    monkeypatch.setattr(Journal, "commit", lambda *a, **k: (_ for _ in ()).throw(Killed))
    model, _ = bh.load(folder, stream=True)
    with pytest.raises(Killed):
        bh.prune(model, bh.Wanda(sparsity=0.5), batches, out=tmp_path / "out")
    monkeypatch.undo()
    model, _ = bh.load(folder, stream=True)
    with pytest.raises(bh.BillhookError, match="unfinished run with other options"):
        bh.prune(model, bh.Wanda(sparsity=0.6), batches, out=tmp_path / "out")
    with pytest.raises(bh.BillhookError, match="unfinished run with other options"):
        bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama", seed=9), out=tmp_path / "out")
    bh.prune(model, bh.Wanda(sparsity=0.6), batches, out=tmp_path / "out", force=True)


_SCRIPT = """
import sys, time, torch
sys.path[:0] = {paths!r}
import billhook as bh
from billhook.calibrate import distributed, journal
from tiny import batches_for
torch.set_num_threads(1)
distributed.start(torch.device("cpu"))
slow = {slow}
if slow:
    commit = journal.Journal.commit
    def commit_slowly(self, *a, **k):
        time.sleep(slow)
        return commit(self, *a, **k)
    journal.Journal.commit = commit_slowly
for out, method in {runs!r}.items():
    model, _ = bh.load({folder!r}, stream=True)
    batches = batches_for("llama", count=4)
    bh.prune(model, bh.method(method, sparsity=0.5), batches, out=out, precision="highest")
distributed.stop()
"""


def script(tmp_path: Path, name: str, **values: object) -> Path:
    here = Path(__file__).resolve().parents[1]
    values = {"paths": [str(here)], "slow": 0, **values}
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(_SCRIPT.format(**values)), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_sigkill_and_again(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A real process, really killed in the middle, then run again."""
    folder = make_folder()
    out, whole = tmp_path / "out", tmp_path / "whole"
    slow = script(tmp_path, "slow", slow=1.0, folder=str(folder), runs={str(out): "sparsegpt"})
    process = subprocess.Popen([sys.executable, str(slow)], env=environment())
    record = tmp_path / "out.partial" / "step-1" / "block-00000.json"
    deadline = time.monotonic() + 90
    while not record.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = script(tmp_path, "again", folder=str(folder), runs={str(out): "sparsegpt", str(whole): "sparsegpt"})
    subprocess.run([sys.executable, str(again)], env=environment(), check=True, timeout=180)
    assert bh.Report.read(out).resumed
    assert not bh.Report.read(whole).resumed
    a, b = result_of(out), result_of(whole)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_two_processes_give_the_masks_of_one(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder()
    methods = ("wanda", "sparsegpt", "magnitude")
    two = script(tmp_path, "two", folder=str(folder), runs={str(tmp_path / f"two-{m}"): m for m in methods})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(two)]
    subprocess.run(command, env=environment(), check=True, timeout=240)
    for method in methods:
        model, _ = bh.load(folder, stream=True)
        batches, one = batches_for("llama", count=4), tmp_path / f"one-{method}"
        bh.prune(model, bh.method(method, sparsity=0.5), batches, out=one, precision="highest")
        assert bh.Report.read(tmp_path / f"two-{method}").processes == 2
        a, b = result_of(one), result_of(tmp_path / f"two-{method}")
        for key in a:
            # sums over tokens are added in another order: a few near-ties may fall the other way
            assert ((a[key] == 0) == (b[key] == 0)).float().mean() > 0.995, (method, key)
            same = (a[key] == 0) == (b[key] == 0)
            torch.testing.assert_close(a[key][same], b[key][same], rtol=1e-2, atol=1e-2)


def test_the_command_line_under_torchrun(make_folder: Callable[..., Path], corpus: Path, tmp_path: Path) -> None:
    """One report, one JSON object on stdout, the masks of one process; a mistake is said once and ends with 2."""
    folder = make_folder()
    options = [
        "prune",
        str(folder),
        "--method",
        "wanda",
        "--sparsity",
        "0.6",
        "--allocation",
        "owl",
        "--refine",
        "dsnot",
    ]
    options += ["--data", f"text:{corpus}", "--samples", "8", "--length", "16", "--eval-length", "16", "--json"]
    options += ["--eval-windows", "8", "--precision", "highest"]
    one = [sys.executable, "-m", "billhook", *options, "--out", str(tmp_path / "one")]
    subprocess.run(one, env=environment(), check=True, timeout=120, capture_output=True)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "billhook",
    ]
    done = subprocess.run(
        [*torchrun, *options, "--out", str(tmp_path / "two")],
        env=environment(),
        check=True,
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["processes"] == 2
    a, b = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    for key in a:
        assert ((a[key] == 0) == (b[key] == 0)).float().mean() > 0.99, key
    before, after = bh.Report.read(tmp_path / "one").after, bh.Report.read(tmp_path / "two").after
    assert before is not None
    assert after is not None
    assert after.perplexity == pytest.approx(before.perplexity, rel=0.01)

    wrong = subprocess.run(
        [*torchrun, *options, "--out", str(tmp_path / "bad"), "--scope", "diagonal"],
        env=environment(),
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode != 0
    assert "scope='diagonal' is not possible" in wrong.stderr
    assert not (tmp_path / "bad").exists()


def test_fewer_batches_than_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 4)
    with pytest.raises(bh.BillhookError, match="3 calibration batches cannot be split over 4 processes"):
        bh.walk(build("llama"), batches_for("llama"))


def test_hidden_states_on_disk_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = build("opt"), build("opt")
    bh.prune(one, bh.SparseGPT(), batches_for("opt"))
    monkeypatch.setattr(Walk, "_must_spill", lambda self: True)
    bh.prune(two, bh.SparseGPT(), batches_for("opt"))
    for key, value in weights_of(one).items():
        assert torch.equal(value, weights_of(two)[key])


def test_max_memory_spills_or_refuses() -> None:
    from billhook.system import resident_memory

    batches = batches_for("llama")
    enough = Walk(build("llama"), batches, max_memory=resident_memory() + 10**9)
    assert not enough._must_spill()
    with pytest.raises(bh.BillhookError, match=r"--max-memory 0.01 GB is too little.*takes about"):
        Walk(build("llama"), batches, max_memory=10**7)._must_spill()
    floor = resident_memory() + 3_000_000
    many = [torch.randint(3, 90, (2, 24)) for _ in range(2000)]
    assert Walk(build("llama"), many, max_memory=floor)._must_spill()


def test_activations_round_trip(tmp_path: Path) -> None:
    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = [torch.randn(2, 5, 3).to(dtype), torch.randn(1, 7, 3).to(dtype)]
        disk = Activations(2, device, tmp_path / str(dtype))
        for i, value in enumerate(values):
            disk[i] = value
        assert not Activations.is_whole(tmp_path / str(dtype))
        disk.seal()
        opened = Activations.open(tmp_path / str(dtype), device)
        assert all(torch.equal(opened[i], value) for i, value in enumerate(values))
        assert all(torch.equal(opened.in_memory()[i], value) for i, value in enumerate(values))


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_model_is_left_as_it_was_found(family: str) -> None:
    model = build(family)
    model.train()
    cache = model.config.use_cache
    bh.prune(model, bh.Wanda(), batches_for(family))
    assert model.training
    assert model.config.use_cache == cache
    for block in find_blocks(model, anatomy_of(model)):
        assert "forward" not in block.__dict__
        assert not any(m._forward_pre_hooks for m in block.modules())
    out = model.eval().generate(batches_for(family)[0][:1, :4], max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 7


@pytest.mark.parametrize("hardware", [True, False])
def test_bf16_without_hardware_is_warned_of(
    hardware: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(walk, "has_bf16", lambda device: hardware)
    bh.prune(build("llama"), bh.Wanda(), batches_for("llama", count=1), precision="bf16")
    assert ("does not multiply bfloat16 in hardware" in caplog.text) is not hardware
    caplog.clear()
    bh.prune(build("llama"), bh.Wanda(), batches_for("llama", count=1))  # what "auto" chooses is never slow
    assert "bfloat16" not in caplog.text


def test_bf16_products_change_masks_only_at_near_ties() -> None:
    one, two = build("llama"), build("llama")
    batches = batches_for("llama", count=6)
    bh.prune(one, bh.Wanda(), batches, precision="highest")
    bh.prune(two, bh.Wanda(), batches, precision="bf16")
    for key, value in weights_of(one).items():
        assert ((value == 0) == (weights_of(two)[key] == 0)).float().mean() > 0.97, key
        assert value.dtype == torch.float32
