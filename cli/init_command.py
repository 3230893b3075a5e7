"""The command that starts a project: init. Writes a commented spec, a published recipe, or with `--teacher` a spec that
can be planned at once.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from minitron.cli import figures
from minitron.cli.data_fields import fields_of
from minitron.cli.held_out_share import held_out_share
from minitron.cli.render import say, write
from minitron.specs import load_spec
from minitron.specs.blocks.distill import LEAST_STEPS
from minitron.specs.data import MOST_PASSES, STDLIB_PREFIX
from minitron.specs.documents.opening import COMPRESSED
from minitron.specs.errors import MinitronError, SpecError, SpecInvalid, UsageError
from minitron.specs.units import COUNT_UNITS, Share, format_quantity, parse_quantity

if TYPE_CHECKING:
    from minitron.compiler.propose import Proposal

# Kind -> files or patterns, as `data` has it, and a document's kind; or a share that is held out.
Source = dict[str, list[str] | str]

# Held-out text beside data that the machine has.
STAND_IN: Source = {"text": [f"{STDLIB_PREFIX}held_out"]}
DEFAULT_SPEC = "spec.yaml"
SCHEMA = "minitron.schema.json"
IGNORED = "builds/"
# Endings of files and what they are read as; all others are text.
_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
# Bytes of text in a token, about, for English and code in today's vocabularies.
_BYTES_A_TOKEN = 4
_MOST_TOKENS, _FIRST_TOKENS, _SHORTEST = 1_000_000_000, 1_000_000, 64
# Up to as many tokens the rate is searched: it decides more than what is kept does, and three short trainings are cheap.
_SEARCHED_TOKENS, _SEARCHED_SHARE = 100_000_000, 0.2
# 1e-4 is the published rate at four billion parameters; smaller students take more, by the root of their size.
_RATE, _RATE_SIZE, _HIGHEST_RATE = 1e-4, 4e9, 3e-3


def init(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A published recipe; a commented starting spec without it.",
            autocompletion=lambda incomplete: recipes_beginning(incomplete),
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="RECIPE.yaml or spec.yaml by default.")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes and write nothing.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="A folder or Hub id: write a spec that plans at once."),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option("--parameters", metavar="COUNT", help="With --teacher: the student's, as 4B or 800M.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="SHARE", help="Instead: a share of the teacher's; 50% by default.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILES", help="With --teacher: text to train on; repeatable.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="FILES", help="With --teacher: text that is never trained on."),
    ] = None,
) -> None:
    """Write a commented starting spec, a published recipe, or a spec for a teacher of your own."""
    from minitron.specs import recipe_names, recipe_text, starting_spec

    if list_recipes:
        for name in recipe_names():
            write(f"{name}  {described(recipe_text(name))}".rstrip())
        return
    path = output or Path(DEFAULT_SPEC if recipe is None else f"{recipe}.yaml")
    if path.exists():
        raise UsageError(f"{path}: exists already and is not overwritten; choose another file with -o")
    if teacher is None:
        if parameters or target or data or held_out:
            raise UsageError("--parameters, --target, --data and --held-out say more of a --teacher; add it")
        _write(path, starting_spec() if recipe is None else recipe_text(recipe))
    else:
        if recipe is not None or (parameters and target):
            raise UsageError("give one of RECIPE and --teacher, and one of --parameters and --target")
        _write(path, spec_for(teacher, _budget(parameters, target), data or (), held_out or (), path))
    write(str(path))
    say(f"next: minitron plan {path}")


def described(text: str) -> str:
    """Returns the first comment line of a recipe that describes it."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return next((line for line in lines if line and "$schema" not in line), "")


def recipes_beginning(incomplete: str) -> list[str]:
    """Returns the recipes that the shell completes `incomplete` to."""
    from minitron.specs import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _write(path: Path, text: str) -> None:
    """Writes the spec, and beside it the files that a repository needs: the schema for editors, and a .gitignore that
    excludes builds.
    """
    from minitron.specs import json_schema_text
    from minitron.specs.atomic import write_text

    write_text(path, text)
    if SCHEMA in text and not (path.parent / SCHEMA).exists():
        write_text(path.parent / SCHEMA, json_schema_text() + "\n")
    ignore = path.parent / ".gitignore"
    if not ignore.exists():
        write_text(ignore, f"{IGNORED}\n")
    elif IGNORED.rstrip("/") not in ignore.read_text(encoding="utf-8", errors="replace"):
        say(f"{ignore}: does not name {IGNORED}, which is where builds are written; add it")


