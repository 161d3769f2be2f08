"""Cards of methods, allocations and refiners, generated from what each declares."""

from __future__ import annotations

import typing
from typing import Any

from pydantic.fields import FieldInfo

from billhook.declared import Declared
from billhook.methods.base import METHODS
from billhook.sparsity.allocations import ALLOCATIONS
from billhook.sparsity.refiners import REFINERS


def declared() -> dict[str, type[Declared]]:
    """Everything that has a card, by name: methods first."""
    known: dict[str, type[Declared]] = {}
    for registry in (METHODS, ALLOCATIONS, REFINERS):
        known |= {name: cls for name, cls in registry.known().items() if name != "none"}
    return known


def describe(cls: type[Declared]) -> dict[str, Any]:
    """A card as plain data."""
    paper = cls.paper
    return {
        cls.kind: cls.name,
        "title": cls.title,
        "summary": cls.summary,
        "when": cls.when,
        "needs": _needs(cls),
        "paper": paper.__dict__ if paper else None,
        "options": [
            {"name": name, "default": field.default, "range": _range(field), "description": field.description}
            for name, field in cls.model_fields.items()
        ],
    }


def card(cls: type[Declared]) -> str:
    """A card as Markdown."""
    facts = describe(cls)
    lines = [f"# {cls.title} (`{cls.name}`)", "", cls.summary, "", f"**When to use it.** {cls.when}", ""]
    if cls.paper:
        link = f", [arXiv:{cls.paper.arxiv}](https://arxiv.org/abs/{cls.paper.arxiv})" if cls.paper.arxiv else ""
        lines += [f"**Paper.** {cls.paper.authors}: *{cls.paper.title}*, {cls.paper.venue}{link}.", ""]
    needs = {
        "nothing": "no data.",
        "calibration": "calibration data.",
    }
    lines += [f"**Needs.** {needs.get(_needs(cls), _needs(cls))}", ""]
    if not facts["options"]:
        lines += ["It has no options.", ""]
        return "\n".join([*lines, *_examples(cls)])
    lines += ["| option | default | range | |", "|---|---|---|---|"]
    for option in facts["options"]:
        default = "–" if option["default"] is None else f"`{option['default']}`"
        lines.append(f"| `{option['name']}` | {default} | {option['range']} | {option['description']} |")
    return "\n".join([*lines, "", *_examples(cls)])


def _needs(cls: type[Declared]) -> str:
    return str(getattr(cls, "needs", "calibration"))


def _examples(cls: type[Declared]) -> list[str]:
    """How it is used, on the command line and in Python."""
    if cls.kind == "method":
        sparse = "sparsity" in cls.model_fields
        shell = f"--method {cls.name}" + (" --sparsity 0.5" if sparse else "")
        python = f"bh.{cls.__name__}({'sparsity=0.5' if sparse else ''})"
        if not sparse:
            shell, python = f"--method magnitude --recover {cls.name}", f"[bh.Magnitude(), {python}]"
    else:
        option = "refine" if cls.kind == "refiner" else cls.kind
        shell = f"--method wanda --sparsity 0.6 --{option} {cls.name}"
        python = f'bh.Wanda(sparsity=0.6, {option}="{cls.name}")'
    return [
        "```bash",
        f"billhook prune demo {shell} --out out/{cls.name}",
        "```",
        "```python",
        f"bh.prune(model, {python}, batches)",
        "```",
        "",
    ]


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
    kinds = [part for part in (typing.get_args(field.annotation) or (field.annotation,)) if part is not type(None)]
    return ", or ".join(_kind(part) for part in kinds)


def _kind(part: Any) -> str:
    if typing.get_origin(part) is typing.Literal:
        return ", ".join(map(str, typing.get_args(part)))
    words = {bool: "yes, no", int: "whole number", float: "number", str: "text"}
    return words.get(part, getattr(part, "__name__", str(part)))
