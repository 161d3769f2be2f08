"""Declared things: hyperparameters as typed fields, a card, and a name that users type.

Methods, allocations and refiners are all declared this way. Command-line options, recipes, error sentences and
cards derive from the declaration. Parts of a method are written as text, `owl` or `owl(limit=0.1)`, so that an
option of the command line, a line of a recipe and the record of a run all say the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from billhook.errors import BillhookError, nearest


@dataclass(frozen=True)
class Paper:
    """Where something is published."""

    title: str
    authors: str
    venue: str
    arxiv: str | None = None


class Declared(BaseModel):
    """Base of everything with declared hyperparameters.

    A subclass declares them as fields (type, default, range, a sentence) and its card as class variables.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    kind: ClassVar[str]  # "method", "allocation", ...: the word in error sentences
    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[Paper | None]
    summary: ClassVar[str]  # what it does, one sentence
    when: ClassVar[str]  # when to use it, and when not

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise BillhookError(_sentence(error, type(self))) from None

    def options(self) -> dict[str, Any]:
        """The hyperparameters as plain values."""
        return self.model_dump(mode="json")

    def text(self) -> str:
        """As users type it: the name, and the options that are not at their defaults."""
        own = self.options()
        fields = type(self).model_fields
        usual = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
        given = [f"{key}={_written(value)}" for key, value in own.items() if value != usual[key]]
        return f"{self.name}({', '.join(given)})" if given else self.name


T = TypeVar("T", bound=Declared)
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """Classes of one kind by the name that users type."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, type[T]] = {}

    def add(self, name: str, cls: type[T]) -> None:
        cls.name = name
        self._known[name] = cls

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator: make a class of this kind known under the name that users type."""

        def add(cls: C) -> C:
            self.add(name, cls)
            return cls

        return add

    def known(self) -> dict[str, type[T]]:
        """All classes by name, sorted."""
        return dict(sorted(self._known.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.known())

    def make(self, name: str, /, **options: Any) -> T:
        """An instance by name.

        Raises:
            BillhookError: no such name or option (names the nearest), or a value out of range.
        """
        if name not in self._known:
            raise BillhookError(f"No {self.kind} {name!r}{nearest(name, self._known)}: there are {', '.join(self)}.")
        return self._known[name](**options)

    def parse(self, given: Any, **more: Any) -> T:
        """An instance from text such as `owl(limit=0.1)`, a mapping `{"name": "owl", "limit": 0.1}`, or itself.

        `more` are options beside those in the text.

        Raises:
            BillhookError: as `make`; or text that is not a name with options.
        """
        if isinstance(given, Declared):
            if type(given) in self._known.values():
                return given  # type: ignore[return-value]
            raise BillhookError(f"{type(given).__name__} is not a registered {self.kind}: there are {', '.join(self)}.")
        if isinstance(given, Mapping):
            options = {str(key): value for key, value in given.items()}
            return self.make(str(options.pop("name", "")), **options)
        match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", str(given), re.DOTALL)
        if match is None and (text := str(given).strip()).count("(") != text.count(")"):
            raise BillhookError(
                f"In {text!r} a parenthesis is open or too many: options are written as name(key=value, ...)."
            )
        if match is None:
            raise BillhookError(f"{str(given)!r} is not the name of a known {self.kind}: there are {', '.join(self)}.")
        return self.make(match[1], **{**self._options(match[1], match[2] or ""), **more})

    def _options(self, name: str, text: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for part in split_outside(text, ","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not key.isidentifier():
                raise BillhookError(
                    f"{self.kind.capitalize()} {name}: options are written as {name}(key=value, ...), not {part!r}."
                )
            options[key] = _read(value)
        return options


def split_outside(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators that are not inside parentheses, stripped, without empty ones."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the field's own check says what is wrong with it


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, float) else str(value)


def _sentence(error: ValidationError, cls: type[Declared]) -> str:
    """One sentence for the first thing that is wrong with the options of something declared."""
    first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    label = f"{cls.kind.capitalize()} {getattr(cls, 'name', cls.__name__)}"
    if first["type"] == "extra_forbidden":
        known = list(cls.model_fields)
        if not known:
            return f"{label} has no options, so no {option!r}."
        return f"{label} has no option {option!r}{nearest(option, known)}: it has {', '.join(known)}."
    message = str(first["msg"]).removeprefix("Value error, ")
    if not option:
        return f"{label}: {message}."
    return f"{label}: {option}={first['input']!r} is not possible: {message[0].lower()}{message[1:]}."