@dataclass(frozen=True)
class Budget:
    """The number of parameters that the student shall have: an absolute number, or a share of the teacher's."""

    parameters: int | None
    share: Fraction | None


def _budget(parameters: str | None, target: str | None) -> Budget:
    try:
        if parameters is not None:
            count = parse_quantity(parameters, COUNT_UNITS)
            if count < 1:
                raise ValueError(f"`{parameters}` is not a number of parameters")
            return Budget(count, None)
        share = Share.parse(target or "50%").of_one
    except ValueError as error:
        option = "--parameters" if parameters is not None else "--target"
        raise UsageError(f"{option}: {error}; write {'4B' if parameters is not None else '50%'}") from None
    if not 0 < share < 1:
        raise UsageError(f"--target {target}: a student is smaller than its teacher; write a share such as 50%")
    return Budget(None, share)


def spec_for(teacher: str, budget: Budget, data: Sequence[str], held_out: Sequence[str], path: Path) -> str:
    """Writes the text of a spec for a teacher, and plans it before returning it; SpecInvalid where no student of the
    teacher can be planned.
    """
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler import make_plan, plan_document
    from minitron.compiler.propose import propose

    folder = path.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)  # what is relative to it is looked up
    model = _relative(teacher, folder) if Path(teacher).is_dir() else teacher
    proposal = propose(model, folder, parameters=budget.parameters, share=budget.share)
    train, judged = _sources(data, held_out, folder)
    refused: SpecInvalid | None = None
    own = judged is not None and judged.get("text") != STAND_IN["text"]
    training = _training(train, proposal.sequence_length, _corpus(data), _expected(budget, proposal), own)
    for student in proposal.students:
        text = _text(path, model, student, training, judged)
        trial = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            trial.write_text(text, encoding="utf-8")
            content = plan_document(make_plan(load_spec(trial), build=folder / IGNORED / path.stem))
        except SpecInvalid as error:
            refused = refused or SpecInvalid([_renamed(one, trial, path) for one in error.errors])
            continue
        finally:
            trial.unlink(missing_ok=True)
        old, new = content["teacher"]["parameters"], content["student"]["parameters"]
        say(f"{path}: {figures.count(new)} of {figures.count(old)} parameters, {figures.percent(new, old)}")
        return text
    assert refused is not None, "a proposal has students"
    raise refused


def _renamed(error: SpecError, trial: Path, path: Path) -> SpecError:
    return replace(error, file=error.file.replace(str(trial), str(path)))


def _expected(budget: Budget, proposal: Proposal) -> int:
    if budget.parameters is not None:
        return budget.parameters
    assert budget.share is not None, "one of the two"
    return int(budget.share * proposal.teacher_parameters)


def _relative(name: str, folder: Path) -> str:
    """Returns a path as the spec in `folder` writes it."""
    way = os.path.relpath(name, folder)
    return way if way.startswith(".") else f"./{way}"


def _sources(data: Sequence[str], held_out: Sequence[str], folder: Path) -> tuple[Source | None, Source | None]:
    """Makes the sources of the training and of the held-out documents: a share of the training's where no other are named."""
    train, judged = (_with_fields(_source(*of, folder), folder) for of in (("--data", data), ("--held-out", held_out)))
    if judged is not None:
        return train, judged
    if train is None or any(one.startswith(STDLIB_PREFIX) for one in data):
        return train, STAND_IN
    try:
        found = held_out_share(train, folder)
    except MinitronError as error:
        say(f"no share of --data could be held out: {error}")
        return train, None
    if found is None:
        say("no share of --data could be held out: it has too few documents; name text with --held-out")
        return train, None
    share, document = found
    if document is not None:
        say(f"each {document} is a document: of the files alone too few could be held out")
        train = {**train, "document": document}
    return train, {"fraction": share}


def _with_fields(source: Source | None, folder: Path) -> Source | None:
    """Adds the field that documents are in where it is not `text`."""
    if source is None or not (fields := fields_of(source, folder)):
        return source
    say(f"documents are read with {' '.join(f'`{key}: {name}`' for key, name in fields.items())}")
    return {**source, **fields}


