"""Validates the specs that differ from $BASE and writes a report of them in markdown: `python -P report.py`.

    BASE            commit that the changes are counted from
    SPECS           git pathspec of the specs
    PLAN            `true` to show plans and differences beside the validation
    DEVICE          devices that plans are estimated for; none where it is empty
    GITHUB_OUTPUT   gets `report` (the file) and `changed` (how many specs)
    GITHUB_STEP_SUMMARY, RUNNER_TEMP   as GitHub sets them

Ends with 1 where a spec is wrong; the report is written in any case.

Whoever opens a pull request chooses what stands in the specs and how files are called. So nothing is read but files that
are committed: from work trees of the two commits, without `.git`, in which every link that leads out of them is removed,
and of specs that name nothing outside. What is shown is text: in a log no line of it is a command to the runner, in
markdown nothing of it is markup, a link or a mention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minitron.cli.markdown import cell
from minitron.specs.errors import SpecError
from minitron.specs.lockfile import LOCK_SUFFIX
from minitron.specs.one_line import one_line
from minitron.specs.references import Reference, references

MARKER = "<!-- minitron specs -->"


def main() -> int:
    """Writes the report and returns the exit code."""
    base, pathspec = os.environ.get("BASE", ""), os.environ["SPECS"]
    if not base:
        return refuse("There is no base to compare with: run on pull_request, or give `base`.")
    if git("cat-file", "-e", f"{base}^{{commit}}", check=False).returncode != 0:
        return refuse(f"The base {base} is not in this checkout: give actions/checkout `fetch-depth: 0`.")
    with ExitStack() as stack:
        folder = Path(os.path.realpath(os.environ.get("RUNNER_TEMP") or tempfile.mkdtemp()))
        after = stack.enter_context(work_tree(folder / "minitron-head", "HEAD"))
        specs = changed(after, base, pathspec)
        text, failed = f"{MARKER}\nNo spec differs from the base.\n", False
        if specs:
            before = stack.enter_context(work_tree(folder / "minitron-base", base))
            text, failed = written(before, after, specs)
        report = folder / "minitron-report.md"
        report.write_text(text, encoding="utf-8")
        append("GITHUB_OUTPUT", f"report={report}\nchanged={len(specs)}\n")
        append("GITHUB_STEP_SUMMARY", text)
    return int(failed)


# -- the commits ---------------------------------------------------------------------------------------------------------


def git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs git in the checkout; names come back as git stores them, also those that are not UTF-8."""
    command = ["git", *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True, errors="surrogateescape")


def names(*arguments: str) -> list[str]:
    """The file names that a git command prints with -z."""
    return [name for name in git(*arguments).stdout.split("\0") if name]


@contextmanager
def work_tree(folder: Path, commit: str) -> Iterator[Path]:
    """A work tree of a commit: regular files, and links that stay in it."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        for name in names("-C", str(folder), "ls-files", "-z"):
            path = folder / name
            if path.is_symlink() and not is_inside(path, folder):
                path.unlink()
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def is_inside(path: Path, folder: Path) -> bool:
    """Checks whether `path`, with every link followed, exists below `folder` and is not one of git's own files."""
    real = Path(os.path.realpath(path))
    return real.is_relative_to(folder) and ".git" not in real.relative_to(folder).parts and real.exists()


def changed(after: Path, base: str, pathspec: str) -> list[str]:
    """The specs that come to something else than at the base: changed themselves, or built on a file that is, or locked by
    one; `extends`, `teacher.spec` and a folder in `teacher.model` are followed."""
    everything = names("ls-files", "-z")
    touched = {after / name for name in names("diff", "--name-only", "-z", f"{base}...HEAD")}
    touched |= {spec for name in everything if after / name in touched and (spec := spec_of(after, name))}
    specs = [name for name in names("ls-files", "-z", "--", pathspec) if not name.endswith(LOCK_SUFFIX)]
    return sorted(name for name in specs if (after / name).is_file() and builds_on(after / name, touched, after))


def spec_of(after: Path, name: str) -> Path | None:
    """The spec that a lock file says it is of."""
    if not name.endswith(LOCK_SUFFIX) or not is_inside(after / name, after):
        return None
    found = references((after / name).read_bytes(), str(after / name))
    return next((one.target for one in found if one.key == "spec"), None)


def builds_on(spec: Path, touched: set[Path], after: Path) -> bool:
    """Checks whether a spec, or any file that it takes something from, was touched."""
    files = chain_of(spec, after)
    folders = [one.target for found in files.values() for one in found if one.key == "teacher.model"]
    below = any(path.is_relative_to(folder) for path in touched for folder in folders)
    return below or any(file in touched for file in files)


def chain_of(spec: Path, root: Path) -> dict[Path, list[Reference]]:
    """A spec and every spec that it builds on, each with the paths that it names; what is outside is not opened."""
    files: dict[Path, list[Reference]] = {}
    waiting = [spec]
    while waiting:
        file = waiting.pop()
        if file not in files:
            readable = is_inside(file, root) and file.is_file()
            files[file] = references(file.read_bytes(), str(file)) if readable else []
            waiting += [one.target for one in files[file] if one.is_spec]
    return files


