"""Writing finished models: plain Hugging Face folders, and compressed storage."""

from billhook.export.compressed import compress, expand
from billhook.export.folder import Target, assemble, save, write_pages

__all__ = ["Target", "assemble", "compress", "expand", "save", "write_pages"]
