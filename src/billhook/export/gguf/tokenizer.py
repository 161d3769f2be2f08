"""The tokenizer of a model folder in the terms of llama.cpp.

It has two kinds of BPE. One, `gpt2`, cuts text into words, takes their bytes, and merges pairs in a given order. The
other, `llama`, is SentencePiece's: it takes characters, or bytes where there is no token for one, and of all neighbours
that make a token together merges those first that make the token of the highest score.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.export.gguf.tensors import ALTERNATIVE

_GPT2, _DIGITS = "bytes and words", "digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a tokenizer cuts text into words, and whether it takes a word that is a token without merging -> the name that
# llama.cpp has for it. (llama.cpp's own converter recognises known tokenizers by the tokens of a test text.)
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((_WORDS % r"\p{N}{1,3}",), False): "smaug-bpe",
    ((_WORDS % r"\p{N}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_SPACE, _BYTE = "▁", re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's part of the metadata: of SentencePiece's kind where tokens have scores."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float] | None
    ids: dict[str, int]  # bos, eos, unk, pad
    add_bos: bool
    add_eos: bool
    add_space: bool  # before the first word
    template: str | None


def write_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    for name, identity in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(identity)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def vocabulary_of(folder: Path, model: Any) -> Vocabulary:
    """The tokenizer of a folder in the terms of llama.cpp.

    Raises:
        BillhookError: there is none, or llama.cpp knows none like it.
    """
    from gguf import TokenType

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BillhookError(f"{folder} has no tokenizer.json, from which GGUF's tokenizer is made: add it.")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        bpe = spec["model"]
        kind, vocab, added = bpe.get("type", "BPE"), bpe["vocab"], spec.get("added_tokens") or []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BillhookError(f"{path} is damaged: fetch the model again.") from None
    if kind != "BPE":
        raise _unknown_tokenizer(path, f"is of type {kind}")
    pieces = bool(bpe.get("byte_fallback"))
    pre, add_space = ("default", _adds_space(spec, path)) if pieces else (_pre_tokenizer(spec, path), False)

    rows = int(model.config.vocab_size)
    tokens = [f"[UNUSED{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    special = {token["content"]: token["id"] for token in added}
    largest = max([*vocab.values(), *special.values()])
    if largest >= rows:
        raise BillhookError(
            f"{path} has token {largest}, but the model only {rows} embeddings: use the right tokenizer."
        )
    for text, identity in vocab.items():
        is_byte = pieces and _BYTE.fullmatch(text)
        tokens[identity], types[identity] = text, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = int(TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    scores = _scores(merges, tokens, set(special), path) if pieces else None
    settings = _json(folder / "tokenizer_config.json")
    ids = _special_ids(settings, {**vocab, **special}, model)
    if "eos" not in ids:
        raise BillhookError(f"{folder} names no end-of-text token, which GGUF needs: add eos_token_id to config.json.")
    add_bos, add_eos = _added_ends(path, settings, ids)
    return Vocabulary(pre, tokens, types, merges, scores, ids, add_bos, add_eos, add_space, _template(folder, settings))


def _unknown_tokenizer(path: Path, what: str) -> BillhookError:
    return BillhookError(
        f"The tokenizer {path} {what}; GGUF export converts byte-level BPE tokenizers in the manner of GPT-2, SmolLM, "
        f"Llama 3, Qwen 2 and Mistral Nemo, and SentencePiece ones like those of Llama 2 and Gemma: {ALTERNATIVE}."
    )


def _adds_space(spec: dict[str, Any], path: Path) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the first word of a text."""
    add, marked = False, False
    for step in [*_steps(spec.get("normalizer"), "normalizers"), *_steps(spec.get("pre_tokenizer"), "pretokenizers")]:
        kind, space = step.get("type"), step.get("pattern") == {"String": " "}
        if kind == "Prepend" and step.get("prepend") == _SPACE:
            add = True
        elif kind == "Replace" and space and step.get("content") == _SPACE:
            marked = True
        elif kind == "Metaspace" and step.get("replacement") == _SPACE:
            add, marked = step.get("prepend_scheme", "always") != "never", True
        elif not (kind == "Split" and space and marked):  # where spaces are marked there are none to split at
            raise _unknown_tokenizer(path, f"changes or splits the text first ({kind})")
    if not marked:
        raise _unknown_tokenizer(path, "does not mark spaces as SentencePiece does")
    return add


