"""What another rank is asked for: it is told apart from observing, and does its share of the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reapkit.cli.following import _help_with
from reapkit.core.errors import UnusableError
from reapkit.evaluation.knockout.job import KnockoutJob
from tests.evaluation.knockout.test_knockouts import FEWER, SMALL, Share
from tests.support import tiny
from tests.support.tiny_tokens import tiny_tokens


def test_a_rank_that_is_asked_to_measure_does_its_share(tmp_path: Path) -> None:
    with tiny.quiet():
        model = tiny.save_hub_layout(tiny.build("qwen3_moe", **FEWER["qwen3_moe"]), tmp_path / "model")
    tokens = tiny_tokens(tmp_path / "calibration", **SMALL, groups=2)
    jobs = {}
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
        jobs[name] = KnockoutJob(
            str(model), str(tokens.directory), str(tmp_path / name), 24, 40, "m", "cpu", "resident", False
        )
    alone = jobs["alone"].run()
    _help_with(json.loads(json.dumps(jobs["together"].as_json())), Share(1, (1, 2)))
    assert len(list((tmp_path / "together").rglob("knockout-*"))) == 2
    together = jobs["together"].run(Share(0, ()))
    assert alone is not None and together is not None
    assert np.array_equal(alone.kl, together.kl) and np.array_equal(alone.kl_sq, together.kl_sq)


def test_a_rank_that_does_not_see_the_model_says_so(tmp_path: Path) -> None:
    job = KnockoutJob(str(tmp_path / "gone"), str(tmp_path), str(tmp_path), 24, 40, "m", "cpu", "resident", False)
    with pytest.raises(UnusableError, match=r"gone does not exist on this machine, but rank 0 reads it"):
        job.run(Share(1, ()))
