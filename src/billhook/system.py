"""What the operating system and the packages say about this run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from billhook.errors import BillhookError


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes, from the operating system."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would start from the parent's memory at the time of the fork
        match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        if match:
            return int(match[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without taking them from others."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8", errors="replace"))
        name = match[1].strip() if match else name
    result: dict[str, Any] = {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        result["accelerator"] = torch.cuda.get_device_name()
    return result


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    result = {"python": platform.python_version()}
    for package in ("billhook", "torch", "transformers", "safetensors"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def parse_bytes(text: str) -> int:
    """Bytes of "2GB", "512MiB", "800M", "1.5g" or a plain number.

    Raises:
        BillhookError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise BillhookError(f"{text!r} is not an amount of memory: write for example 2GB or 800MiB.")
    power = " kmgt".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_device(text: str) -> torch.device:
    """The compute device; "auto" takes CUDA where there is one.

    Raises:
        BillhookError: it is not a device, or not one of this machine.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise BillhookError(f"{text!r} is not a device: use auto, cpu, cuda, cuda:0 or mps.") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise BillhookError(f"Device {text!r} is not available on this machine: use --device cpu or auto.")
    return device


_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(text: str) -> torch.dtype | None:
    """A weight dtype; None for "auto" (the model's own).

    Raises:
        BillhookError: unknown name.
    """
    if text == "auto":
        return None
    if text not in _DTYPES:
        raise BillhookError(f"{text!r} is not a dtype: use auto, float32, bfloat16 or float16.")
    return _DTYPES[text]


def finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; one pass and no temporary (minimum and maximum carry NaN and infinity)."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def release_memory() -> None:
    """Give freed heap memory back to the system (glibc keeps it otherwise, and fragments)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory`, where the system can (Linux); elsewhere it stays the peak so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
