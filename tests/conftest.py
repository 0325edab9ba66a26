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


@pytest.fixture
def layer_blocks() -> Iterator[None]:
    """Streamed layers are overwritten when they are dropped, and the test fails if one was still looked at or handed
    out twice."""
    from tests.support.layer_blocks import watched_blocks

    with watched_blocks() as blocks:
        yield
    assert blocks.most_in_use <= 2 and blocks.left_behind == 0
