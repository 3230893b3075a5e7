"""The `coordinates` check: coordinates.safetensors has what the student keeps of the teacher's hidden states."""

from __future__ import annotations

from minitron.compiler.emit.coordinates import same_coordinates
from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.routes import Routes
from minitron.specs.builds import COORDINATES


def coordinates(routes: Routes) -> Check | None:
    """Compares the coordinates that training reduces hidden states to with those of the student; None where it has none."""
    path, kept = routes.subject.build / COORDINATES, routes.subject.coordinates
    if not path.exists():
        return None
    same = kept is not None and same_coordinates(path, kept)
    wrong = None if same else f"{COORDINATES} is not what the student keeps of the teacher's hidden states"
    return exactly("coordinates", wrong, "the coordinates of the hidden states are those that the student keeps")
