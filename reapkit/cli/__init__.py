"""The command line: parses, calls, formats, exits. Everything up to the plan runs without importing torch."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import typer

from reapkit.cli import directories, looking, recipes
from reapkit.cli.app import app
from reapkit.errors import ReapkitError, RecipeError

__all__ = ["app", "directories", "looking", "main", "recipes"]

UsageError = typer.BadParameter.__mro__[1]  # typer carries its own click, whose errors it re-exports only in part


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt  # Slurm's SIGTERM means the same as Ctrl-C: save and stop


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with the documented code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run(arguments, debug)
    except KeyboardInterrupt:  # it came while another error was being dealt with
        code = _interrupted()
    if code == 130:
        # Python dies of SIGINT at its end if one ever crossed an exec() of text (imports do that), handled or not: leave with our code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _interrupted() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # we are leaving already
    print("Interrupted. Finished stages are kept; run the same command again to go on.", file=sys.stderr)
    return 130


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="reapkit", standalone_mode=False)
        if result == 130:  # typer turns Ctrl-C into this code without a word
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except UsageError as error:
        error.show()
        return RecipeError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        return 0
    except ReapkitError as error:
        if debug:
            traceback.print_exc()
        print(error if isinstance(error, RecipeError) else f"reapkit: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # a defect of ours: say so, and how to report it
        if debug:
            traceback.print_exc()
        print(f"reapkit: a defect of reapkit: {type(error).__name__}: {error}\n"
              "Run again with --debug for the traceback, and please report it.", file=sys.stderr)
        return 1
