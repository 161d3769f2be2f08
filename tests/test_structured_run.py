"""Whole runs that remove parts: the folder, who can load it, what a killed run gives, steps after one another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.calibrate.journal import Journal
from billhook.surgery.shrink import drop_attention_, drop_mlp_
from billhook.surgery.slim import is_slim, only_renames, slim_
from foreign import run_foreign
from tiny import FAMILIES, TEXT_FAMILIES, batches_for, build, tiny_tokenizer, weights_of

MakeFolder = Callable[..., Path]

# Loads what is in argv[1] where billhook cannot be imported, uses it, saves it to argv[2] and loads that again.
FOREIGN = """
import sys, torch, transformers
from safetensors.torch import save_file
folder, other, result, remote = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "remote"
ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
found = {}
for name, path in (("first", folder), ("again", other)):
    cls = transformers.AutoModelForCausalLM
    model = cls.from_pretrained(path, trust_remote_code=remote).eval()
    assert type(model).__name__.startswith("Slim") == remote, type(model)
    with torch.no_grad():
        found[name + ".logits"] = model(ids).logits
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    batch, mask = ids[:, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    batch[0, :3], mask[0, :3] = 0, 0
    options |= dict(output_scores=True, return_dict_in_generate=True)
    padded = model.generate(batch, attention_mask=mask, use_cache=True, **options)
    slowly = model.generate(batch, attention_mask=mask, use_cache=False, **options)
    alone = model.generate(batch[:1, 3:], **options)
    for against, rows in ((slowly, 2), (alone, 1)):
        for row in range(rows):
            for step, (one, two) in enumerate(zip(padded.scores, against.scores)):
                torch.testing.assert_close(one[row], two[row], rtol=1e-4, atol=1e-4)
                if one[row].argmax() != two[row].argmax():  # a tie
                    break
    found[name + ".tokens"] = padded.sequences
    if name == "first":
        model.save_pretrained(other)
save_file(found, result)
"""


def used_without_billhook(folder: Path, scratch: Path, remote: bool) -> dict[str, torch.Tensor]:
    result = scratch / "foreign.safetensors"
    run_foreign(FOREIGN, scratch, str(folder), str(scratch / "again"), str(result), "remote" if remote else "plain")
    return load_file(result)


def opened(folder: Path) -> Any:
    """Streamed where that is possible, as the command line opens a model."""
    model, _ = bh.load(folder, stream=True)
    return model if is_slim(model) or only_renames(anatomy_of(model)) else bh.load(folder)[0]


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(batches_for(family, count=1)[0]).logits


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# -- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        bh.method("fasp", sparsity=0.3, sharing="influence"),
        bh.method("fasp", sparsity=0.3, uniform=True),
        bh.method("shortgpt", sparsity=0.34),
    ],
    ids=["influence", "uniform", "blocks"],
)
def test_a_folder_holds_what_the_same_call_in_memory_gives(
    method: bh.Method, family: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(family)
    resident, _ = bh.load(folder)
    bh.prune(resident, method, batches_for(family))
    report = bh.prune(opened(folder), method, batches_for(family), out=tmp_path / "out")
    again, _ = bh.load(tmp_path / "out")
    assert type(again) is type(resident)
    want = weights_of(resident)
    got = weights_of(again)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(logits(again, family), logits(resident, family))
    stock = method.name == "shortgpt" or bool(method.options().get("uniform"))
    assert is_slim(again) == (not stock)
    assert (tmp_path / "out" / "modeling_slim.py").exists() == (not stock)
    assert report.size_after is not None
    assert report.size_before is not None
    assert report.size_after.parameters < report.size_before.parameters
    assert report.size_after.parameters == sum(p.numel() for p in resident.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_slim_folder_is_used_without_billhook(family: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    method = bh.method("fasp", sparsity=0.3, sharing="influence")
    bh.prune(opened(make_folder(family)), method, batches_for(family), out=tmp_path / "out")
    found = used_without_billhook(tmp_path / "out", tmp_path, remote=True)
    model, _ = bh.load(tmp_path / "out")
    want = logits(model, family)
    torch.testing.assert_close(found["first.logits"], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["first.logits"], found["again.logits"])
    assert torch.equal(found["first.tokens"], found["again.tokens"])


@pytest.mark.parametrize("method", ["fasp", "shortgpt"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "gpt2"])
def test_a_stock_result_loads_without_any_code(
    family: str, method: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"uniform": True} if method == "fasp" else {}
    bh.prune(
        opened(make_folder(family)),
        bh.method(method, sparsity=0.34, **options),
        batches_for(family),
        out=tmp_path / "out",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "slim" not in config
    assert "auto_map" not in config
    found = used_without_billhook(tmp_path / "out", tmp_path, remote=False)
    model, _ = bh.load(tmp_path / "out")
    torch.testing.assert_close(found["first.logits"], logits(model, family), rtol=1e-5, atol=1e-5)


def test_a_fused_model_is_not_taken_apart_on_disk(make_folder: MakeFolder, tmp_path: Path) -> None:
    model, _ = bh.load(make_folder("gpt2"), stream=True)
    with pytest.raises(bh.BillhookError, match="without stream"):
        bh.prune(model, bh.method("fasp"), batches_for("gpt2"), out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_shards_of_a_slim_model_over_the_limit(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = bh.method("fasp", sparsity=0.3)
    folder = make_folder("opt")
    bh.prune(opened(folder), method, batches_for("opt"), out=tmp_path / "one")
    monkeypatch.setattr("billhook.export.folder._SINGLE_FILE_LIMIT", 0)
    bh.prune(opened(folder), method, batches_for("opt"), out=tmp_path / "many")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    one, many = (weights_of(bh.load(tmp_path / name)[0]) for name in ("one", "many"))
    assert all(torch.equal(one[k], many[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype: torch.dtype, make_folder: MakeFolder, tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        out = tmp_path / f"out-{family}"
        model = opened(make_folder(family, name=family, dtype=dtype))
        bh.prune(model, bh.method("fasp", sparsity=0.3), batches_for(family), out=out)
        assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
        again, _ = bh.load(out)
        assert torch.isfinite(logits(again, family).float()).all()


# -- again and on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("first", [0.2, 0.3])
def test_a_slim_folder_is_pruned_again(family: str, first: float, make_folder: MakeFolder, tmp_path: Path) -> None:
    """Widths then start from those that the folder has, and add up as two steps of one run."""
    method = bh.method("fasp", sparsity=first)
    folder = make_folder(family)
    bh.prune(opened(folder), method, batches_for(family), out=tmp_path / "once")
    model, _ = bh.load(tmp_path / "once", stream=True)
    assert is_slim(model)
    bh.prune(model, method, batches_for(family), out=tmp_path / "twice")
    bh.prune(opened(folder), [method, method], batches_for(family), out=tmp_path / "both")
    assert same_weights(tmp_path / "twice", tmp_path / "both")
    again, _ = bh.load(tmp_path / "twice")
    resident, _ = bh.load(folder)
    bh.prune(resident, [method, method], batches_for(family))
    assert torch.equal(logits(again, family), logits(resident, family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "names",
    [
        ("wanda", "fasp"),
        ("fasp", "wanda"),
        ("shortgpt", "fasp"),
        ("fasp", "shortgpt"),
        ("shortgpt", "wanda"),
        ("shortgpt", "shortgpt"),
    ],
    ids="-".join,
)
def test_two_steps(family: str, names: tuple[str, str], make_folder: MakeFolder, tmp_path: Path) -> None:
    steps = [bh.method(name, sparsity=0.34) for name in names]
    folder = make_folder(family)
    resident, _ = bh.load(folder)
    bh.prune(resident, steps, batches_for(family))
    report = bh.prune(opened(folder), steps, batches_for(family), out=tmp_path / "out")
    again, _ = bh.load(tmp_path / "out")
    want = weights_of(resident)
    assert want.keys() == weights_of(again).keys()
    differing = [name for name, p in again.named_parameters() if not torch.equal(p, want[name])]
    assert not differing
    assert [len(step.blocks) for step in report.steps] == [3, 2 if names[0] == "shortgpt" else 3]
    if "wanda" in names and names[1] != "fasp":  # zeros of the second step are all there
        sites = [s for s in report.steps[1].sites if "mlp" in s.site]
        assert sites
        assert all(site.sparsity == pytest.approx(0.34, abs=0.05) for site in sites)


class Killed(BaseException):
    """Stands for SIGKILL where a real one would end the test run."""


def stop_at(monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    """Die at a commit of a block; the one before it is the last that is whole."""
    commit, done = Journal.commit, 0

    def dying(self: Journal, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == commits:
            raise Killed
        done += 1
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Journal, "commit", dying)


STOPPED = {
    "fasp": ([bh.method("fasp", sparsity=0.3)], [0, 1, 2]),
    "influence": ([bh.method("fasp", target_size=0.8, sharing="influence")], [2]),
    "wanda-fasp": ([bh.method("wanda", sparsity=0.4), bh.method("fasp", sparsity=0.3, uniform=True)], [2, 3, 4]),
    "fasp-sparsegpt": ([bh.method("fasp", sparsity=0.3), bh.method("sparsegpt", sparsity=0.4)], [2, 5]),
    "fasp-fasp": ([bh.method("fasp", sparsity=0.2), bh.method("fasp", sparsity=0.2, attention="groups")], [1, 4]),
    "shortgpt-fasp": ([bh.method("shortgpt", sparsity=0.34), bh.method("fasp", sparsity=0.3)], [0, 1]),
    "fasp-shortgpt-wanda": (
        [bh.method("fasp", sparsity=0.3), bh.method("shortgpt", sparsity=0.34), bh.method("wanda")],
        [2, 3, 4],
    ),
}


@pytest.mark.parametrize(
    ("family", "dtype", "case"),
    [
        *(("llama", torch.float32, case) for case in STOPPED),
        *(("gpt2", torch.float32, case) for case in ("fasp", "fasp-sparsegpt", "fasp-shortgpt-wanda")),
        *(("gpt2", torch.bfloat16, case) for case in ("fasp", "fasp-fasp")),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_bits(
    family: str,
    dtype: torch.dtype,
    case: str,
    make_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, stops = STOPPED[case]
    folder = make_folder(family, dtype=dtype)
    bh.prune(opened(folder), steps, batches_for(family), out=tmp_path / "whole")
    for stop in stops:
        out = tmp_path / f"out-{stop}"
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(Killed):
                bh.prune(opened(folder), steps, batches_for(family), out=out)
        assert not out.exists()
        report = bh.prune(opened(folder), steps, batches_for(family), out=out)
        assert report.resumed == (stop > 0)
        assert same_weights(tmp_path / "whole", out), stop
        whole = bh.Report.read(tmp_path / "whole")
        for one, other in zip(whole.steps, report.steps, strict=True):
            assert [(s.site, s.shape, s.sparsity) for s in one.sites] == [
                (s.site, s.shape, s.sparsity) for s in other.sites
            ]
        one, other = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "whole", out))
        assert one == other


@pytest.mark.parametrize("stop", ["before the first block", "while it is assembled"])
def test_dropping_blocks_again_after_a_kill(
    stop: str, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are dropped anew from the influence that the killed run measured."""
    folder, method = make_folder(), bh.method("shortgpt", target_size=0.6)
    bh.prune(opened(folder), method, batches_for("llama"), out=tmp_path / "whole")

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    where = "billhook.calibrate.walk.Walk.drop" if stop == "before the first block" else "billhook.run.assemble"
    with monkeypatch.context() as patch:
        patch.setattr(where, die)
        with pytest.raises(Killed):
            bh.prune(opened(folder), method, batches_for("llama"), out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("billhook.calibrate.influence._measured", die)
        bh.prune(opened(folder), method, batches_for("llama"), out=tmp_path / "out")
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    again, _ = bh.load(tmp_path / "out")
    assert again.config.num_hidden_layers < 3  # type: ignore[union-attr]


def test_a_block_without_attention_or_mlp_is_narrowed_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = build("llama")
    slim_(model)
    blocks = find_blocks(model, anatomy_of(model))
    drop_attention_(blocks[0])
    drop_mlp_(blocks[1])
    bh.save(model, tiny_tokenizer(), tmp_path / "model")
    source, method = tmp_path / "model", bh.method("fasp", sparsity=0.2)
    bh.prune(opened(source), method, batches_for("llama"), out=tmp_path / "whole")
    for stop in (1, 2):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            with pytest.raises(Killed):
                bh.prune(opened(source), method, batches_for("llama"), out=tmp_path / f"out-{stop}")
        bh.prune(opened(source), method, batches_for("llama"), out=tmp_path / f"out-{stop}")
        assert same_weights(tmp_path / "whole", tmp_path / f"out-{stop}")


_SCRIPT = """
import sys, time, torch
sys.path[:0] = {paths!r}
import billhook as bh
from billhook.calibrate import journal
from tiny import batches_for
torch.set_num_threads(1)
slow = {slow}
if slow:
    commit = journal.Journal.commit
    def commit_slowly(self, *a, **k):
        time.sleep(slow)
        return commit(self, *a, **k)
    journal.Journal.commit = commit_slowly
method = bh.method("fasp", sparsity=0.3, sharing="influence")
for out in {places!r}:
    model, _ = bh.load({folder!r}, stream={stream})
    bh.prune(model, method, batches_for({family!r}, count=4), out=out, precision="highest")
"""


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_sigkill_and_again(family: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    """A real process, really killed after its first block, then run again."""
    folder, out, whole = make_folder(family), tmp_path / "out", tmp_path / "whole"
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(name: str, slow: float, *places: Path) -> list[str]:
        path = tmp_path / f"{name}.py"
        values = {"folder": str(folder), "family": family, "stream": family == "llama", "places": [*map(str, places)]}
        path.write_text(_SCRIPT.format(paths=[str(here)], slow=slow, **values), encoding="utf-8")
        return [sys.executable, str(path)]

    process = subprocess.Popen(command("slow", 1.0, out), env=environment)
    record = tmp_path / "out.partial" / "step-1" / "block-00000.json"
    deadline = time.monotonic() + 90
    while not record.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    dims = json.loads(record.read_text())["dims"]
    assert dims["mlp"]["width"] < (48 if family == "llama" else 128)
    subprocess.run(command("again", 0, out, whole), env=environment, check=True, timeout=180)
    assert bh.Report.read(out).resumed
    assert not bh.Report.read(whole).resumed
    assert same_weights(out, whole)


# -- with what else there is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_target_size_of_a_tied_model_is_the_same_on_disk(
    family: str, make_folder: MakeFolder, tmp_path: Path
) -> None:
    """Reading a tied embedding for the dense pass must not make it count twice afterwards."""
    folder = make_folder(family)
    for method in (bh.method("shortgpt", target_size=0.6), bh.method("fasp", target_size=0.8, sharing="influence")):
        resident, _ = bh.load(folder)
        bh.prune(resident, method, batches_for(family))
        bh.prune(opened(folder), method, batches_for(family), out=tmp_path / f"{family}-{method.name}")
        again, _ = bh.load(tmp_path / f"{family}-{method.name}")
        assert weights_of(again).keys() == weights_of(resident).keys()
        assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in resident.parameters())


def test_training_after_narrowing(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Recovery by the loss of the model works; by the blocks from before is refused before anything is done."""
    narrow, batches = bh.method("fasp", sparsity=0.3), batches_for("llama")
    folder = make_folder()
    before = weights_of(build("llama"))
    model = build("llama")
    with pytest.raises(bh.BillhookError, match="other shapes"):
        bh.prune(model, [narrow, bh.PERP(training_steps=2, rank=2)], batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    steps = [narrow, bh.PERP(training_steps=2, rank=2, objective="global")]
    bh.prune(opened(folder), steps, batches, out=tmp_path / "out")
    bh.prune(model, steps, batches)
    want = weights_of(model)
    again, _ = bh.load(tmp_path / "out")
    assert all(torch.allclose(p, want[name], atol=1e-6) for name, p in again.named_parameters())
    blocks = [bh.PERP(training_steps=2, rank=2), narrow]  # the other way round the blocks still have their shapes
    bh.prune(build("llama"), [bh.Wanda(), *blocks], batches)


@pytest.mark.parametrize("family", [f for f in TEXT_FAMILIES if f != "gpt2"])
def test_generation_of_a_saved_slim_model_with_its_cache(family: str, tmp_path: Path) -> None:
    model: Any = build(family)
    bh.prune(model, bh.method("fasp", sparsity=0.3), batches_for(family))
    bh.save(model, tiny_tokenizer(), tmp_path / "out")
    again: Any = bh.load(tmp_path / "out")[0]
    ids = batches_for(family)[0][:, :6]
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = again.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    with torch.no_grad():
        scores = again(made.sequences[:, :-1], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(torch.stack(made.scores, 1), scores, rtol=1e-4, atol=1e-4)
    assert isinstance(again, transformers.PreTrainedModel)