def outside(spec: Path, root: Path) -> list[str]:
    """Returns the paths outside of the work tree that a spec, or one that it builds on, names."""
    return [
        str(one.error("leads out of the repository", "name a file that is committed, relative to this one"))
        for found in chain_of(spec, root).values()
        for one in found
        if not one.target.is_relative_to(root) or ".git" in one.target.relative_to(root).parts
    ]


# -- the report ----------------------------------------------------------------------------------------------------------


def written(before: Path, after: Path, specs: list[str]) -> tuple[str, bool]:
    """The report of the specs that differ, and whether one of them is wrong."""
    places = {f"{before}/": "(before) ", f"{after}/": ""}
    closed = {spec: outside(after / spec, after) for spec in specs}
    said = list(dict.fromkeys(line for lines in closed.values() for line in lines))
    readable = [spec for spec in specs if not closed[spec]]
    valid, more = validated(after, readable) if readable else ([], [])
    said += more
    failed = len(valid) < len(specs)
    count = "1 spec" if len(specs) == 1 else f"{len(specs)} specs"
    head = "**There are mistakes in the specs.**" if failed else f"**{count} changed, all valid.**"
    parts = [f"{MARKER}\n{head}\n", *block(said, places)]
    log(said, places)
    if os.environ.get("PLAN", "true") == "true":
        for spec in valid:
            more, wrong = of_one(before, after, spec, places)
            parts += more
            failed = failed or wrong
    return "\n".join(parts), failed


def validated(after: Path, specs: list[str]) -> tuple[list[str], list[str]]:
    """The specs that hold, and what there is to say about any of them."""
    _, result, said = run(after, "validate", "--json", "--", *specs)
    if not result:
        return [], said
    content = json.loads(result)
    found = [str(SpecError(**one)) for one in content["errors"]]
    found += [f"warning: {SpecError(**one)}" for one in content["warnings"]]
    return [one["file"] for one in content["specs"]], [*found, *said]


def of_one(before: Path, after: Path, spec: str, places: dict[str, str]) -> tuple[list[str], bool]:
    """The part of the report that one valid spec has, and whether it cannot be planned."""
    parts = [f"## {code(spec)}\n"]
    if not is_inside(before / spec, before):
        parts.append("A new spec.\n")
    elif outside(before / spec, before):
        parts.append("Nothing to compare with: before, the spec named files outside of the repository.\n")
    else:
        status, result, said = run(after, "diff", "--markdown", "--", str(before / spec), str(after / spec))
        none = "Nothing to compare with: one of the two cannot be planned.\n"
        parts += details("What changes", [none, *block(said, places)] if status else [in_markdown(result, places)])
    device = os.environ.get("DEVICE", "")
    status, result, said = run(after, "plan", "--markdown", *(["--device", device] if device else []), "--", spec)
    if status:
        log(said, places)
    shown = "**It cannot be compiled:**\n" if status else in_markdown(result, places)
    return [*parts, *details("Plan", [shown, *block(said, places)])], status != 0


def run(folder: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, result and messages of a `minitron` command."""
    command = ["minitron", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout, done.stderr.split("\n")[:-1]


def details(title: str, parts: list[str]) -> list[str]:
    """A part that opens when it is asked for."""
    return [f"<details><summary>{title}</summary>\n", *parts, "</details>\n"]


def block(lines: list[str], places: dict[str, str]) -> list[str]:
    """Lines of a process as code: indented, which nothing in them can end as it could a fence."""
    return ["".join(f"    {one_line(shortened(line, places))}\n" for line in lines)] if lines else []


def code(name: str) -> str:
    """A file's name as code, in one line."""
    return "`" + one_line(name).replace("`", "'") + "`"


def in_markdown(text: str, places: dict[str, str]) -> str:
    """Markdown of ours, with paths in it shortened, which stand there with their marks escaped."""
    return shortened(text, {cell(folder): name for folder, name in places.items()})


def shortened(text: str, places: dict[str, str]) -> str:
    """`text` with paths as a reader of the pull request knows them."""
    for folder, name in places.items():
        text = text.replace(folder, name)
    return text


# -- the runner ----------------------------------------------------------------------------------------------------------


def log(lines: list[str], places: dict[str, str]) -> None:
    """Lines on stderr, none of which the runner takes for a command (`::error::`, `##[group]`)."""
    for line in lines:
        print(one_line(shortened(line, places)).replace("::", ": :").replace("##[", "## ["), file=sys.stderr)


def refuse(reason: str) -> int:
    """An annotation of the run, and the exit code of a wrong call."""
    print(f"::error::{one_line(reason)}", file=sys.stderr)
    return 2


def append(variable: str, text: str) -> None:
    """Adds to a file that the runner reads afterwards."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main())
