"""Checkpoints that the tests of this room share."""

from __future__ import annotations

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from tests.support.tiny import build, save_hub_layout


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`tiny_checkpoint(model_type)`: the tiny model's checkpoint, saved once."""
    saved: dict[str, Checkpoint] = {}

    def of(model_type: str) -> Checkpoint:
        if model_type not in saved:
            saved[model_type] = Checkpoint.open(save_hub_layout(build(model_type), tmp_path_factory.mktemp(model_type)))
        return saved[model_type]

    return of
