"""Runs the ranks other than 0 under torchrun: they print nothing, do what rank 0 asks and exit with its code."""

from __future__ import annotations

import sys
import traceback
from typing import Any, cast

from reapkit.cli.app import quiet_libraries
from reapkit.core.errors import ReapkitError, StageFailed
from reapkit.core.ranks import INTERRUPTED, Team
from reapkit.core.refusals import refusal_in


def follow(team: Team, debug: bool) -> int:
    """Helps until rank 0 ends the run; its exit code, or the one of what went wrong here."""
    quiet_libraries()
    try:
        for job in team.jobs():
            _help_with(job, team)
        return cast(int, team.outcome())  # the jobs end once it is known
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = _described(error)
        team.fail(code, text)
        return follower_code(team, code)


def _help_with(job: dict[str, Any], team: Team) -> None:
    """Does a share of what rank 0 asks for, and frees what it took for it."""
    from reapkit.evaluation.knockout import job as knockouts
    from reapkit.observation.job import help_with, let_go

    if job.get("kind") != knockouts.KIND:
        help_with(job, team)
        return
    knockouts.KnockoutJob.of_json(job).run(team)
    let_go()


def follower_code(team: Team, code: int) -> int:
    """What this rank ends with: rank 0's code, or, where rank 0 is no more, the one of its death, which the first left
    reports."""
    if code == INTERRUPTED and team.trouble is None:
        team.fail(code, "")
    heard = team.heard() if team.trouble is None else None
    if heard is not None:
        return heard
    if team.trouble is None:
        return code
    if team.speaks():
        print(f"reapkit: {team.trouble}", file=sys.stderr)
    return team.trouble.exit_code


def _described(error: Exception) -> tuple[int, str]:
    """Exit code and text, as the same error would have on rank 0."""
    if isinstance(error, ReapkitError):
        return error.exit_code, str(error)
    if refusal := refusal_in(error):
        return StageFailed.exit_code, refusal.told()
    return (
        1,
        (
            f"internal error: {type(error).__name__}: {error}. This is a bug in reapkit. Run again with --debug for"
            " the traceback, and please report it."
        ),
    )
