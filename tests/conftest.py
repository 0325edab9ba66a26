"""One thread, so that tests of exact equality and a shared machine both hold; Ctrl-C and a closed terminal reach the
programs that tests start, also where a shell started the tests in the background.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from reapkit.core.programs import Ended, run_program
from tests.support.forked import Forks, forking
from tests.support.forked_program import is_forked, run_in

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # every child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def commands() -> Iterator[Forks]:
    """Commands that are forked off one process, which has everything imported."""
    with forking() as forks:
        yield forks


@pytest.fixture(scope="session", autouse=True)
def proofs_in_forks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs that tests make prove their results in a fork of that process; tests of the proofs start a fresh one."""
    from reapkit.evaluation.proofs import prove

    def run(
        command: Sequence[str], *, environment: Mapping[str, str] | None = None, directory: str | None = None
    ) -> Ended:
        if is_forked(command):
            return run_in(request.getfixturevalue("commands"), command, environment)
        return run_program(command, environment=environment, directory=directory)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prove, "run_program", run)
        yield


@pytest.fixture
def layer_blocks() -> Iterator[None]:
    """Streamed layers are overwritten when they are dropped, and the test fails if one was still looked at or handed
    out twice."""
    from tests.support.layer_blocks import watched_blocks

    with watched_blocks() as blocks:
        yield
    assert blocks.most_in_use <= 2 and blocks.left_behind == 0