def _scores(merges: list[str], tokens: list[str], special: set[str], path: Path) -> list[float]:
    """A score for each token, the higher the earlier it is merged."""
    rank: dict[str, int] = {}
    latest = ""
    for merge in merges:
        token = merge.replace(" ", "")
        if token != latest and token in rank and token not in special:
            raise _unknown_tokenizer(path, f"merges the pairs that make {token!r} at different times")
        rank.setdefault(token, len(rank))
        latest = token
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be one or a sequence."""
    if not part:
        return []
    steps: list[dict[str, Any]] = part.get(inner, []) if part.get("type") == "Sequence" else [part]
    return steps


def _pre_tokenizer(spec: dict[str, Any], path: Path) -> str:
    normalizer = spec.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":  # llama.cpp does without NFC, which most text already has
        raise _unknown_tokenizer(path, f"changes the text before splitting it ({normalizer.get('type')})")
    signs: list[str] = []
    bytes_seen = False
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space") and not bytes_seen:
            bytes_seen = True
            if step.get("use_regex", True):
                signs.append(_GPT2)
        elif kind == "Digits" and step.get("individual_digits"):
            signs.append(_DIGITS)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            signs.append(step.get("pattern", {}).get("Regex", ""))
        else:
            signs.append(str(kind))
    name = _PRE_TOKENIZERS.get((tuple(signs), bool(spec["model"].get("ignore_merges"))))
    if not bytes_seen or name is None:
        raise _unknown_tokenizer(path, "splits text by rules that have no name in llama.cpp")
    return name


def _special_ids(settings: dict[str, Any], vocab: dict[str, int], model: Any) -> dict[str, int]:
    """bos, eos, unk, pad -> token, from the tokenizer's settings or else the model's."""
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        identity = vocab.get(text) if text is not None else None
        if identity is None and name != "unk":
            identity = getattr(model.config, f"{name}_token_id", None)
            identity = identity[0] if isinstance(identity, list) and identity else identity
        if isinstance(identity, int) and 0 <= identity < model.config.vocab_size:
            ids[name] = identity
    return ids


def _added_ends(path: Path, settings: dict[str, Any], ids: dict[str, int]) -> tuple[bool, bool]:
    """Whether encoding puts the bos token before a text and the eos token behind it."""
    tokenizer = tokenizer_of(path)
    bare, whole = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    add_bos = whole[: len(whole) - len(bare)] == [ids.get("bos")] or whole[:1] == [ids.get("bos")] != bare[:1]
    add_eos = whole[-1:] == [ids.get("eos")] != bare[-1:]
    if whole != [ids.get("bos")] * add_bos + bare + [ids.get("eos")] * add_eos:
        raise _unknown_tokenizer(path, "adds tokens other than bos and eos to every text")
    return bool(settings.get("add_bos_token", add_bos)), bool(settings.get("add_eos_token", add_eos))


def tokenizer_of(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise BillhookError(f"{path} cannot be loaded ({error}): fetch the model again.") from None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BillhookError(f"{path} is damaged: fetch the model again.") from None
    return result


def encode(tokenizer: Any, vocabulary: Vocabulary, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return (
        [vocabulary.ids["bos"]] * (vocabulary.add_bos and "bos" in vocabulary.ids)
        + ids
        + [vocabulary.ids["eos"]] * vocabulary.add_eos
    )
