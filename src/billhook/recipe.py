"""Recipes: a run described as data, in YAML or by the options of a command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from billhook.errors import BillhookError, nearest
from billhook.methods import Method, method, methods

_TEXT = "tag:yaml.org,2002:str"

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that people write: 1e-3 is one, and 2:4 is a pattern, not 124 in base 60."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+)",
    "tag:yaml.org,2002:float": r"[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():  # whole numbers first: the second pattern matches them too
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


class Job(BaseModel):
    """One run: a model, calibration data, and steps to take in order.

    Fields that are not given have the defaults of the command line.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: str = Field(description="hub id, local Hugging Face folder, GGUF file, or demo")
    out: Path = Field(description="folder to write")
    steps: list[dict[str, Any]] = Field(min_length=1, description="methods with their options, in order")
    data: str = Field("demo", description="calibration text: demo, wikitext2, c4 or text:PATH")
    samples: int = Field(32, ge=1, description="calibration sequences")
    length: int = Field(512, ge=2, description="tokens per calibration sequence")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    dtype: str = Field("auto", description="weight dtype: auto (the model's own), float32, bfloat16 or float16")
    precision: Literal["auto", "highest", "bf16"] = Field("auto", description="matrix products of calibration passes")
    max_memory: str | None = Field(None, description="resident memory to stay under, for example 2GB")
    storage: Literal["dense", "compressed"] = Field("dense", description="dense safetensors, or bitmask + values")
    eval: bool = Field(True, description="measure perplexity before and after")
    eval_data: str | None = Field(None, description="text to measure perplexity on; the held-out part of data")
    eval_length: int | None = Field(None, ge=2, description="tokens per evaluation window; 1024 or the model's limit")
    eval_windows: int | None = Field(40, description="at most so many evaluation windows; null for all")

    @field_validator("eval_windows")
    @classmethod
    def _some_windows(cls, count: int | None) -> int | None:
        if count is not None and count < 1:
            raise ValueError("give at least 1, or for all of them 0 on the command line and null in a recipe")
        return count

    def methods(self) -> list[Method]:
        """The steps as methods.

        Raises:
            BillhookError: an unknown method or option, or a value out of range; names the step.
        """
        result = []
        for number, step in enumerate(self.steps, start=1):
            options = dict(step)
            name = options.pop("method", None)
            if not isinstance(name, str):
                raise BillhookError(f"Step {number} of the recipe names no method: write 'method: wanda', for example.")
            for reserved in {"name", "self"} & options.keys():  # Python would take these for its own
                raise BillhookError(f"Method {name} has no option {reserved!r}.")
            result.append(method(name, **options))
        return result


def job(**values: Any) -> Job:
    """A validated job.

    Raises:
        BillhookError: one sentence on the first thing that is wrong.
    """
    try:
        return Job(**values)
    except ValidationError as error:
        raise BillhookError(_sentence(error, Job)) from None


def read_recipe(path: Path, **overrides: Any) -> Job:
    """Read a YAML recipe; `overrides` that are not None replace its values.

    Raises:
        BillhookError: unreadable file, bad YAML, a wrong key (with its line and the keys that are allowed), a value
            out of range.
    """
    return parse_recipe(text_of(path), str(path), **overrides)


def parse_recipe(text: str, name: str = "recipe", **overrides: Any) -> Job:
    """Like `read_recipe`, from a string."""
    result = parse_as(Job, text, name, _check_steps, **overrides)
    for number, step in enumerate(result.steps):
        try:
            result.model_copy(update={"steps": [step]}).methods()
        except BillhookError as error:
            tree = yaml.compose(text, Loader=_Loader)
            option = re.match(r"Method [\w-]+: (\w+)=", str(error))
            assert isinstance(tree, yaml.MappingNode)
            line = _line(tree, ("steps", number, *option.groups())) if option else _line(tree, ("steps", number))
            raise BillhookError(f"{name}{f', line {line}' if line else ''}: {error}") from None
    return result


