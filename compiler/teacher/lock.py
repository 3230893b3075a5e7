"""Makes the lock of a spec from its present inputs, and compares the two."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from minitron import __version__
from minitron.compiler.teacher.provenance import observe
from minitron.specs.atomic import write_text
from minitron.specs.errors import MinitronError, SpecError, SpecInvalid, UsageError
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import Inputs, lock_path, pins, read_lock, render_lock, stale

LIBRARIES = ("torch", "transformers")


def make_lock(loaded: LoadedSpec) -> Inputs:
    """Returns the contents of a lock, with revisions resolved as of now. Raises SpecInvalid for a missing input, and for a
    data set whose commit cannot be resolved offline."""
    assert not loaded.pins, "a lock is made from the spec as it is written"
    return observe(loaded, offline_will_do=False) | {"versions": versions()}


def renew(loaded: LoadedSpec) -> tuple[Inputs, bool]:
    """Writes the lock file where it differs from the present inputs. Returns its contents, and whether it was
    written."""
    inputs, path = make_lock(loaded), lock_path(loaded)
    text = render_lock(inputs, loaded.path.name)
    if path.is_file() and path.read_bytes() == text.encode():
        return inputs, False
    write_text(path, text)
    return inputs, True


def is_locked(loaded: LoadedSpec) -> bool:
    """Checks whether a spec has a lock file that still holds; a revision that has moved since does not invalidate the
    lock."""
    try:
        return read_lock(loaded) is not None and not apply_lock(loaded, locked=False)[1]
    except SpecInvalid:
        return False


def versions() -> Inputs:
    """Returns the versions of minitron and of the libraries that affect numbers, without the local part (`+cpu`) that
    names a build."""
    found: Inputs = {"minitron": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return found


def apply_lock(loaded: LoadedSpec, *, locked: bool) -> tuple[LoadedSpec, list[SpecError]]:
    """Returns the spec with the commits of its lock file, and the stale entries of that file.

    With `locked` whatever is stale is refused (SpecInvalid, each at its line of the lock file), and so is a lock that is
    not there (UsageError). Without it a spec that has no lock is taken as it is.
    """
    lock = read_lock(loaded)
    if lock is None:
        if locked:
            raise UsageError(
                f"{lock_path(loaded)}: there is no lock file; `minitron lock {loaded.path.name}` writes it, "
                "or leave out --locked"
            )
        return loaded, []
    pinned = loaded.pinned(pins(lock, loaded))
    try:
        now = observe(pinned) | {"versions": versions()}
    except MinitronError:
        if locked:
            raise
        # What is not there is said by the plan, with all else that is wrong.
        return pinned, []
    found = stale(lock, now, loaded.path.name)
    if locked and found:
        raise SpecInvalid(found)
    return pinned, found
