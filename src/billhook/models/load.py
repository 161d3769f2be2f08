"""Opening a model by the name that a user types."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from billhook.errors import BillhookError, nearest
from billhook.models.checkpoint import COMPRESSED, Checkpoint, Packed
from billhook.models.source import Streamed, attach, fill_buffers, match_keys
from billhook.surgery.slim import class_named

log = logging.getLogger("billhook")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def resolve(name: str) -> Path:
    """The Hugging Face folder that a model name stands for.

    Args:
        name: "demo", a local folder, a GGUF file, or a hub id (owner/name).

    Raises:
        BillhookError: nothing of that name can be had; says what was tried.
    """
    from billhook.models.demo import converted, demo_model

    if name == "demo":
        return demo_model()
    if not name.strip():
        raise BillhookError("No model is named: give a folder, a GGUF file or a hub id; for a first try use 'demo'.")
    path = _expanded(name)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in _PICKLES:
            raise BillhookError(
                f"{name} is a pickle, which can run code when it is loaded and is refused: save the model as a "
                "safetensors folder first."
            )
        if path.suffix.lower() == ".gguf":
            return converted(path)
        raise BillhookError(f"{name} is a file but not a GGUF file: give a model folder, a .gguf file or a hub id.")
    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.parent.is_dir()
    local |= path.suffix.lower() == ".gguf"
    if local:
        raise BillhookError(
            f"No model {name!r}: it is no local folder or GGUF file, and not a hub id of the form owner/name; for a "
            f"first try use 'demo'{nearest(name, ['demo'])}."
        )
    return _from_hub(name)


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return Path(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, max_workers=4))
    except GatedRepoError:
        raise BillhookError(
            f"The model {name!r} is gated: accept its licence on the hub and log in with 'hf auth login'."
        ) from None
    except RepositoryNotFoundError:
        raise BillhookError(f"The hub has no model {name!r} (or it is private: log in with 'hf auth login').") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BillhookError(
            f"The model {name!r} is no local folder and the hub could not be reached "
            f"({type(error).__name__}): give a local folder or GGUF file, or use 'demo'."
        ) from None


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    stream: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any]:
    """Open a model and its tokenizer.

    Args:
        name: as in `resolve`.
        dtype: floating weights are cast to it; None keeps the model's own.
        stream: leave the weights on disk and read each block when a walk comes to it.
        device: where the weights go (not for streamed models).

    Returns:
        (model in evaluation mode, tokenizer); the tokenizer is None where the folder has none (vision models).

    Raises:
        BillhookError: the folder is not a usable model; says what is wrong with it.
    """
    folder = resolve(str(name))
    checkpoint = Checkpoint.open(folder)
    model = _skeleton(folder)
    keys = match_keys(model, checkpoint)
    own = dtype or _own_dtype(checkpoint)
    if keys is None and any(isinstance(t, Packed) for t in checkpoint.tensors.values()):
        raise BillhookError(f"{folder}: the names in {COMPRESSED} do not fit the model's configuration.")
    if keys is not None:
        fill_buffers(model, checkpoint)
        refs = {param: checkpoint.tensors[key] for param, key in keys.items()}
        source = Streamed(refs, keys, checkpoint, own)
        if stream:
            attach(model, source)
        else:
            source.load(model, "", torch.device(device))
            model.tie_weights()  # type: ignore[operator]
            model.to(device)
    else:
        if stream:
            log.info("The weights of %s are stored under other names than the model's: loading it whole.", folder)
        model = _from_pretrained(type(model), folder, own).to(device)
    model.eval()
    return model, _tokenizer(folder)


def _from_pretrained(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    try:
        model: nn.Module
        model, loading = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # what is wrong with a model surfaces as many exception types
        raise BillhookError(f"{folder} cannot be loaded: {_first_line(error)}") from None
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise BillhookError(
            f"In {folder} the tensor {name!r} is {_shape(stored)}, and its config.json makes it {_shape(wanted)}: "
            "fetch the model again, or correct config.json."
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        # Transformers fills these with random numbers and only warns.
        raise BillhookError(
            f"{folder} lacks {len(missing)} tensor(s) of {cls.__name__}, the first is {missing[0]!r}: fetch the model "
            "again, or correct 'architectures' in its config.json."
        )
    return model


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _skeleton(folder: Path) -> nn.Module:
    """The model of a folder without weights; buffers that code computes (rotary tables) are real."""
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is wrong with a configuration surfaces as many exception types
        raise BillhookError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from None
    names = getattr(config, "architectures", None) or []
    cls: Any = (class_named(names[0]) or getattr(transformers, names[0], None)) if names else None
    if names and cls is None:
        log.warning(
            "%s names the class %s, which Transformers does not have: its causal language model of type %s is used.",
            folder / "config.json",
            names[0],
            config.model_type,
        )
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = (
                cls._from_config(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
            )
    except Exception as error:  # as above
        raise BillhookError(
            f"{folder / 'config.json'} does not describe a usable model: {_first_line(error)}"
        ) from None
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of the stored weights."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        raise BillhookError(f"{checkpoint.folder} holds no floating-point weights.")
    largest = max(sizes, key=lambda d: sizes[d])
    if largest.itemsize == 1:
        raise BillhookError(f"{checkpoint.folder} holds 8-bit weights: prune the unquantized model.")
    return largest


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as for the configuration
        raise BillhookError(f"The tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
