"""The proofs' own tests run the process that users run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reapkit.core.programs import run_program
from reapkit.evaluation.proofs import prove


@pytest.fixture(scope="package", autouse=True)
def proofs_in_a_fresh_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prove, "run_program", run_program)
        yield
