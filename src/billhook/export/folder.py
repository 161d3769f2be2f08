"""The output folder: staged beside its place and renamed into it when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from billhook.errors import BillhookError
from billhook.export.compressed import compress
from billhook.models.checkpoint import Packed
from billhook.models.files import Entry, Stored, room, write, write_atomically
from billhook.models.source import Streamed, source_of
from billhook.record import FILE, Report
from billhook.report.card import model_card
from billhook.report.html import page
from billhook.surgery.slim import FILE as SLIM_FILE
from billhook.surgery.slim import is_slim, modelling_file, refresh

_SINGLE_FILE_LIMIT = 5_000_000_000
_COMPANIONS = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_OURS = {FILE, "README.md", "report.html", "model.safetensors.index.json"}
_STATE = "run.json"  # holds the fingerprint of the command that a folder belongs to


class Target:
    """An output folder and the staging folder beside it that a run works in.

    The output folder itself appears at the very end, whole; a killed run leaves only the staging folder, which
    the same command resumes from.
    """

    def __init__(self, out: Path) -> None:
        whole = Path(os.path.abspath(out))
        if Path.cwd().is_relative_to(whole):
            raise BillhookError(f"{whole} is the working folder or contains it: choose another --out.")
        self.out = out = whole if out.name == ".." else out
        self.staging = out.with_name(out.name + ".partial")

    def open(self, fingerprint: str, force: bool, marker: str = FILE) -> bool:
        """Get ready to write; returns True where the output is already there, from the same command.

        `marker` is the file that every folder of this kind of result holds.

        Raises:
            BillhookError: the place is taken by something that this command must not overwrite.
        """
        if not force:
            self.refuse_foreign(marker)
            if self.out.exists():
                if self._fingerprint(marker) == fingerprint:
                    return True
                raise BillhookError(
                    f"{self.out} holds the result of another billhook command: choose another --out, or overwrite "
                    "it with --force."
                )
        state = self.staging / _STATE
        self.refuse_foreign_staging()
        if state.is_file() and _read_fingerprint(state) != fingerprint:
            if not force:
                raise BillhookError(
                    f"{self.staging} holds an unfinished run with other options or data: run that command again "
                    "to finish it, or discard it with --force."
                )
            shutil.rmtree(self.staging)
        self._stage(fingerprint)
        return False

    def fresh(self) -> Path:
        """Get ready to write something that cannot be resumed; returns the path of the folder to make.

        Raises:
            BillhookError: the staging folder's place is taken or cannot be written.
        """
        self.refuse_foreign_staging()
        self.discard()
        self._stage(None)
        return self.staging / "result"

    def _stage(self, fingerprint: str | None) -> None:
        state = self.staging / _STATE
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            if not state.is_file():
                write_atomically(state, [json.dumps({"fingerprint": fingerprint}).encode()])
        except OSError as error:
            raise BillhookError(f"{self.out} cannot be written: {error.strerror}; choose another --out.") from None

    def publish(self, result: Path) -> None:
        """Rename `result` (inside the staging folder) to the output folder and drop the rest."""
        old = self.staging / "replaced"
        if self.out.exists():
            os.rename(self.out, old)
        try:
            os.rename(result, self.out)
        except BaseException:
            if old.exists():
                os.rename(old, self.out)
            raise
        shutil.rmtree(self.staging, ignore_errors=True)

    def discard(self) -> None:
        """Drop what was staged."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _fingerprint(self, marker: str) -> object:
        return _read_fingerprint(self.out / (marker if marker == FILE else _STATE))

    def refuse_foreign_staging(self) -> None:
        """Raise unless the staging folder is absent, empty or billhook's own."""
        foreign = self.staging.exists() and not (self.staging / _STATE).is_file()
        if foreign and not (self.staging.is_dir() and not any(self.staging.iterdir())):
            raise BillhookError(f"{self.staging} is in the way and was not written by billhook: move it away.")

    def refuse_foreign(self, marker: str = FILE) -> None:
        """Raise unless the output folder is absent or billhook's own."""
        if self.out.exists() and not any((self.out / name).is_file() for name in {marker, FILE}):
            raise BillhookError(
                f"{self.out} exists and was not written by billhook: choose another --out, or overwrite it with "
                "--force."
            )


