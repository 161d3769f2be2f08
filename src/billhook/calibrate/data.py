"""Texts for calibration and evaluation, and the token windows cut from them.

A text source is named by a spec string:

- `wikitext2`: WikiText-2 (raw) from the Hugging Face hub; train for calibration, test for evaluation;
- `c4`: the first English shard of C4 from the hub; train for calibration, validation for evaluation;
- `text:PATH`: a file of one's own: plain text, `.jsonl`/`.json` (one object with a key `text` per line) or
  `.parquet` (a string column `text`), each also compressed (`.gz`, `.xz`, `.bz2`); the last fifth is held
  out for evaluation;
- `demo`: articles of the English Wikipedia of 2016 that pip can fetch; the last fifth is held out.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from billhook.calibrate import wikiprose
from billhook.errors import BillhookError, nearest
from billhook.models.fetch import PinnedFile, cache_dir, fetch_with_pip, work_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "evaluation"]

_log = logging.getLogger("billhook")

_HELD_OUT = 0.2
# How far from the wanted place, as a share of the text, a cleaner cut may lie before a finer one is taken.
_CUT_TOLERANCE = 0.1

BATCH_TOKENS = 2048
# The C4 protocol redraws documents until one is long enough; a bound turns an endless search into an error.
_MAX_DRAWS = 20_000
_C4_VALIDATION_DOCUMENTS = 1100

_DEMO_DUMP = PinnedFile(
    what="the demo text",
    package="gensim",
    version="4.3.3",
    wheel_sha256="6237a50de4da7a037b19b2b6c430b6537243dcdedebf94afeb089e951953e601",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # The wheels differ by machine, the data file does not: one wheel serves every machine.
    host_tags=(
        "--platform", "manylinux_2_17_x86_64", "--python-version", "3.12",
        "--implementation", "cp", "--abi", "cp312",
    ),
)  # fmt: skip
# Part of the cached file's name: a change of the cleaning or of the dump must change it.
_DEMO_VERSION = 1
_DEMO_TEXT_SHA256 = "2916d9d1d46d2fac3eef5db893247d78be4ecae59865625a219e7357674bfd1b"
_DEMO_MIN_CHARACTERS = 1000
# Evaluation takes the beginning of every held-out article: more topics in the same number of tokens.
_DEMO_EVALUATION_CHARACTERS = 25_000

_HUB_NAMES = ("wikitext2", "c4")


def documents(spec: str, split: Split) -> list[str]:
    """The documents of one part of a text source, in order.

    For `wikitext2` these are the data set's rows as they are, empty ones included; elsewhere every document
    has text. The calibration and the evaluation part never share text.

    Raises BillhookError for an unknown spec, an unreadable, empty or malformed file, a missing optional
    package, or a source that cannot be reached.
    """
    _check_split(split)
    kind, path = _parse(spec)
    if kind == "text":
        held_in, held_out = _split_documents(_read_file(path), str(path))
        return held_in if split == "calibration" else held_out
    if kind == "demo":
        return _demo_documents(split)
    return [str(text) for text in _hub_texts(kind, split)]


def joined(spec: str, split: Split) -> str:
    """One part of a text source as one string, joined as the pruning papers join it.

    `wikitext2`: all rows, empty ones included, with a blank line between; `c4` for evaluation: the first
    1100 documents with a space between; otherwise all documents with a blank line between. Raises what
    `documents` raises.
    """
    texts = documents(spec, split)
    if spec == "c4" and split == "evaluation":
        return " ".join(texts[:_C4_VALIDATION_DOCUMENTS])
    return "\n\n".join(texts)


def token_stream(spec: str, tokenizer: PreTrainedTokenizerBase, split: Split) -> torch.Tensor:
    """Token ids of `joined(spec, split)`, tokenized once as a single string; LongTensor [n], on the CPU.

    Special tokens are those the tokenizer adds by default. Raises what `documents` raises.
    """
    return _tokenize(tokenizer, joined(spec, split))


def calibration(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 32,
    length: int = 512,
    seed: int = 0,
    batch: int | None = None,
) -> list[torch.Tensor]:
    """Random windows of the calibration part, in batches.

    Returns LongTensors [b, length] of token ids on the CPU, `samples` rows in all; the last batch may have
    fewer rows. `batch` is b; None chooses it so that a batch holds about 2048 tokens. Windows are drawn with
    replacement, starting anywhere in the token stream; for `c4`, each lies in one random document that is
    longer than `length`. Where the tokenizer has a classification token and a separator, as an encoder's does, they are
    the first and last token of each window. The same seed gives the same windows.

    Raises BillhookError if an argument is out of range or there are too few tokens (`length + samples` are
    needed), and what `documents` raises.
    """
    _at_least("samples", samples, 1)
    _at_least("length", length, 2)
    if batch is not None:
        _at_least("batch", batch, 1)
    rng = random.Random(seed)
    if spec == "c4":
        texts = _hub_texts("c4", "calibration")
        rows = [_window_of_document(texts, tokenizer, length, rng) for _ in range(samples)]
    else:
        stream = token_stream(spec, tokenizer, "calibration")
        found, needed = len(stream), length + samples
        if found < needed:
            raise BillhookError(
                f"The calibration part of {spec} has {found} tokens, but {samples} different windows of "
                f"{length} tokens need at least {needed}: lower samples or length, or use a longer text."
            )
        starts = [rng.randint(0, found - length - 1) for _ in range(samples)]
        rows = [stream[start : start + length] for start in starts]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is not None and last is not None:
        rows = [torch.cat([row.new_tensor([first]), row[1:-1], row.new_tensor([last])]) for row in rows]
    size = max(1, BATCH_TOKENS // length) if batch is None else batch
    return [torch.stack(rows[first : first + size]) for first in range(0, samples, size)]


def evaluation(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, length: int = 2048, windows: int | None = None
) -> torch.Tensor:
    """Consecutive windows from the start of the evaluation part, without overlap.

    Returns a LongTensor [n, length] of token ids on the CPU; n is `windows`, or as many as fit where that
    is None. The remainder is dropped. Raises BillhookError if an argument is out of range or there are too
    few tokens, and what `documents` raises.
    """
    _at_least("length", length, 2)
    if windows is not None:
        _at_least("windows", windows, 1)
    stream = token_stream(spec, tokenizer, "evaluation")
    found, needed = len(stream), length * (windows or 1)
    if found < needed:
        raise BillhookError(
            f"The evaluation part of {spec} has {found} tokens, but {windows or 1} window(s) of {length} "
            f"tokens need {needed}: lower windows or length, or use a longer text."
        )
    count = windows if windows is not None else found // length
    return stream[: count * length].reshape(count, length).clone()


def fingerprint(batches: list[torch.Tensor]) -> str:
    """16 hex digits (of a SHA-256) that identify token windows: their ids, lengths, number and order.

    `batches` are integer tensors [b, length]. How the rows are grouped into batches makes no difference.
    """
    digest = hashlib.sha256()
    for tensor in batches:
        for row in tensor.cpu().numpy().astype("<i8"):
            digest.update(f"{len(row)}:".encode())
            digest.update(row.tobytes())
    return digest.hexdigest()[:16]


def _parse(spec: str) -> tuple[str, Path]:
    if spec in (*_HUB_NAMES, "demo"):
        return spec, Path()
    kind, colon, rest = spec.partition(":")
    if kind == "text" and colon:
        if not rest.strip():
            raise BillhookError("The text source 'text:' names no file; write text:PATH.")
        return "text", Path(rest).expanduser()
    raise BillhookError(
        f"Unknown text source {spec!r}{nearest(spec, (*_HUB_NAMES, 'demo'))}; use wikitext2, c4, demo or text:PATH."
    )


def _check_split(split: str) -> None:
    if split not in get_args(Split):
        raise BillhookError(f"Unknown part {split!r} of a text source; use 'calibration' or 'evaluation'.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BillhookError(f"{name} is {value}, but must be at least {least}.")


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    # Not verbose: a stream is meant to be longer than the model's context, and the warning says otherwise.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _window_of_document(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, rng: random.Random
) -> torch.Tensor:
    longest = 0
    for _ in range(_MAX_DRAWS):
        tokens = _tokenize(tokenizer, texts[rng.randint(0, len(texts) - 1)])
        longest = max(longest, len(tokens))
        if len(tokens) > length:
            start = rng.randint(0, len(tokens) - length - 1)
            return tokens[start : start + length]
    raise BillhookError(
        f"None of {_MAX_DRAWS} random documents of c4 is longer than {length} tokens (the longest has "
        f"{longest}, {length + 1} are needed): lower length."
    )


# --- files of one's own ---------------------------------------------------------------------------------


_COMPRESSIONS: dict[str, Any] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}


def _read_file(path: Path) -> list[str]:
    if path.is_dir():
        raise BillhookError(f"{path} is a folder; text:PATH must name one file.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise BillhookError(f"There is no file {path}; check the path after 'text:'.") from None
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}.") from error

    suffix = path.suffix.lower()
    if suffix in _COMPRESSIONS:
        try:
            raw = _COMPRESSIONS[suffix](raw)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise BillhookError(
                f"{path} is not a whole {suffix} file ({error}); compress it again, or name the uncompressed file."
            ) from error
        suffix = Path(path.stem).suffix.lower()

    if suffix == ".parquet":
        texts = _parquet_texts(raw, path)
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BillhookError(
                f"{path} is not UTF-8 text (byte {error.start} cannot be decoded); convert it to UTF-8."
            ) from error
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        texts = _json_lines(text, path) if suffix in {".jsonl", ".json"} else [text]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise BillhookError(f"{path} holds no text, so no token was found: name a file with some.")
    return texts


def _json_lines(text: str, path: Path) -> list[str]:
    texts = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise BillhookError(
                f"{path}, line {number}: not a JSON object ({reason}); write one object per line."
            ) from error
        if not isinstance(row, dict):
            raise BillhookError(
                f"{path}, line {number}: not a JSON object but {type(row).__name__}; write one object per line."
            )
        if "text" not in row:
            keys = ", ".join(row) or "none"
            raise BillhookError(f"{path}, line {number}: no key 'text' (keys: {keys}); put the document under 'text'.")
        if not isinstance(row["text"], str):
            raise BillhookError(
                f"{path}, line {number}: 'text' is not a string but {type(row['text']).__name__}; make it one."
            )
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            raise BillhookError(
                f"{path}, line {number}: 'text' has half a surrogate pair at character {error.start}, which "
                "is no text; remove it."
            ) from error
        texts.append(row["text"])
    return texts


def _parquet_texts(raw: bytes, path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BillhookError(
            f'Reading {path} needs the package pyarrow; install it with pip install "billhook[data]".'
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw))
        columns = file.schema_arrow.names
        rows = file.read(columns=["text"])["text"].to_pylist() if "text" in columns else []
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BillhookError(f"{path} is not a readable parquet file ({reason}); write it again.") from error
    if "text" not in columns:
        raise BillhookError(
            f"{path} has no column 'text' (columns: {', '.join(columns) or 'none'}); put the documents under 'text'."
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, str):
            raise BillhookError(
                f"{path}, row {number}: column 'text' is not a string but {type(row).__name__}; make it one."
            )
    return rows


# --- holding out the evaluation part -------------------------------------------------------------------


def _split_documents(texts: list[str], source: str) -> tuple[list[str], list[str]]:
    """Part documents so that about the last fifth of all characters is held out.

    The cut lies between two documents where one ends near the wanted place, otherwise inside the document
    there: at a blank line, a line end, white space, or any character, the first of these that has a place
    near enough. Only white space at the cut belongs to neither part.
    """
    total = sum(map(len, texts))
    wanted = (1 - _HELD_OUT) * total
    tolerance = _CUT_TOLERANCE * total
    starts = [0, *itertools.accumulate(map(len, texts))]
    boundary = min(range(1, len(texts)), key=lambda i: abs(starts[i] - wanted), default=0)
    if boundary and abs(starts[boundary] - wanted) <= tolerance:
        return texts[:boundary], texts[boundary:]

    index = next(i for i in range(len(texts)) if starts[i + 1] >= wanted)
    before, after = _cut(texts[index], wanted - starts[index], tolerance)
    held_in, held_out = [*texts[:index], before], [*([after] if after else []), *texts[index + 1 :]]
    if held_out:
        return held_in, held_out
    if boundary:
        return texts[:boundary], texts[boundary:]
    raise BillhookError(f"{source} is too short to hold out a part for evaluation; use a longer text.")


def _cut(text: str, wanted: float, tolerance: float) -> tuple[str, str]:
    """The text before and after a cut near character `wanted`; the second is empty if it cannot be cut."""
    first = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    low, high = max(first + 1, round(wanted - tolerance)), min(last, round(wanted + tolerance))
    for separator in (r"\n[^\S\n]*\n\s*", r"\n\s*", r"\s+"):
        gaps = (match.span() for match in re.compile(separator).finditer(text, low, high))
        gap = min(gaps, key=lambda span: abs(span[0] - wanted), default=None)
        if gap is not None:
            return text[: gap[0]], text[gap[1] :]
    place = min(max(round(wanted), first + 1), last - 1)
    return (text[:place], text[place:]) if first < place < last else (text, "")


# --- demo -----------------------------------------------------------------------------------------------


def _demo_documents(split: Split) -> list[str]:
    held_in, held_out = _split_documents(_demo_articles(), "the demo text")
    if split == "calibration":
        return held_in
    return [_beginning(article, _DEMO_EVALUATION_CHARACTERS) for article in held_out]


def _beginning(text: str, limit: int) -> str:
    """The first paragraphs of a text, at least one, of at most `limit` characters together if possible."""
    kept = 0
    paragraphs: list[str] = []
    for paragraph in text.split("\n\n"):
        kept += len(paragraph) + 2
        if paragraphs and kept > limit:
            break
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _demo_articles() -> list[str]:
    target = cache_dir() / "texts" / f"wikipedia-2016-v{_DEMO_VERSION}.json"
    with contextlib.suppress(OSError, ValueError):
        articles = json.loads(target.read_text(encoding="utf-8"))
        if isinstance(articles, list) and articles and all(isinstance(text, str) for text in articles):
            return articles

    with work_folder(target.parent) as work:
        _log.info("preparing the demo text (once)")
        dump = fetch_with_pip(_DEMO_DUMP, work)
        with bz2.open(dump) as stream:
            cleaned = [wikiprose.prose(wikitext) for _, wikitext in wikiprose.articles(stream)]
        articles = [text for text in cleaned if len(text) >= _DEMO_MIN_CHARACTERS]
        text = json.dumps(articles, ensure_ascii=False, indent=0)
        if hashlib.sha256(text.encode()).hexdigest() != _DEMO_TEXT_SHA256:
            _log.warning(
                "the demo text differs slightly from the reference, because mwparserfromhell or Python is of "
                "another version; perplexities on it compare only within this installation"
            )
        finished = work / target.name
        try:
            finished.write_text(text, encoding="utf-8", newline="\n")
            finished.replace(target)
        except OSError as error:
            raise BillhookError(
                f"Cannot write the demo text to {target} ({error.strerror or error}); free some disk space, "
                "or name another cache folder in the environment variable BILLHOOK_CACHE."
            ) from error
    return articles


# --- hub ------------------------------------------------------------------------------------------------


# C4 without checks: `datasets` would miss the shards that are left out on purpose.
_HUB_SOURCES: dict[tuple[str, str], dict[str, Any]] = {
    ("wikitext2", "calibration"): {
        "path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train",
    },
    ("wikitext2", "evaluation"): {
        "path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test",
    },
    ("c4", "calibration"): {
        "path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train", "verification_mode": "no_checks",
    },
    ("c4", "evaluation"): {
        "path": "allenai/c4", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation", "verification_mode": "no_checks",
    },
}  # fmt: skip


def _hub_texts(name: str, split: Split) -> Sequence[str]:
    """The column `text` of a data set on the hub, read lazily where `datasets` can."""
    try:
        import datasets
    except ImportError as error:
        raise BillhookError(
            f"The text source {name} needs the package datasets; install it with "
            'pip install "billhook[data]", or use text:PATH.'
        ) from error
    reachable = _hub_reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            rows = datasets.load_dataset(**_HUB_SOURCES[name, split])
    except Exception as error:  # network, cache and format troubles surface as many exception types
        if not reachable:
            raise BillhookError(
                f"The Hugging Face hub cannot be reached and {name} is not in its local cache; connect to "
                "the network, or use a file of your own with text:PATH."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise BillhookError(
            f"Cannot load {name} from the Hugging Face hub ({reason}); try again, or use a file of your own "
            "with text:PATH."
        ) from error
    return _Column(rows)


class _Column(Sequence[str]):
    """The column `text` as a sequence that reads one row at a time: C4's shard fills a gigabyte."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]["text"]

    def __iter__(self) -> Iterator[str]:
        # By row would decode a batch for each; the whole column is one pass.
        return iter(self._rows["text"])


def _hub_reachable() -> bool:
    """Whether the hub answers within seconds; `datasets` itself would retry for up to minutes first."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the HTTP library's exception types differ between versions
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look at its local cache only; its environment switch is read once, at import."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, Any] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
