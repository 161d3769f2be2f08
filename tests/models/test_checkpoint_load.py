"""Opening model folders: every family as Transformers loads it, and every way a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import billhook as bh
from billhook.errors import BillhookError
from billhook.export import compress
from billhook.models.checkpoint import COMPRESSED, Checkpoint
from billhook.models.load import resolve
from billhook.models.source import Streamed, match_keys, source_of
from tiny import FAMILIES, batches_for, build

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters by full name, read from disk where the model is streamed."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    source = source_of(model)
    if isinstance(source, Streamed):
        assert all(p.device.type == "meta" for p in model.parameters())
        return {name: source.read(name) for name in names}
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def reference(family: str, folder: Path, **options: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, **options)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- the same model as Transformers gives ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_as_transformers_loads_it(family: str, stream: bool, make_folder: MakeFolder) -> None:
    folder = make_folder(family)
    model, tokenizer = bh.load(folder, stream=stream)
    assert source_of(model).streams == stream
    expected = dict(reference(family, folder).named_parameters(remove_duplicate=False))
    found = parameters_of(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert not model.training
    assert (tokenizer is None) == (family in ("vit", "deit"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, make_folder: MakeFolder) -> None:
    folder = make_folder(family)
    model, _ = bh.load(folder)
    batch = batches_for(family, count=1)[0]
    with torch.no_grad():
        assert torch.equal(model(batch).logits, reference(family, folder)(batch).logits)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_sharded_folders(family: str, stream: bool, make_folder: MakeFolder) -> None:
    folder = make_folder(family, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, _ = bh.load(folder, stream=stream)
    expected = dict(build(family).named_parameters(remove_duplicate=False))
    for name, value in parameters_of(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_stay_one_tensor(family: str, make_folder: MakeFolder) -> None:
    folder = make_folder(family)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = bh.load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    streamed, _ = bh.load(folder, stream=True)
    source = source_of(streamed)
    assert isinstance(source, Streamed)
    assert torch.equal(source.read("lm_head.weight"), model.get_output_embeddings().weight)


def test_untied_embeddings_stay_two(make_folder: MakeFolder) -> None:
    model, _ = bh.load(make_folder("qwen2"))
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("stream", [False, True])
def test_base_checkpoint_opened_as_the_model_with_a_head(stream: bool, tmp_path: Path) -> None:
    """GPT-2 on the hub is stored like this: keys without "transformer."."""
    whole = build("gpt2")
    whole.transformer.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    model, _ = bh.load(tmp_path, stream=stream)
    assert source_of(model).streams == stream
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = parameters_of(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_checkpoint_with_a_head_opened_as_the_base_model(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_config(folder, architectures=["LlamaModel"])
    model, _ = bh.load(folder)
    assert type(model).__name__ == "LlamaModel"
    expected = dict(build("llama").model.named_parameters())
    for name, value in parameters_of(model).items():
        assert torch.equal(value, expected[name]), name


def test_no_architecture_in_the_configuration_means_a_language_model(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_config(folder, architectures=None)
    assert type(bh.load(folder)[0]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(asked: torch.dtype | None, stored: torch.dtype, stream: bool, make_folder: MakeFolder) -> None:
    folder = make_folder("qwen3", dtype=stored)
    model, _ = bh.load(folder, dtype=asked, stream=stream)
    raw = load_file(folder / "model.safetensors")
    for name, value in parameters_of(model).items():
        assert value.dtype == (asked or stored)
        assert torch.equal(value, raw[name].to(asked or stored)), name


def test_mixed_dtypes_take_the_one_of_most_bytes(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", dtype=torch.bfloat16)
    edit_weights(folder, lambda w: w.update({"model.norm.weight": w["model.norm.weight"].float()}))
    model, _ = bh.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stream", [False, True])
def test_compressed_folders(stream: bool, make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    edit_weights(folder, lambda w: [v.view(-1)[::2].zero_() for k, v in w.items() if "proj" in k])
    expected = dict(reference("llama", folder).named_parameters(remove_duplicate=False))
    compress(folder)
    model, _ = bh.load(folder, stream=stream)
    for name, value in parameters_of(model).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("stream", [False, True])
def test_buffers_that_are_part_of_the_weights(stream: bool, tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    network = transformers.ResNetForImageClassification(config)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    network.save_pretrained(tmp_path)
    model, _ = bh.load(tmp_path, stream=stream)
    assert len(list(network.named_buffers())) > 3
    for name, buffer in network.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


class Foreign(nn.Module):
    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


def test_names_that_do_not_correspond_are_told_apart(make_folder: MakeFolder) -> None:
    checkpoint = Checkpoint.open(make_folder("llama"))
    assert match_keys(Foreign(), checkpoint) is None


# -- what can be wrong -------------------------------------------------------------------------------------------


def refused(folder: Path | str, match: str, **options: Any) -> None:
    for stream in (False, True):
        with pytest.raises(BillhookError, match=match) as caught:
            bh.load(folder, stream=stream, **options)
        assert "\n" not in str(caught.value)


def test_no_configuration(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "config.json").unlink()
    refused(folder, "not a Hugging Face model folder: it has no config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model_type": "llama", "hidden_size": "many"}', '"x"'])
def test_damaged_configuration(make_folder: MakeFolder, text: str) -> None:
    folder = make_folder()
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json")


def test_configuration_that_cannot_be_built(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit_config(folder, num_attention_heads=5)
    refused(folder, "model")


def test_unknown_model_type(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit_config(folder, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    refused(folder, r"config\.json.* cannot be used: .*nonesuch")


def test_code_in_the_folder_is_not_run_and_not_asked_about(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked a question"))
    refused(folder, "custom code")


def test_no_weights(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no weights: model\.safetensors is missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.ckpt"])
def test_pickle_only(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"as a pickle \({name}\), which can run code")


def test_pickle_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "is a pickle, which can run code")


def test_missing_shard(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    refused(folder, f"lacks 1 of {len(shards)} weight shards, the first is {shards[1].name}")


def test_truncated_shard(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, f"{shard.name} is truncated")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'],
)
def test_damaged_index(make_folder: MakeFolder, text: str) -> None:
    folder = make_folder(max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json is damaged")


def test_index_that_promises_more_than_the_shards_hold(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.extra.weight"] = sorted(value["weight_map"].values())[0]
    index.write_text(json.dumps(value))
    refused(folder, r"'model\.extra\.weight' is in the index but in no shard")


def test_a_tensor_that_is_missing_is_never_made_up(make_folder: MakeFolder) -> None:
    """Transformers would fill it with random numbers."""
    folder = make_folder()
    edit_weights(folder, lambda w: w.__delitem__("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"lacks 1 tensor\(s\) of LlamaForCausalLM, the first is 'model.layers.1.mlp.up_proj.weight'")


def test_base_checkpoint_without_a_head_is_never_given_a_random_one(tmp_path: Path) -> None:
    build("qwen2").model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["Qwen2ForCausalLM"])
    refused(tmp_path, "lm_head.weight")


def test_shapes_that_do_not_fit_the_configuration(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit_config(folder, intermediate_size=40)
    refused(folder, r"mlp\.down_proj\.weight' is 32 x 48, and its config\.json makes it 32 x 40")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(make_folder: MakeFolder, value: float) -> None:
    folder = make_folder()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda w: w[name].view(-1)[3:4].fill_(value) and None)
    with pytest.raises(BillhookError, match=f"Tensor '{name}' of the model has NaN or infinite values"):
        bh.load(folder)
    streamed, _ = bh.load(folder, stream=True)
    with pytest.raises(BillhookError, match=f"Tensor '{name}' of the model has NaN or infinite values"):
        bh.perplexity(streamed, batches_for("llama")[0])


def test_quantized_weights(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit_weights(folder, lambda w: w.update({k: v.to(torch.float8_e4m3fn) for k, v in w.items()}))
    refused(folder, "holds 8-bit weights: prune the unquantized model")


def test_no_floating_weights(make_folder: MakeFolder) -> None:
    folder = make_folder()
    edit_weights(folder, lambda w: w.update({k: v.to(torch.int8) for k, v in w.items()}))
    refused(folder, "holds no floating-point weights")


def test_damaged_tokenizer(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "tokenizer.json").write_text('{"version": 3}')
    refused(folder, "tokenizer in .* cannot be loaded")


def test_compressed_storage_of_a_newer_version(make_folder: MakeFolder) -> None:
    folder = make_folder()
    save_file({"a": torch.ones(1)}, folder / COMPRESSED, metadata={"billhook_storage": "bitmask-9"})
    refused(folder, "bitmask-9.*install a newer billhook")


@pytest.mark.parametrize("metadata", [{}, {"a.shape": "x"}, {"a.shape": "3"}])
def test_compressed_storage_without_shapes(make_folder: MakeFolder, metadata: dict[str, str]) -> None:
    folder = make_folder()
    tensors = {"a.bitmask": torch.ones(1, dtype=torch.uint8), "a.values": torch.ones(1)}
    save_file(tensors, folder / COMPRESSED, metadata={"billhook_storage": "bitmask-1", **metadata})
    refused(folder, "does not tell the shape of 'a'")


def test_compressed_storage_whose_bits_and_values_disagree(make_folder: MakeFolder) -> None:
    folder = make_folder()
    tensors = {"a.bitmask": torch.tensor([7], dtype=torch.uint8), "a.values": torch.ones(2)}
    metadata = {"billhook_storage": "bitmask-1", "a.shape": "[8]"}
    save_file(tensors, folder / COMPRESSED, metadata=metadata)
    with pytest.raises(BillhookError, match="is damaged at tensor 'a'"):
        Checkpoint.open(folder).tensors["a"].read()


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "nonesuch",
        "./nonesuch",
        "~nonesuch-user/model",
        "/nonesuch/model",
        "a/b/c",
        "models/x.gguf",
        "x.gguf",
        "",
        "\0",
        "owner/na me",
    ],
)
def test_unknown_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BillhookError) as caught:
        bh.load(name)
    assert "\n" not in str(caught.value)


def test_unknown_name_says_what_a_name_can_be() -> None:
    with pytest.raises(BillhookError, match=r"no local folder or GGUF file, and not a hub id .*use 'demo'"):
        resolve("nonesuch")


def test_hub_id_without_a_network_says_what_to_do() -> None:
    with pytest.raises(BillhookError, match=r"hub could not be reached .*local folder or GGUF file, or use 'demo'"):
        resolve("owner/name")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "is a file but not a GGUF file")


def test_a_gguf_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"hello, world")
    refused(tmp_path / "model.gguf", "is not a GGUF file")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_an_undeclared_architecture_loads_but_has_no_anatomy(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    model, _ = bh.load(tmp_path)
    with pytest.raises(BillhookError, match=r"No anatomy is declared for model_type 'bloom'.*bh\.declare"):
        bh.prune(model, bh.Magnitude())