def text_of(path: Path) -> str:
    """The text of a recipe.

    Raises:
        BillhookError: it is not there or not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BillhookError(f"There is no recipe {path}.") from None
    except IsADirectoryError:
        raise BillhookError(f"{path} is a folder: name the recipe, a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BillhookError(f"The recipe {path} cannot be read as UTF-8 text: {error}.") from None


def parse_as(
    schema: type[S],
    text: str,
    name: str,
    check: Callable[[yaml.MappingNode, str], None] = lambda tree, name: None,
    **overrides: Any,
) -> S:
    """A recipe of any kind from YAML; `overrides` that are not None replace its values.

    Args:
        schema: what the recipe describes, with a description of each key.
        text, name: the recipe, and what to call it in errors.
        check: looks at the tree before values are validated.

    Raises:
        BillhookError: bad YAML, a wrong key (with its line and the keys that are allowed), a value out of range.
    """
    try:
        tree = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML's constructors raise whatever a wrong tag leads them to
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = str(getattr(error, "problem", None) or error).strip() or type(error).__name__
        raise BillhookError(f"{where}: this is not YAML ({problem.splitlines()[0]}).") from None
    if not isinstance(values, dict) or not isinstance(tree, yaml.MappingNode):
        raise BillhookError(f"{name}: a recipe is a mapping with the keys {', '.join(schema.model_fields)}.")
    _refuse_twice(tree, name)
    allowed = list(schema.model_fields)
    for key, _ in tree.value:
        if key.tag != _TEXT or key.value not in allowed:
            raise BillhookError(
                f"{name}, line {key.start_mark.line + 1}: key {key.value!r} is not known"
                f"{nearest(str(key.value), allowed)}; allowed are {', '.join(allowed)}."
            )
    check(tree, name)
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return schema(**{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        line = _line(tree, first["loc"])
        raise BillhookError(f"{name}{f', line {line}' if line else ''}: {_sentence(error, schema)}") from None


def _refuse_twice(node: yaml.Node, name: str, above: tuple[yaml.Node, ...] = ()) -> None:
    """A key that is given twice, of which YAML would take the last."""
    if node in above:  # an alias of what it stands in
        return
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise BillhookError(
                    f"{name}, line {line}: key {key.value!r} was given in line {lines[key.value]} already: keep one."
                )
            _refuse_twice(value, name, above)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twice(value, name, above)


def _check_steps(tree: yaml.MappingNode, name: str) -> None:
    """Wrong keys inside steps, with their line."""
    for key, node in tree.value:
        if key.value != "steps" or not isinstance(node, yaml.SequenceNode):
            continue
        for step in node.value:
            if not isinstance(step, yaml.MappingNode):
                raise BillhookError(
                    f"{name}, line {step.start_mark.line + 1}: a step is a mapping such as 'method: wanda' with "
                    "its options below."
                )
            chosen = next((v.value for k, v in step.value if k.value == "method"), None)
            known = methods()
            if not isinstance(chosen, str | None):
                raise BillhookError(f"{name}, line {step.start_mark.line + 1}: 'method' is not the name of a method.")
            if chosen in known:
                allowed = ["method", *known[chosen].model_fields]
                for option, _ in step.value:
                    if option.tag != _TEXT or option.value not in allowed:
                        raise BillhookError(
                            f"{name}, line {option.start_mark.line + 1}: method {chosen} has no option "
                            f"{option.value!r}{nearest(str(option.value), allowed)}; allowed are {', '.join(allowed)}."
                        )
            elif chosen is None:
                keys = [str(k.value) for k, _ in step.value]
                meant = next((key for key in keys if nearest(key, ["method"])), None)
                instead = f" ({meant!r} is no key: did you mean 'method'?)" if meant else ""
                raise BillhookError(
                    f"{name}, line {step.start_mark.line + 1}: the step names no method{instead}: write 'method: "
                    f"wanda', for example, with its options below; there are {', '.join(known)}."
                )
            else:
                raise BillhookError(
                    f"{name}, line {step.start_mark.line + 1}: there is no method {chosen!r}"
                    f"{nearest(str(chosen), known)}; there are {', '.join(known)}."
                )


def _line(tree: yaml.MappingNode, path: tuple[int | str, ...]) -> int | None:
    """The line of the value at `path`, as far as the path can be followed."""
    node: yaml.Node = tree
    line: int | None = None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _sentence(error: ValidationError, schema: type[BaseModel]) -> str:
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{option} is missing: {schema.model_fields[option].description}."
    if first["type"] == "extra_forbidden":
        known = list(schema.model_fields)
        return f"{option!r} is not known{nearest(option, known)}; allowed are {', '.join(known)}."
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{option}={shortened(first['input'])} is not possible: {message[0].lower()}{message[1:]}."


def shortened(value: object) -> str:
    """A value as it is written in Python, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
