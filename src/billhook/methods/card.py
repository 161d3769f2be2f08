"""Cards of methods and their parts, generated from what each declares."""

from __future__ import annotations

import typing
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from billhook.declared import Declared
from billhook.merging import IFM
from billhook.methods.base import METHODS
from billhook.methods.consensus import ConsensusGates
from billhook.sparsity.allocations import ALLOCATIONS
from billhook.sparsity.refiners import REFINERS
from billhook.training import PRUNERS, RUNS

KINDS = {
    "method": "prunes a trained model",
    "allocation": "shares sparsity out over layers",
    "refiner": "improves a mask",
    "pruner": "prunes while an optimizer trains",
    "procedure": "owns several training runs",
    "gating": "learns gates with the weights",
    "merging": "merges what is alike",
}  # what has cards, and what each kind does


def declared() -> dict[str, type[Declared]]:
    """Everything that has a card, by name: methods first."""
    known: dict[str, type[Declared]] = {}
    for registry in (METHODS, ALLOCATIONS, REFINERS, PRUNERS, RUNS):
        known |= {name: cls for name, cls in registry.known().items() if name != "none"}
    return known | {cls.name: cls for cls in (ConsensusGates, IFM)}


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
            {"name": name, "default": _default(field), "range": _range(field), "description": field.description}
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
        "training": "a training loop.",
    }
    lines += [f"**Needs.** {needs.get(_needs(cls), _needs(cls))}", ""]
    if not facts["options"]:
        lines += ["It has no options.", ""]
        return "\n".join([*lines, *_examples(cls)])
    lines += ["| option | default | range | |", "|---|---|---|---|"]
    for option in facts["options"]:
        default = "–" if option["default"] in (None, []) else f"`{option['default']}`"
        lines.append(f"| `{option['name']}` | {default} | {option['range']} | {option['description']} |")
    return "\n".join([*lines, "", *_examples(cls)])


def _needs(cls: type[Declared]) -> str:
    return str(getattr(cls, "needs", "calibration"))


def _examples(cls: type[Declared]) -> list[str]:
    """How it is used, on the command line and in Python."""
    made = f"bh.{cls.__name__}(" + ("sparsity=0.9)" if "sparsity" in cls.model_fields else ")")
    attached = f"{made}.attach(model, optimizer, total_steps=steps"

    def loop(name: str, loss: str) -> list[str]:
        steps = ["optimizer.zero_grad()", f"{loss}.backward()", "optimizer.step()", f"{name}.step()"]
        return ["for x, y in batches:", *(f"    {step}" for step in steps)]

    inside = {
        "pruner": [f"pruner = {attached})", *loop("pruner", "loss_fn(model(x), y)"), "pruner.finalize()"],
        "procedure": [f"result = {made}.run(model, train=my_train_function)"],
        "gating": [
            f"gates = {attached}, example=x)",
            *loop("gates", "(loss_fn(model(x), y) + gates.loss())"),
            "gates.consensus(batches)",
            "small = gates.finalize()",
        ],
        "merging": [f"small, report = bh.{cls.__name__}().merge(model, example=x)"],
    }.get(cls.kind)
    if inside is not None:
        return ["```python", *inside, "```", ""]
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


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else value


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
