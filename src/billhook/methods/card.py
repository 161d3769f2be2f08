"""Method cards, generated from what each method declares."""

from __future__ import annotations

import typing
from typing import Any

from pydantic.fields import FieldInfo

from billhook.methods.base import Method


def describe(cls: type[Method]) -> dict[str, Any]:
    """A method's card as plain data."""
    paper = cls.paper
    return {
        "method": cls.name,
        "title": cls.title,
        "summary": cls.summary,
        "when": cls.when,
        "needs": cls.needs,
        "paper": paper.__dict__ if paper else None,
        "options": [
            {"name": name, "default": field.default, "range": _range(field), "description": field.description}
            for name, field in cls.model_fields.items()
        ],
    }


def card(cls: type[Method]) -> str:
    """A method's card as Markdown."""
    facts = describe(cls)
    lines = [f"# {cls.title} (`{cls.name}`)", "", cls.summary, "", f"**When to use it.** {cls.when}", ""]
    if cls.paper:
        link = f", [arXiv:{cls.paper.arxiv}](https://arxiv.org/abs/{cls.paper.arxiv})" if cls.paper.arxiv else ""
        lines += [f"**Paper.** {cls.paper.authors}: *{cls.paper.title}*, {cls.paper.venue}{link}.", ""]
    needs = {
        "nothing": "no data.",
        "calibration": "calibration data, one pass over it per block to collect and one to go on.",
    }
    lines += [f"**Needs.** {needs.get(cls.needs, cls.needs)}", ""]
    lines += ["| option | default | range | |", "|---|---|---|---|"]
    for option in facts["options"]:
        default = "–" if option["default"] is None else f"`{option['default']}`"
        lines.append(f"| `{option['name']}` | {default} | {option['range']} | {option['description']} |")
    example = f"bh.prune(model, bh.{cls.__name__}({_example(cls)}), batches)"
    shell = " --sparsity 0.5" if "sparsity" in cls.model_fields else ""
    lines += ["", "```bash", f"billhook prune demo --method {cls.name}{shell} --out out/{cls.name}", "```"]
    lines += ["```python", example, "```", ""]
    return "\n".join(lines)


def _example(cls: type[Method]) -> str:
    return "sparsity=0.5" if "sparsity" in cls.model_fields else ""


def _range(field: FieldInfo) -> str:
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    if choices:
        return ", ".join(map(str, choices))
    limits = []
    for rule in field.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if hasattr(rule, attribute):
                limits.append(f"{sign} {getattr(rule, attribute)}")
    if limits:
        return ", ".join(limits)
    kind = field.annotation
    return "yes, no" if kind is bool else getattr(kind, "__name__", str(kind))
