"""The command that pins versions, lock, and the option `--locked` of the commands that follow a lock."""

from __future__ import annotations

from minitron.cli import options
from minitron.cli.render import document, say, write
from minitron.specs import LoadedSpec, load_spec


def lock(spec: options.SpecFile, overrides: options.Overrides = None, as_json: options.Json = False) -> None:
    """Write or renew NAME.lock.yaml: the commit of the teacher, hashes of its files, tokenizer and data, versions."""
    loaded = load_spec(spec, overrides or ())
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler.teacher.lock import is_locked, renew
    from minitron.specs.chain import chain
    from minitron.specs.lockfile import lock_path

    # A chain is pinned from its first teacher down; what is locked above and still holds is left as it is.
    for upper in chain(loaded):
        if not is_locked(upper):
            renew(load_spec(upper.path))
            say(f"locked: {lock_path(upper)}, which {loaded.path.name} takes its teacher from")
    inputs, changed = renew(loaded)
    path = lock_path(loaded)
    if as_json:
        write(document({"path": str(path), "changed": changed, "lock": inputs}))
        return
    write(str(path))
    if not changed:
        say(f"{path}: was up to date")


def follow_lock(loaded: LoadedSpec, *, locked: bool) -> LoadedSpec:
    """Applies the spec's lock file, where there is one: a stale one is refused under `locked`, and otherwise warned
    of.
    """
    from minitron.compiler import apply_lock

    pinned, stale = apply_lock(loaded, locked=locked)
    say(*(f"warning: {one}" for one in stale))
    return pinned
