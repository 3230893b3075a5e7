from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from minitron.specs import LoadedSpec, SpecError, SpecInvalid, load_spec

# No property here is about time, and test machines are busy.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

Load = Callable[..., LoadedSpec]
Errors = Callable[..., list[SpecError]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a spec from its text, as `spec.yaml` in an empty folder."""

    def load(text: str | bytes, *overrides: str) -> LoadedSpec:
        path = tmp_path / "spec.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_spec(path, overrides)

    return load


@pytest.fixture
def errors_of(load: Load) -> Errors:
    """The errors of a spec's text, in the order in which they are shown."""

    def errors_of(text: str | bytes, *overrides: str) -> list[SpecError]:
        with pytest.raises(SpecInvalid) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return list(caught.value.errors)

    return errors_of
