"""Output folders: plain Transformers loads them, and nothing of the user's is ever lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import billhook as bh
from billhook.errors import BillhookError
from billhook.export import Target, assemble, compress, compressed, expand, folder
from billhook.models.checkpoint import COMPRESSED, Checkpoint
from billhook.models.files import DiskFull
from billhook.models.source import source_of
from billhook.run import export_plain
from foreign import run_foreign
from tiny import batches_for, build, tiny_tokenizer, weights_of

MakeFolder = Callable[..., Path]

# Billhook cannot be imported here, so what loads is a plain Transformers folder.
PLAIN = """
import sys, torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    logits = model(ids).logits
save_file({"logits": logits, **{f"p.{n}": p.detach().clone() for n, p in model.named_parameters()}}, sys.argv[2])
"""


def loaded_plainly(path: Path, scratch: Path) -> dict[str, torch.Tensor]:
    result = scratch / "plain.safetensors"
    run_foreign(PLAIN, scratch, str(path), str(result))
    return load_file(result)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def same_files(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


def pruned(tmp_path: Path, name: str = "out", **options: Any) -> Path:
    model = build("llama")
    report = bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama"))
    return bh.save(model, tiny_tokenizer(), tmp_path / name, report, **options)


# -- plain folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_saved_folder_loads_without_billhook(family: str, tmp_path: Path) -> None:
    model = build(family)
    report = bh.prune(model, bh.SparseGPT(sparsity=0.5), batches_for(family))
    out = bh.save(model, tiny_tokenizer(), tmp_path / "out", report)
    plain = loaded_plainly(out, tmp_path)
    with torch.no_grad():
        assert torch.equal(plain["logits"], model(batches_for(family, count=1)[0]).logits)
    weights = weights_of(model)
    for name, value in weights.items():
        assert torch.equal(plain[f"p.{name}"], value), name
    sparse = [name for name, value in weights.items() if "mlp" in name and value.ndim == 2]
    assert sparse
    for name in sparse:
        assert int((plain[f"p.{name}"] == 0).sum()) == plain[f"p.{name}"].numel() // 2


def test_streamed_folder_of_many_shards_loads_without_billhook(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SINGLE_FILE_LIMIT", 0)
    source = make_folder("llama", max_shard_size="20KB")
    model, _ = bh.load(source, stream=True)
    bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("llama"), out=tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 4  # one per block, and the rest
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {p.name for p in shards}
    assert index["metadata"]["total_size"] == Checkpoint.open(source).nbytes

    resident, _ = bh.load(source)
    bh.prune(resident, bh.Wanda(sparsity=0.5), batches_for("llama"))
    plain = loaded_plainly(tmp_path / "out", tmp_path)
    for name, value in weights_of(resident).items():
        assert torch.equal(plain[f"p.{name}"], value), name


def test_sharded_output_of_a_base_checkpoint_keeps_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are journalled under the model's names; the files have the checkpoint's."""
    monkeypatch.setattr(folder, "_SINGLE_FILE_LIMIT", 0)
    build("gpt2").transformer.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"GPT2Model"', '"GPT2LMHeadModel"'))
    model, _ = bh.load(tmp_path / "model", stream=True)
    bh.prune(model, bh.Magnitude(sparsity=0.5), out=tmp_path / "out")
    assert {*Checkpoint.open(tmp_path / "out").tensors} == {*Checkpoint.open(tmp_path / "model").tensors}
    whole = build("gpt2")
    bh.prune(whole, bh.Magnitude(sparsity=0.5))
    plain = loaded_plainly(tmp_path / "out", tmp_path)
    for name, value in weights_of(whole).items():
        assert torch.equal(plain[f"p.{name}"], value), name


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("family", ["gpt_neox", "vit"])
def test_families_that_are_stored_under_other_names_keep_them(
    family: str, limit: int, make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SINGLE_FILE_LIMIT", limit)
    model, _ = bh.load(make_folder(family), stream=True)
    assert source_of(model).streams
    bh.prune(model, bh.Magnitude(sparsity=0.5), out=tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out").tensors
    assert {*stored} == {*Checkpoint.open(tmp_path / "model").tensors}
    assert not {*stored} <= {name for name, _ in model.named_parameters()}
    whole = build(family)
    bh.prune(whole, bh.Magnitude(sparsity=0.5))
    plain = dict(type(whole).from_pretrained(tmp_path / "out").named_parameters())
    for name, value in weights_of(whole).items():
        assert torch.equal(plain[name], value), name


def test_weights_in_another_dtype_are_announced(make_folder: MakeFolder, tmp_path: Path) -> None:
    model, _ = bh.load(make_folder("llama"), stream=True, dtype=torch.bfloat16)
    bh.prune(model, bh.Magnitude(sparsity=0.5), out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_everything_beside_the_weights_comes_along(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama", max_shard_size="20KB")
    (source / "chat_template.jinja").write_text("{{ hello }}")
    (source / "README.md").write_text("the dense model")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    model, _ = bh.load(source, stream=True)
    bh.prune(model, bh.Magnitude(), out=tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {"billhook.json", "report.html", "README.md", "model.safetensors", "config.json"} <= names
    assert not {"pytorch_model.bin", "model.safetensors.index.json", "run.json"} & names
    assert "the dense model" not in (tmp_path / "out" / "README.md").read_text()


def test_an_untouched_streamed_model_is_copied_bit_for_bit(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("qwen3", dtype=torch.bfloat16)
    model, tokenizer = bh.load(source, stream=True)
    assemble(model, tokenizer, tmp_path / "out")
    assert same_files(load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors"))


def test_a_plain_module_has_no_folder_format(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    report = bh.prune(model, bh.Magnitude(), anatomy=bh.Anatomy(family="mine", blocks="", input=None))
    with pytest.raises(BillhookError, match=r"not a Transformers model.*state_dict\(\)"):
        bh.save(model, None, tmp_path / "out", report)
    assert list(tmp_path.iterdir()) == []


# -- compressed storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_compress_and_expand_give_every_bit_back(
    dtype: torch.dtype, options: dict[str, Any], make_folder: MakeFolder, tmp_path: Path
) -> None:
    source = make_folder("llama", dtype=dtype, **options)
    before: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        for value in weights.values():
            value.view(-1)[::2] = 0.0
            value.view(-1)[4] = -0.0
        save_file(weights, file, metadata={"format": "pt"})
        before.update(weights)
    dense = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    compress(source)
    assert [p.name for p in source.glob("*.safetensors*")] == [COMPRESSED]
    assert (source / COMPRESSED).stat().st_size < 0.75 * dense
    (tmp_path / "back").mkdir()
    expand(source, tmp_path / "back")
    assert same_files(load_file(tmp_path / "back" / "model.safetensors"), before)


def test_dense_tensors_are_not_blown_up(make_folder: MakeFolder) -> None:
    source = make_folder("llama")
    compress(source)
    assert not any(key.endswith(".bitmask") for key in load_file(source / COMPRESSED))


def test_compression_that_cannot_be_verified_changes_nothing(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder("llama")
    before = snapshot(source)
    monkeypatch.setattr(compressed, "_same_bits", lambda a, b: False)
    with pytest.raises(BillhookError, match="nothing was changed"):
        compress(source)
    assert snapshot(source) == before


def test_exported_folder_loads_without_billhook(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama")
    model, _ = bh.load(source)
    bh.prune(model, bh.Magnitude(sparsity=0.75))
    model.save_pretrained(source)
    compress(source)
    export_plain(source, tmp_path / "plain")
    plain = loaded_plainly(tmp_path / "plain", tmp_path)
    for name, value in weights_of(model).items():
        assert torch.equal(plain[f"p.{name}"], value), name
    assert not (tmp_path / "plain" / COMPRESSED).exists()
    assert (tmp_path / "plain" / "tokenizer.json").is_file()


def test_export_leaves_nothing_when_it_fails(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder("llama")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(BillhookError, match="exists: choose another --out"):
        export_plain(source, tmp_path / "x")

    def full(*args: object) -> None:
        raise DiskFull("The disk is full.")

    monkeypatch.setattr("billhook.run.expand", full)
    with pytest.raises(DiskFull):
        export_plain(source, tmp_path / "x", force=True)
    assert snapshot(tmp_path / "x") == {"mine": b"mine"}
    assert {p.name for p in tmp_path.iterdir()} == {"model", "x"}


# -- the place of the result -------------------------------------------------------------------------------------


def put(path: Path, fingerprint: str) -> Path:
    """A folder as a finished run leaves it."""
    path.mkdir()
    (path / "billhook.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return path


def finish(target: Target, text: str = "new") -> None:
    result = target.staging / "result"
    result.mkdir()
    (result / "billhook.json").write_text(json.dumps({"fingerprint": text}))
    target.publish(result)


def test_a_new_place(tmp_path: Path) -> None:
    target = Target(tmp_path / "deep" / "er" / "out")
    assert target.open("a", force=False) is False
    assert not target.out.exists()
    finish(target)
    assert [p.name for p in target.out.parent.iterdir()] == ["out"]


def test_the_same_command_again_is_already_there(tmp_path: Path) -> None:
    put(tmp_path / "out", "a")
    assert Target(tmp_path / "out").open("a", force=False) is True
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_command_is_refused(tmp_path: Path) -> None:
    before = snapshot(put(tmp_path / "out", "a"))
    with pytest.raises(BillhookError, match=r"another billhook command: choose another --out, or .*--force"):
        Target(tmp_path / "out").open("b", force=False)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_not_billhooks_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("mine")
    with pytest.raises(BillhookError, match="was not written by billhook"):
        Target(out).open("a", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "other command"])
def test_force_overwrites_at_the_end_only(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        put(out, "b")
    target = Target(out)
    assert target.open("a", force=True) is False
    assert out.exists()
    finish(target)
    assert json.loads((out / "billhook.json").read_text()) == {"fingerprint": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_run_with_force_keeps_the_old_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    model, _ = bh.load(source, stream=True)
    with pytest.raises(BillhookError, match=r"layers\.2\.mlp"):
        bh.prune(model, bh.Magnitude(), out=out, force=True)
    assert snapshot(out) == {"thesis.tex": b"mine"}
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out"}


def test_a_failed_save_with_force_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pruned(tmp_path)
    before = snapshot(out)
    monkeypatch.setattr(folder, "page", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruned(tmp_path, force=True)
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    target = Target(out)
    target.open("a", force=True)
    (target.staging / "result").mkdir()
    rename = os.rename

    def failing(a: Any, b: Any) -> None:
        if Path(a).name == "result":
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        target.publish(target.staging / "result")
    assert snapshot(out) == {"thesis.tex": b"mine"}


def test_save_refuses_what_exists(tmp_path: Path) -> None:
    out = pruned(tmp_path)
    before = snapshot(out)
    with pytest.raises(BillhookError, match="exists: choose another folder, or pass force=True"):
        pruned(tmp_path)
    assert snapshot(out) == before
    (out / "old").write_text("old")
    pruned(tmp_path, force=True)
    assert not (out / "old").exists()


def test_save_of_a_streamed_model(make_folder: MakeFolder, tmp_path: Path) -> None:
    model, tokenizer = bh.load(make_folder(), stream=True)
    report = bh.prune(model, bh.Magnitude(), out=tmp_path / "out")
    with pytest.raises(BillhookError, match="streamed"):
        bh.save(model, tokenizer, tmp_path / "other", report)


# -- what earlier runs left ---------------------------------------------------------------------------------------


def test_an_unfinished_run_is_gone_on_with_by_the_same_command_only(tmp_path: Path) -> None:
    target = Target(tmp_path / "out")
    target.open("a", force=False)
    (target.staging / "work").write_text("done so far")
    with pytest.raises(BillhookError, match="unfinished run with other options"):
        Target(tmp_path / "out").open("b", force=False)
    assert (target.staging / "work").is_file()
    assert Target(tmp_path / "out").open("a", force=False) is False
    assert (target.staging / "work").is_file()
    assert Target(tmp_path / "out").open("b", force=True) is False
    assert not (target.staging / "work").exists()
    assert json.loads((target.staging / "run.json").read_text()) == {"fingerprint": "b"}


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_note_of_an_unfinished_run(text: str, tmp_path: Path) -> None:
    target = Target(tmp_path / "out")
    target.open("a", force=False)
    (target.staging / "run.json").write_text(text)
    with pytest.raises(BillhookError, match="unfinished run"):
        Target(tmp_path / "out").open("a", force=False)
    assert Target(tmp_path / "out").open("a", force=True) is False


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_report_is_another_command(text: str, tmp_path: Path) -> None:
    (put(tmp_path / "out", "a") / "billhook.json").write_text(text)
    with pytest.raises(BillhookError, match="another billhook command"):
        Target(tmp_path / "out").open("a", force=False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_foreign_folder_in_the_staging_place_is_never_touched(kind: str, force: bool, tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    with pytest.raises(BillhookError, match="in the way and was not written by billhook"):
        Target(tmp_path / "out").open("a", force=force)
    with pytest.raises(BillhookError, match="in the way and was not written by billhook"):
        pruned(tmp_path, force=force)
    assert place.exists()
    assert kind == "file" or (place / "thesis.tex").is_file()


@pytest.mark.parametrize("name", [".", "..", "/", "../.."])
def test_the_working_folder_is_never_replaced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(BillhookError, match="is the working folder or contains it"):
        Target(Path(name)).open("a", force=True)


@pytest.mark.parametrize("inside", [False, True])
def test_the_model_itself_is_never_replaced(inside: bool, make_folder: MakeFolder) -> None:
    source = make_folder("llama", name="models/llama")
    before = snapshot(source)
    model, _ = bh.load(source, stream=True)
    with pytest.raises(BillhookError, match="holds the model that is pruned"):
        bh.prune(model, bh.Magnitude(), out=source.parent if inside else source, force=True)
    assert snapshot(source) == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BillhookError, match=r"cannot be written: .*; choose another --out"):
        Target(tmp_path / "file" / "out").open("a", force=False)
