from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from billhook.record import Report
from billhook.report.card import code_block, hub_id, model_card, plain


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and Markdown, as the hub splits them."""
    parsed = ModelCard(card)
    return parsed.data.to_dict(), parsed.text


def blocks(body: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", body, re.DOTALL | re.MULTILINE)


def test_front_matter(sample: Report) -> None:
    front, _ = parts(model_card(sample, "out"))
    assert front == {
        "library_name": "transformers",
        "tags": ["billhook", "pruned", "wanda"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("meta-llama/Llama-3.1-8B", True),
        ("gpt2", False),
        ("./out/model", False),
        ("../model", False),
        ("/models/llama", False),
        ("a/b/c", False),
        ("~/model", False),
        ("owner/na me", False),
        ("owner/", False),
        ("owner\\name", False),
        ("owner/name\n", False),
    ],
)
def test_hub_id(sample: Report, model: str, expected: bool) -> None:
    assert hub_id(model) is expected
    sample.model = model
    assert ("base_model" in parts(model_card(sample, "out"))[0]) is expected


def test_loading_a_dense_folder(sample: Report) -> None:
    _, body = parts(model_card(sample, 'runs/my "model"'))
    assert '\n# my "model"\n' in body
    (code,) = blocks(body, "python")
    ast.parse(code)
    assert "AutoModelForCausalLM.from_pretrained(" in code
    assert "billhook as bh" not in body
    assert "speed" in body


def test_loading_a_compressed_folder(sample: Report) -> None:
    sample.storage = "compressed"
    _, body = parts(model_card(sample, "my model"))
    (code,) = blocks(body, "python")
    ast.parse(code)
    assert 'model, tokenizer = bh.load("my model")' in code
    assert blocks(body, "sh") == ["billhook export 'my model' --format hf"]
    assert "bitmask" in body
    assert "AutoModel" not in body


def test_loading_a_vision_model(sample: Report) -> None:
    sample.family = "vit"
    (code,) = blocks(parts(model_card(sample, "out"))[1], "python")
    ast.parse(code)
    assert 'model = AutoModelForImageClassification.from_pretrained("out")' in code
    assert "Tokenizer" not in code


def test_table_and_recipe(sample: Report) -> None:
    _, body = parts(model_card(sample, "out"))
    assert "| Perplexity | 18.40 | 27.96 | ×1.52 |" in body
    (recipe,) = blocks(body, "yaml")
    assert yaml.safe_load(recipe)["steps"] == sample.recipe


def test_nothing_measured() -> None:
    card = model_card(Report(billhook="0", model="m", family="llama", recipe=[]), "out")
    assert "## Measured" not in card
    assert "was not measured" in card


def test_hostile_names(sample: Report) -> None:
    sample.model = "<script>alert(1)</script> | `x`\n# title"
    sample.steps[0].method = "---\nlicense: none"
    sample.recipe = [{"method": "```\n<script>"}]
    front, body = parts(model_card(sample, "out"))
    assert front["tags"][2] == sample.steps[0].method
    outside = re.sub(r"^(`{3,})yaml$.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in outside.replace("\\<script\\>", "")
    assert "\n# title" not in body


@given(st.text())
def test_plain_is_one_line_without_markup(text: str) -> None:
    line = plain(text)
    assert "\n" not in line
    assert not re.search(r"(?<!\\)[*_\[\]<>|`]", line.replace("\\\\", ""))


@given(st.text(alphabet="`a\n"))
def test_code_block_ends_where_it_should(text: str) -> None:
    fence, *middle, end = code_block(text, "").split("\n")
    assert end == fence
    assert all(fence not in line for line in middle)
