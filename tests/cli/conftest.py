"""A small run that commands can break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.broken_machines import finished_run
from tests.support.forked import Forks


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, commands: Forks) -> Path:
    return finished_run(tmp_path_factory.mktemp("finished"), commands)
