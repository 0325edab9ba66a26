"""Commands that are forked off one process, and a small run that they can break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.broken_machines import finished_run
from tests.support.forked import Forks, forking


@pytest.fixture(scope="session")
def commands() -> Iterator[Forks]:
    with forking() as forks:
        yield forks


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, commands: Forks) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished"), commands)
