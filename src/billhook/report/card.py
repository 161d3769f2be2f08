"""The model card: README.md of a folder that billhook wrote."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import yaml

from billhook.record import Report
from billhook.report.text import (
    KEPT_WORDS,
    before_after,
    calibration_text,
    final_sites,
    headline,
    method_names,
    protocols_text,
    recipe_yaml,
    storage_text,
)

_HUB_ID = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

_IMAGES = ("vit", "deit")  # families that read images


def model_card(report: Report, folder_name: str) -> str:
    """README.md in the form of the Hugging Face hub: YAML front matter, then Markdown.

    Args:
        report: what was measured; only that appears in the table.
        folder_name: name or path of the folder, as the loading example should have it.
    """
    methods = list(dict.fromkeys(method_names(report)))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["billhook", "pruned", *methods]}
    if hub_id(report.model):
        front["base_model"] = report.model
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(folder_name.rstrip('/').rpartition('/')[2] or folder_name)}",
        plain(" ".join(headline(report))),
        "## Load it",
        _loading(report, folder_name),
        *_measured(report),
        *_making(report),
        "## Limits",
        "\n".join(f"- {plain(limit)}" for limit in _limits(report)),
    ]
    return "\n\n".join(parts) + "\n"


def hub_id(model: str) -> bool:
    """Whether `model` has the form of an id on the Hugging Face hub, owner/name."""
    return _HUB_ID.fullmatch(model) is not None and "--" not in model and ".." not in model


def plain(text: str) -> str:
    """`text` as Markdown on one line that shows it literally: no markup, no HTML, no table cell's end."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def code_block(text: str, language: str) -> str:
    """`text` fenced so that no run of backticks inside can end the block."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned. Cells are Markdown."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _loading(report: Report, folder_name: str) -> str:
    name = json.dumps(folder_name, ensure_ascii=False)
    if report.storage == "compressed":
        load = f"import billhook as bh\n\nmodel, tokenizer = bh.load({name})"
        export = f"billhook export {shlex.quote(folder_name)} --format hf"
        return (
            f"The weights are stored compressed, and billhook unpacks them:\n\n{code_block(load, 'python')}"
            f"\n\nIt also turns the folder into a plain one:\n\n{code_block(export, 'sh')}"
        )
    images = report.family in _IMAGES
    model = report.loader or ("AutoModelForImageClassification" if images else "AutoModelForCausalLM")
    classes = (model, "AutoImageProcessor" if images else "AutoTokenizer")
    code = ", trust_remote_code=True" if report.modelling else ""
    load = (
        f"from transformers import {', '.join(classes)}\n\n"
        f"model = {classes[0]}.from_pretrained({name}{code})\n"
        f"{'tokenizer' if classes[1] == 'AutoTokenizer' else 'processor'} = {classes[1]}.from_pretrained({name})"
    )
    words = "Plain Transformers loads it, without billhook:"
    if report.modelling:
        words = (
            f"Its widths are none that a stock class has, so `{report.modelling}` beside the weights says what it "
            "computes (PyTorch and Transformers are all it needs). Read it if you like; then:"
        )
    return f"{words}\n\n{code_block(load, 'python')}"


def _measured(report: Report) -> list[str]:
    rows = [[row.label, row.before, row.after, row.ratio] for row in before_after(report)]
    if not rows:
        return []
    notes = [protocols_text(report), KEPT_WORDS if final_sites(report) else ""]
    return [
        "## Measured",
        markdown_table(["", "before", "after", "after ÷ before"], rows),
        plain(" ".join(filter(None, notes))),
    ]


def _making(report: Report) -> list[str]:
    words = f"Made with billhook {report.billhook} from {report.model}"
    if report.calibration is not None:
        words += f"; calibration on {calibration_text(report.calibration)}"
    parts = ["## How it was made", plain(f"{words}.")]
    if report.recipe:
        parts += ["The same again, with `billhook run recipe.yaml`:", code_block(recipe_yaml(report), "yaml")]
    return parts


def _limits(report: Report) -> list[str]:
    limits = [storage_text(report)]
    if report.status != "finished":
        limits.append(f"The run was not finished (status: {report.status}).")
    if report.after is not None:
        limits.append(
            "The perplexity is of one text in one domain. Other abilities (instruction following, reasoning, "
            "other languages, safety) were not measured and may have lost more."
        )
    else:
        limits.append("The quality of the pruned model was not measured in this run.")
    limits.append("Licence, intended use and known biases are those of the original model.")
    return list(filter(None, limits))