def _read_fingerprint(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None


def assemble(model: nn.Module, tokenizer: Any, result: Path, storage: str = "dense") -> None:
    """Write weights, configuration and tokenizer of an edited model into the new folder `result`.

    A streamed model's tensors are copied from where they lie, never all in memory; models over 5 GB keep one
    shard per block.
    """
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir(parents=True)
    source = source_of(model)
    if is_slim(model):
        refresh(model)
    if isinstance(source, Streamed):
        _companions(source, result)
        _weights(source, result, model)
        if source.reshaped:
            config: Any = model.config
            config.dtype = source.dtype
            config.save_pretrained(result)
    else:
        if not hasattr(model, "save_pretrained"):
            raise BillhookError(
                f"{type(model).__name__} is not a Transformers model, so it has no folder format: save its "
                "state_dict() yourself."
            )
        model.save_pretrained(result)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(result)
    if is_slim(model):
        (result / SLIM_FILE).write_text(modelling_file(model), encoding="utf-8")
    if storage == "compressed":
        compress(result)


def write_pages(report: Report, result: Path, name: str) -> None:
    """billhook.json, the report page and the model card."""
    report.write(result)
    (result / "report.html").write_text(page(report), encoding="utf-8")
    (result / "README.md").write_text(model_card(report, name), encoding="utf-8")


def save(
    model: nn.Module, tokenizer: Any, out: str | Path, report: Report | None = None, *, force: bool = False
) -> Path:
    """Write a model in memory as a plain Hugging Face folder, with its report if there is one. Returns the folder.

    Raises:
        BillhookError: `out` exists (unless `force`), the disk is full, or the model is still on disk (streamed).
    """
    if source_of(model).streams:
        raise BillhookError("A streamed model was already written by prune(..., out=...): there is nothing to save.")
    target = Target(Path(out))
    if target.out.exists() and not force:
        raise BillhookError(f"{target.out} exists: choose another folder, or pass force=True.")
    result = target.fresh()
    try:
        with room(target.out.parent, "save again"):
            assemble(model, tokenizer, result)
            if report is not None:
                report.modelling = SLIM_FILE if is_slim(model) else None
                write_pages(report, result, target.out.name)
    except BaseException:
        target.discard()
        raise
    target.publish(result)
    return target.out


def _companions(source: Streamed, result: Path) -> None:
    """Everything of the model folder that is not weights."""
    for path in sorted(source.checkpoint.folder.iterdir()):
        if path.is_file() and path.suffix in _COMPANIONS and path.name not in _OURS:
            shutil.copyfile(path, result / path.name)
    config = source.checkpoint.config
    name = str(source.dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config and config[key] != name:
            config[key] = name
            (result / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _weights(source: Streamed, result: Path, model: nn.Module) -> None:
    edited = {source.keys[param]: ref for param, ref in source.refs.items() if param in source.keys}
    originals: Mapping[str, Stored | Packed] = source.checkpoint.tensors
    if source.reshaped:  # names and shapes are the model's own
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        present = {name for name, _ in model.named_parameters()}  # some may have gone with the parts they belonged to
        edited = {param: ref for param, ref in source.refs.items() if param in present and param not in tied}
        originals = edited
    entries: dict[str, Entry] = {}
    shards: dict[str, list[str]] = {}  # file of an edited block, or "" for the rest -> keys
    renamed: set[str] = set()
    for key, original in originals.items():
        ref = edited.get(key, original)
        entries[key] = _entry(key, ref, source)
        own = isinstance(ref, Stored) and ref.file not in source.checkpoint.files
        home = str(ref.file) if own and isinstance(ref, Stored) else ""
        shards.setdefault(home, []).append(key)
        if not own or (isinstance(ref, Stored) and ref.key != key):
            renamed.add(home)
    if sum(e.nbytes for e in entries.values()) <= _SINGLE_FILE_LIMIT:
        write(result / "model.safetensors", entries.values())
        return
    weight_map: dict[str, str] = {}
    for number, (home, keys) in enumerate(sorted(shards.items()), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(keys, name))
        if home not in renamed and _link(Path(home), result / name):
            continue
        write(result / name, [entries[key] for key in keys])
    index = {
        "metadata": {"total_size": sum(e.nbytes for e in entries.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_atomically(result / "model.safetensors.index.json", [json.dumps(index, indent=1).encode()])


def _entry(key: str, ref: Stored | Packed, source: Streamed) -> Entry:
    floating = ref.dtype.is_floating_point
    if isinstance(ref, Stored) and (not floating or ref.dtype == source.dtype):
        return Entry.copy(ref, key)
    dtype = source.dtype if floating else ref.dtype
    return Entry(key, dtype, ref.shape, lambda: Entry.of(key, ref.read().to(dtype)).chunks())


def _link(existing: Path, new: Path) -> bool:
    """A second name for the same bytes where the file system can; a shard is then not written twice."""
    try:
        os.link(existing, new)
    except OSError:
        return False
    return True
