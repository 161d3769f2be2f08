"""How matrix products of the calibration passes are computed.

Statistics are sums over many tokens and masks depend on their ranks only, so products may be rounded to
bfloat16 where the hardware is much faster at it; residual streams, statistics and solves stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "highest", "bf16"]


def resolve(precision: Precision, device: torch.device, dtype: torch.dtype) -> Literal["highest", "bf16"]:
    """What "auto" means here: bf16 for float32 models on CPUs that have it in hardware, else the model's own dtype."""
    if precision == "auto":
        fast = device.type == "cpu" and has_bf16(device)
        return "bf16" if fast and dtype == torch.float32 else "highest"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; without it such products are several times slower."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def forward_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context for forward passes."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def statistics_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Context for statistics: float32 accumulation; factors rounded to bfloat16 only if the activations were."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if precision != "bf16" or device.type != "cpu":
        with torch.autocast(device.type, enabled=False):
            yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
