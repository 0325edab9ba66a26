"""The entry point of the command line: parses, calls, formats, exits. Everything up to the plan runs without importing
torch."""

from __future__ import annotations

import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

import typer

from reapkit import __version__
from reapkit.cli import answers, directories, looking, recipes
from reapkit.cli.app import app
from reapkit.cli.environment import output_failure, spell_every_name, steady_streams
from reapkit.cli.following import follow, follower_code
from reapkit.cli.global_flags import HELP, GlobalFlags, give, given, taken
from reapkit.core import bus_errors, ranks, stop_requests
from reapkit.core.errors import ReapkitError, RecipeError, StageFailed, UnusableError
from reapkit.core.refusals import SystemRefusal, refusal_in

__all__ = ["answers", "app", "directories", "looking", "main", "recipes"]

ROOMS = [room.__name__ for room in (recipes, answers, looking, directories)]
app.registered_commands.sort(key=lambda command: ROOMS.index(command.callback.__module__))  # as --help lists them

for _command in app.registered_commands:
    _command.epilog = HELP

COLLECT_AFTER = 200_000
"""New objects after which Python's garbage collector runs. Its default of 700 costs a fifth of the time of importing
torch."""

UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""typer carries its own click, whose errors it re-exports only in part."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    own_process = arguments is None
    if own_process:
        spell_every_name()
        steady_streams()
        bus_errors.listen(_bus_error)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags, arguments = taken(arguments)
    give(flags)
    stop_requests.listen()
    gc.set_threshold(COLLECT_AFTER)
    if own_process:
        gc.freeze()  # what the imports left stays to the end: no collection need look at it
    team = None
    try:
        team = ranks.join() if ranks.launched() else None
        code = follow(team, flags.debug) if team and team.rank else _run(arguments, flags)
    except KeyboardInterrupt:  # it came while another error was being dealt with
        code = _interrupted()
    if (failure := output_failure()) and code == 0:
        code = _told(UnusableError(failure.told("standard output")))
    if team:
        code = _end_together(team, code)
    if code == 130:
        # Python dies of SIGINT at its end if one ever crossed an exec() of text (imports do that), handled or not:
        # leave with our code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if own_process:
        gc.freeze()  # nor at anything else now: the process ends, and its memory with it
    sys.exit(code)


def _end_together(team: ranks.Team, code: int) -> int:
    """The code that all ranks end with; torchrun's signals to those that end last are ignored."""
    stop_requests.ignore()
    if team.rank == 0:
        team.conclude(code)
    else:
        team.leave()
    return code


def _interrupted() -> int:
    stop_requests.ignore()
    team = ranks.current()
    if isinstance(team, ranks.Team):
        if team.rank:
            return follower_code(team, ranks.INTERRUPTED)
        if (error := team.cause()) is not None and error.exit_code != ranks.INTERRUPTED:
            return _told(error)
    return _ended("Interrupted. Finished stages are kept; run the same command again to resume.", 130)


def _bus_error(work: str | None, file: str | None) -> int:
    """Tells of a page that the kernel could not supply, without the streams, which may be in the middle of anything."""
    what = (
        f"{file or 'a file that is mapped into memory'}: a part of the file cannot be read or written. Its disk is full"
        " or has failed, or the file was cut short while it was in use: free some space, or restore the file, then run"
        " the same command again."
    )
    error = StageFailed(f"{work}: {what}") if work else UnusableError(what)
    os.write(2, f"reapkit: {error}\n".encode(errors="backslashreplace"))
    if given().as_json:
        os.write(1, json.dumps({"error": str(error), "exit": error.exit_code}).encode() + b"\n")
    return error.exit_code


def _told(error: ReapkitError) -> int:
    if isinstance(error, RecipeError):
        facts = {**error.facts, "problems": [vars(problem) for problem in error.problems]}
        return _ended(str(error), error.exit_code, facts)
    return _ended(str(error), error.exit_code, error.facts, "reapkit: ")


def _ended(text: str, code: int, facts: Mapping[str, Any] | None = None, prefix: str = "") -> int:
    """Says how a command failed: for people on stderr, with --json also as the one document on stdout."""
    print(f"{prefix}{text}", file=sys.stderr)
    return _documented(text, code, facts)


def _documented(text: str, code: int, facts: Mapping[str, Any] | None = None) -> int:
    if given().as_json:
        with suppress(OSError):  # a closed pipe: the exit code says it
            print(json.dumps({"error": text, "exit": code, **(facts or {})}, default=str))
    return code


def _told_here(refusal: SystemRefusal) -> str:
    if not refusal.files and refusal.number == errno.ENOENT and not _is_somewhere():
        return refusal.told("the current directory", "It was deleted: go to one that is there")
    return refusal.told()


def _is_somewhere() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _run(arguments: list[str], flags: GlobalFlags) -> int:
    debug = flags.debug
    if flags.version:
        print(f"reapkit {__version__}")
        return 0
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="reapkit", standalone_mode=False)
        if result == 130:  # typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except UsageError as error:
        cast(Any, error).show()
        return _documented(cast(Any, error).format_message(), RecipeError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except ReapkitError as error:
        if debug:
            traceback.print_exc()
        return _told(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if refusal := refusal_in(error):
            return _told(UnusableError(_told_here(refusal)))
        # a defect of ours: say so, and how to report it
        return _ended(
            f"internal error: {type(error).__name__}: {error}\nThis is a bug in reapkit. Run again with --debug for the"
            " traceback, and please report it.",
            ReapkitError.exit_code,
            prefix="reapkit: ",
        )
