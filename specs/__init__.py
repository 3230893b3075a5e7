"""The spec language: the models of what a user writes, and the checks on it. Imports neither torch nor the other
packages."""

from minitron.specs.errors import MinitronError, SpecError, SpecInvalid, UsageError, WorkError
from minitron.specs.load import LoadedSpec, load_spec
from minitron.specs.recipes import recipe_names, recipe_text, starting_spec
from minitron.specs.schema import json_schema_text
from minitron.specs.spec import Spec

__all__ = [
    "LoadedSpec",
    "MinitronError",
    "Spec",
    "SpecError",
    "SpecInvalid",
    "UsageError",
    "WorkError",
    "json_schema_text",
    "load_spec",
    "recipe_names",
    "recipe_text",
    "starting_spec",
]
