"""minitron: a declarative compiler for smaller language models.

The four packages `specs`, `compiler`, `runtime` and `cli` stand at the top of the repository and are linked here,
so that they are imported as `minitron.specs` and so on. Importing `minitron` imports none of them.
"""

__version__ = "0.1.0"
