"""Files of other programs' formats, made from a build."""

from minitron.runtime.export.gguf_file import export_gguf

__all__ = ["export_gguf"]