def _source(option: str, patterns: Sequence[str], folder: Path) -> Source | None:
    """Makes a data source of files or patterns; UsageError where they are of several kinds."""
    kinds = {_kind(pattern) for pattern in patterns}
    if len(kinds) > 1:
        raise UsageError(
            f"{option} names files of several kinds ({', '.join(sorted(kinds))}); give one kind, or write a `blend`"
        )
    for pattern in patterns:
        if not pattern.startswith(STDLIB_PREFIX) and not glob.glob(pattern, recursive=True):  # noqa: PTH207  (absolute ones too)
            raise UsageError(f"{option} {pattern}: matches no file; paths are relative to {Path.cwd()}")
    written = [one if one.startswith(STDLIB_PREFIX) else os.path.relpath(one, folder) for one in patterns]
    return {kinds.pop(): written} if kinds else None


def _kind(pattern: str) -> str:
    path = Path(pattern)
    return _KINDS.get((path.with_suffix("") if path.suffix in COMPRESSED else path).suffix, "text")


def _corpus(patterns: Sequence[str]) -> int:
    """Estimates the number of tokens in the files."""
    files = {file for pattern in patterns for file in glob.glob(pattern, recursive=True)}  # noqa: PTH207  (absolute ones too)
    return sum(Path(file).stat().st_size for file in files if Path(file).is_file()) // _BYTES_A_TOKEN


def _training(train: Source | None, longest: int, corpus: int, size: int, judged: bool) -> list[str]:
    """Returns the lines of `distill`, for a student of `size` parameters and data of about `corpus` tokens. Where the training
    is short and there is text to be judged on, several learning rates and the `search` that tells which is best.
    """
    tokens = min(_MOST_TOKENS, max(MOST_PASSES * corpus, LEAST_STEPS * _SHORTEST)) if train else _FIRST_TOKENS
    tokens = round(tokens, 2 - len(str(tokens)))
    length = longest
    while length > _SHORTEST and tokens < LEAST_STEPS * length:
        length //= 2
    rate = min(_HIGHEST_RATE, _RATE * max(1.0, (_RATE_SIZE / size) ** 0.5))
    passes = f"   # about {tokens / corpus:.1f} passes over the data" if train and corpus else ""
    stand_in = "" if train else "   # stands in until you name your own: minitron init --data"
    searched = judged and tokens <= _SEARCHED_TOKENS
    rates = [factor * rate for factor in (0.5, 1.0, 2.0)] if searched else [rate]
    lr = f"[{', '.join(f'{one:.1e}' for one in rates)}]" if searched else f"{rate:.1e}"
    why = (
        "by the student's size; the best of them is searched"
        if searched
        else "by the student's size; try half and twice"
    )
    briefly = format_quantity(round(_SEARCHED_SHARE * tokens), COUNT_UNITS)
    search = [
        f"search: {{rank: {{tokens: {briefly}, rungs: 2}}}}   # each rate is tried briefly, and the best one goes on"
    ]
    return [
        "distill:",
        f"  data: {_flow(train or {'text': ['python-stdlib:train']})}{stand_in}",
        f"  tokens: {format_quantity(tokens, COUNT_UNITS)}{passes}",
        f"  sequence_length: {length}",
        f"  optimizer: {{lr: {lr}, min_lr: {rates[0] / 100:.1e}}}   # {why}",
        *(search if searched else []),
    ]


def _text(path: Path, model: str, student: dict[str, int], training: list[str], held_out: Source | None) -> str:
    """Returns the text of the spec."""
    measured = "# evaluate: {held_out: {text: [valid.txt]}}   # text that is never trained on, for loss and perplexity"
    if held_out:
        share = "   # documents of `distill.data` that are never trained on" if "fraction" in held_out else ""
        measured = f"evaluate: {{held_out: {_flow(held_out)}}}{share}"
    lines = [
        f"# yaml-language-server: $schema=./{SCHEMA}",
        f"name: {_name(path, model)}",
        f"teacher: {_flow({'model': model})}",
        f"student: {_flow(student)}",
        *training,
        measured,
    ]
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)).strip()


def _name(path: Path, model: str) -> str:
    """Returns a name that is valid for a build folder: made from the file's name, or else from the teacher's."""
    stem = path.stem if path.name != DEFAULT_SPEC else f"{Path(model).name}-student"
    name = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in stem)
    return name.lstrip("._-")[:100] or "student"
