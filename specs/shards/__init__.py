"""Keeps the tokens of a data source on disk, in shards: `stream` reads them, `writer` writes them, `growing` reads what
another process is writing, and `process` writes them beside a training."""
