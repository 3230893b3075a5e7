"""The configuration of a checkpoint folder as transformers' own object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.model_config import alone, read_model_config

LONGEST_REASON = 300  # characters of a library's message that are passed on
# Keys that name code, which is not used, and files, which a student's folder does not have.
OF_CODE = ("auto_map",)
OF_THE_FOLDER = (*OF_CODE, "transformers_weights")


def load_config(folder: Path, *, without: Sequence[str] = OF_THE_FOLDER) -> Any:
    """Loads the configuration without keys that only change how the model is called, and those in `without`. Raises
    UsageError where it cannot be read."""
    from transformers import AutoConfig

    plain = {key: value for key, value in read_model_config(folder).items() if key not in without}
    try:
        with alone(plain) as only_config:
            config = AutoConfig.from_pretrained(only_config, trust_remote_code=False)
    except Exception as error:  # configuration classes raise anything; all of it is the file's fault
        raise UsageError(f"{folder / CONFIG} cannot be read by transformers: {in_one_line(error)}") from None
    config._name_or_path = str(folder)
    return config


def in_one_line(error: Exception) -> str:
    """Returns a library's message on one line: its second line often has the reason."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."
