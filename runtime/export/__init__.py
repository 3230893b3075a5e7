"""Exports of a build to file formats of other programs."""

from minitron.runtime.export.gguf_file import export_gguf

__all__ = ["export_gguf"]
