"""One thread, so that tests of exact equality and a shared machine both hold; Ctrl-C and a closed terminal reach the
programs that tests start, also where a shell started the tests in the background.
"""

import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # every child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def proofs_in_forks() -> Iterator[None]:
    """Runs that tests make prove their results in a fork instead of a fresh process; tests of the proofs do not."""
    from reapkit.evaluation.proofs import prove
    from tests.support.forked_program import run_or_fork

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prove, "run_program", run_or_fork)
        yield


@pytest.fixture
def layer_blocks() -> Iterator[None]:
    """Streamed layers are overwritten when they are dropped, and the test fails if one was still looked at or handed
    out twice."""
    from tests.support.layer_blocks import watched_blocks

    with watched_blocks() as blocks:
        yield
    assert blocks.most_in_use <= 2 and blocks.left_behind == 0
