"""GGUF files for llama.cpp."""

from billhook.export.gguf.file import GGUFReport, Kind, export_gguf
from billhook.export.gguf.trial import Check

__all__ = ["Check", "GGUFReport", "Kind", "export_gguf"]
