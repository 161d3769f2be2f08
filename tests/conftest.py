"""Fixtures that several test folders use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set before Transformers is imported: tests must never reach for a network by accident.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tiny import build, tiny_tokenizer, write_text


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(family, name="model", **save_options) writes a Hugging Face folder of a tiny model."""

    def make(family: str = "llama", name: str = "model", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / name
        model = build(family).to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder, **options)
        if not family.startswith(("vit", "deit")):
            tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file for calibration and evaluation."""
    return write_text(tmp_path / "corpus.txt")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real demo model; fetched once."""
    from billhook.models.demo import demo_model as fetch

    return fetch()
