"""The `minitron` command: the table of commands, and the one place that handles every error."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from minitron import __version__
from minitron.cli import (
    build_commands,
    cache_command,
    data_command,
    diff_command,
    init_command,
    interrupts,
    lock_command,
    maintenance_commands,
    output,
    run_command,
    search_command,
    spec_commands,
)
from minitron.cli.failures import DONE, FAILED, INTERRUPTED, failure_of
from minitron.cli.libraries import quiet_imports
from minitron.cli.processes import launched
from minitron.cli.ranks import says
from minitron.cli.render import complain, document, write
from minitron.cli.streams import Unbreakable, open_standard_streams
from minitron.specs.errors import OtherProcessEnded, ProcessesFailed, UsageError

app = typer.Typer(
    name="minitron",
    help="Compile a large language model into a smaller one: prune, distil, verify.",
    epilog="Exit codes: 0 done, 1 it failed while working, 2 the spec or the call is wrong, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init_command.init)
app.command("schema")(spec_commands.schema)
app.command("validate")(spec_commands.validate)
app.command("lock")(lock_command.lock)
app.command("plan")(spec_commands.plan)
app.command("data")(data_command.data)
app.command("compile")(build_commands.compile_command)
app.command("verify")(build_commands.verify)
app.command("search")(search_command.search)
app.command("capture")(build_commands.capture)
app.command("train")(build_commands.train)
app.command("eval")(build_commands.evaluate)
app.command("run")(run_command.run)
app.command("export")(build_commands.export)
app.command("show")(build_commands.show)
app.command("diff")(diff_command.diff)
app.command("list")(maintenance_commands.list_builds)
app.command("clean")(maintenance_commands.clean)
app.command("cache")(cache_command.cache)
app.command("doctor")(maintenance_commands.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        write(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings; anywhere on the line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Results and errors only; anywhere on the line.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Messages of libraries as well; anywhere on the line.")
    ] = False,
    log_file: Annotated[
        str | None, typer.Option("--log-file", metavar="FILE", help="Add progress and messages to FILE, with the time.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Declared for the help; all but `--version` are read in `command_line`, before typer, so that they may stand anywhere."""


def main() -> NoReturn:
    """Runs the command line of this process and ends it with the command's exit code."""
    # Before torch is imported: threads that wait for each other give their core away instead of spinning on it, which
    # costs little on an idle machine and was measured to double the speed of training on a shared one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    interrupts.watch()
    open_standard_streams()
    sys.stdout, sys.stderr = out, _ = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    code = command_line(sys.argv[1:])
    out.flush()
    if out.lost is not None and not isinstance(out.lost, BrokenPipeError):
        complain(f"error: the output could not be written ({out.lost.strerror}); the work itself is done")
        code = code or FAILED
    if "torch" in sys.modules:
        # All is done and on disk by now. Taking torch's graph machinery down at the interpreter's end has been seen to
        # abort (torch 2.13, about one compile in three in a debug heap), which would turn a good exit code into 134.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def command_line(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code; every error is reported on stderr, or as JSON under `--json`."""
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")
    try:
        if "" in arguments:  # as a path it would be the current folder, which no one has named
            raise UsageError("an argument is empty; write it out: a variable of your shell may not be set")
        arguments = output.configure(arguments)
        quiet_imports()
        code = app([one for one in arguments if one != "--debug"], prog_name="minitron", standalone_mode=False)
        sys.stdout.flush()
    except typer.Abort:
        # What older typer releases make of an interrupt.
        return _report(KeyboardInterrupt(), as_json=False)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupts.no_more()
        # A library may have made another error of an interrupt.
        return _report(KeyboardInterrupt() if interrupts.asked_for() else error, as_json="--json" in arguments)
    if code == INTERRUPTED:
        return _report(KeyboardInterrupt(), as_json="--json" in arguments)
    return code if isinstance(code, int) else DONE


def _report(error: BaseException, *, as_json: bool) -> int:
    failure = failure_of(error)
    if launched() and isinstance(error, KeyboardInterrupt | OtherProcessEnded):
        return failure.exit_code  # the launcher says it once
    if isinstance(error, ProcessesFailed):
        return failure.exit_code
    if not says(failure):
        return failure.exit_code
    if as_json:
        write(document(failure.document()))
    else:
        complain(*failure.lines())
    return failure.exit_code
